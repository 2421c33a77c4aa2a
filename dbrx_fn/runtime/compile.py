"""Compilation of layers: the only user of `mx.compile`. Shapes and dtypes are checked once per signature.

`mx.compile` traces a function once per combination of argument shapes, dtypes and constants, and then runs the recorded
graph without Python. It takes arrays and trees of arrays, which a `Config` is not. So a layer's positional arguments
are traced, and its keyword-only arguments are static. Each distinct set of static values has a compiled function of its
own.

On the CPU, layers aren't compiled: their Python runs at each call, with the same results. MLX would build every fused
kernel there with g++, which delays the first token by seconds (`docs/architecture.md`, section 9). DBRX_FN_COMPILE=1
compiles there too, and so does `traced`.

beartype checks jaxtyping's shapes and dtypes when a function first gets them and never again, so checks cost nothing
per token. The logger `dbrx_fn.compile` reports each trace (on the CPU: each check) at level DEBUG. To see them:
`logging.getLogger("dbrx_fn.compile").setLevel(logging.DEBUG)`.
"""

import functools
import logging
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import mlx.core as mx
from beartype import beartype
from jaxtyping import jaxtyped

from dbrx_fn.runtime.device import compiles, traced_for

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("dbrx_fn.compile")


_within_known = ContextVar("within_known", default=False)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a part of a layer: checks shapes and dtypes, once for each combination.

    As for `compiled`, positional arguments are arrays or trees of them, keyword arguments are static and hashable.

    Raises:
        jaxtyping.TypeCheckError: when called with arrays whose shapes or dtypes differ from the annotations.
    """
    return _once(_checked(function), function)


def compiled(layer: Callable[P, R], *, check: Callable[..., None] | None = None) -> Callable[P, R]:
    """Compiles `layer` on GPUs. On the CPU, calls run its Python, and its types are checked once.

    Positional arguments are arrays or trees of them, keyword arguments are static and hashable.
    Inside another trace (a compiled caller, `mx.grad`, `mx.checkpoint`) the layer becomes part of that trace.

    Args:
        layer: the function.
        check: what raises a clearer error than the types for some arguments. It gets them before the types are checked.

    Raises:
        jaxtyping.TypeCheckError: on the first call with shapes or dtypes that differ from the annotations.
    """
    checked = _checked(layer, check)

    def first(*arrays: P.args, **static: P.kwargs) -> R:
        logger.debug("checking %s", layer.__qualname__)
        return checked(*arrays, **static)

    called, fused = _once(first, layer), traced(layer, check=check)

    @functools.wraps(layer)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        return fused(*arrays, **static) if compiles() else called(*arrays, **static)

    return call


def traced(layer: Callable[P, R], *, check: Callable[..., None] | None = None) -> Callable[P, R]:
    """`compiled` on every back end, for functions that gain from fused kernels on the CPU too.

    Raises:
        jaxtyping.TypeCheckError: when traced with arrays whose shapes or dtypes differ from the annotations.
    """
    checked = _checked(layer, check)

    # A trace keeps what its functions chose.
    @functools.cache
    def with_static(chosen_for: Hashable, *static: tuple[str, Hashable]) -> Callable[..., R]:
        keywords = dict(static)

        def trace(*arrays: object) -> R:
            logger.debug("tracing %s", layer.__qualname__)
            return checked(*arrays, **keywords)  # type: ignore[arg-type]

        return mx.compile(trace)

    @functools.wraps(layer)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        try:
            return with_static(traced_for(), *sorted(static.items()))(*arrays)
        except (RuntimeError, TypeError, ValueError):
            # mx.compile refuses what is no tree of arrays, before it traces.
            if check is not None:
                check(*arrays, **static)
            raise

    return call


def once(check: Callable[P, None]) -> Callable[P, None]:
    """Decorates a check that only raises: it runs once per signature, as in `typed`."""

    def nothing(*arrays: P.args, **static: P.kwargs) -> None:
        pass

    return _once(check, nothing)


def _checked(function: Callable[P, R], check: Callable[..., None] | None = None) -> Callable[P, R]:
    typed_function: Callable[P, R] = jaxtyped(typechecker=beartype)(function)
    if check is None:
        return typed_function

    def call(*arrays: P.args, **static: P.kwargs) -> R:
        check(*arrays, **static)
        return typed_function(*arrays, **static)

    return call


def _once(first: Callable[P, R], again: Callable[P, R]) -> Callable[P, R]:
    """Calls `first` for each new signature, until it succeeds, and `again` for known ones.

    The functions that a function calls depend on its signature only. So within a call of a known signature all inner
    signatures are known too, and computing them is skipped, which saves 10% of decoding on a CPU.
    """
    known: set[object] = set()

    @functools.wraps(first)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        if _within_known.get():
            return again(*arrays, **static)
        signature = (traced_for(), _signature(arrays), *static.items())
        if signature in known:
            outside = _within_known.set(True)
            try:
                return again(*arrays, **static)
            finally:
                _within_known.reset(outside)
        result = first(*arrays, **static)
        known.add(signature)
        return result

    return call


def _signature(tree: object) -> object:
    """Everything that types can depend on, as a hashable value: a tree's structure, its arrays' shapes and dtypes."""
    if isinstance(tree, mx.array):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return (dict, *tree, *map(_signature, tree.values()))
    if isinstance(tree, (tuple, list)):
        return (type(tree), *map(_signature, tree))
    return type(tree)
