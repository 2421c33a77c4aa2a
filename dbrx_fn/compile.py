"""The one place that touches `mx.compile`: layers as compiled functions that check their types while being traced.

`mx.compile` traces a function once per combination of argument shapes, dtypes and constants, and from then on runs
the recorded graph without entering Python. It takes arrays and trees of them; a `Config` is neither. So a layer's
positional arguments are what is traced and its keyword-only arguments are what is static, and each distinct set of
static values has a compiled function of its own.

jaxtyping's shapes and dtypes are checked by beartype inside the traced function, hence when it is traced and never
again: full checking costs nothing per token. Every trace is reported to the logger `dbrx_fn.compile` at level DEBUG,
so `logging.getLogger("dbrx_fn.compile").setLevel(logging.DEBUG)` shows what was traced, and when.
"""

import functools
import logging
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import mlx.core as mx
from beartype import beartype
from jaxtyping import jaxtyped

typed = jaxtyped(typechecker=beartype)
"""Checks a function's shapes and dtypes at each call; for the parts of layers, which are only called in a trace."""

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def compiled(layer: Callable[P, R]) -> Callable[P, R]:
    """Compiles `layer`: positional arguments are arrays or trees of them, keyword arguments are static and hashable.

    Inside another trace (a compiled caller, `mx.grad`, `mx.checkpoint`) the layer becomes part of that trace.

    Raises:
        jaxtyping.TypeCheckError: when traced with arrays whose shapes or dtypes differ from the annotations.
    """
    checked = typed(layer)

    @functools.cache
    def with_static(*static: tuple[str, Hashable]) -> Callable[..., R]:
        keywords = dict(static)

        def trace(*arrays: object) -> R:
            logger.debug("tracing %s", layer.__qualname__)
            return checked(*arrays, **keywords)  # type: ignore[arg-type]

        return mx.compile(trace)

    @functools.wraps(layer)
    def call(*arrays: P.args, **static: P.kwargs) -> R:
        return with_static(*sorted(static.items()))(*arrays)

    return call
