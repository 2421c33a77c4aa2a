"""The one place that touches `mx.compile`: layers as compiled functions whose types are checked once a shape.

`mx.compile` traces a function once per combination of argument shapes, dtypes and constants, and from then on runs
the recorded graph without entering Python. It takes arrays and trees of them; a `Config` is neither. So a layer's
positional arguments are what is traced and its keyword-only arguments are what is static, and each distinct set of
static values has a compiled function of its own.

On the CPU a compiled layer's Python runs at each call instead (DBRX_FN_COMPILE=1 compiles there too). MLX builds every
fused kernel there with g++, which takes over half a second each. 6 layers of d_model 256, 16 experts, 4 of them, on 2
cores (MLX 0.32.4), compiled and called:
    first token on a machine that has no kernels yet: 17 s and 1.2 s;  later tokens: 245 and 160 a second;
    a training step of 8 times 128 tokens: 7 to 12 s and 7 to 10 s, which is noise.
Logits of that model are bitwise the same either way. `traced` compiles on the CPU too.

jaxtyping's shapes and dtypes are checked by beartype when a function first meets them and never again, so that full
checking costs nothing per token. Each such meeting is reported to the logger `dbrx_fn.compile` at level DEBUG:
`logging.getLogger("dbrx_fn.compile").setLevel(logging.DEBUG)` shows what was traced (on the CPU: checked), and when.
"""

import functools
import logging
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import mlx.core as mx
from beartype import beartype
from jaxtyping import jaxtyped

from dbrx_fn.runtime.device import Backend, compiles, traced_for

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("dbrx_fn.compile")


_within_known = ContextVar("within_known", default=False)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Checks a function's shapes and dtypes, once for each combination; for the parts of layers.

    As in `compiled`, positional arguments are arrays or trees of them, keyword arguments are static and hashable.

    Raises:
        jaxtyping.TypeCheckError: when called with arrays whose shapes or dtypes differ from the annotations.
    """
    return _once(_checked(function), function)


def compiled(layer: Callable[P, R]) -> Callable[P, R]:
    """Compiles `layer` where that pays, which is on GPUs; on the CPU it is called, its types checked once.

    Positional arguments are arrays or trees of them, keyword arguments are static and hashable.
    Inside another trace (a compiled caller, `mx.grad`, `mx.checkpoint`) the layer becomes part of that trace.

    Raises:
        jaxtyping.TypeCheckError: when it first meets arrays whose shapes or dtypes differ from the annotations.
    """
    checked = _checked(layer)

    def first(*arrays: P.args, **static: P.kwargs) -> R:
        logger.debug("checking %s", layer.__qualname__)
        return checked(*arrays, **static)

    called, fused = _once(first, layer), traced(layer)

    @functools.wraps(layer)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        return fused(*arrays, **static) if compiles() else called(*arrays, **static)

    return call


def traced(layer: Callable[P, R]) -> Callable[P, R]:
    """`compiled` for every back end: `mx.compile` on the CPU too, for a function that gains from fused kernels there.

    Raises:
        jaxtyping.TypeCheckError: when traced with arrays whose shapes or dtypes differ from the annotations.
    """
    checked = _checked(layer)

    # A trace keeps what its functions chose.
    @functools.cache
    def with_static(chosen_for: tuple[Backend, bool], *static: tuple[str, Hashable]) -> Callable[..., R]:
        keywords = dict(static)

        def trace(*arrays: object) -> R:
            logger.debug("tracing %s", layer.__qualname__)
            return checked(*arrays, **keywords)  # type: ignore[arg-type]

        return mx.compile(trace)

    @functools.wraps(layer)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        return with_static(traced_for(), *sorted(static.items()))(*arrays)

    return call


def once(check: Callable[P, None]) -> Callable[P, None]:
    """Runs a check, for what it raises, the first time that it meets a signature (as of `typed`), and not again."""

    def nothing(*arrays: P.args, **static: P.kwargs) -> None:
        pass

    return _once(check, nothing)


def _checked(function: Callable[P, R]) -> Callable[P, R]:
    return jaxtyped(typechecker=beartype)(function)


def _once(first: Callable[P, R], again: Callable[P, R]) -> Callable[P, R]:
    """Calls `first` for arguments of a new signature, until that succeeds, and `again` for those that had one.

    What a function calls depends on its signature alone. So within a call of a known one all the others are known too,
    and their signatures aren't made: on the CPU 6 layers of width 256 decode 202 tokens a second for 182.
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
    """All that types can depend on, as a hashable value: a tree's form, its arrays' shapes and dtypes."""
    if isinstance(tree, mx.array):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return (dict, *tree, *map(_signature, tree.values()))
    if isinstance(tree, (tuple, list)):
        return (type(tree), *map(_signature, tree))
    return type(tree)
