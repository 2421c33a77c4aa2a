"""Linear maps of the tree, dense: one for activations, one for stacked experts.

A linear is a dict whose leaves say what it is; everything that multiplies by a weight goes through here.
"""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.backend import grouped_matmul
from dbrx_fn.compile import typed

Linear = dict[str, mx.array]


def linear(params: Linear, x: mx.array) -> mx.array:
    """`[... inner]` times a weight `[outer inner]`, as `[... outer]`."""
    return _dense(params["weight"], x)


def expert_linear(params: Linear, x: mx.array, segment_experts: mx.array) -> mx.array:
    """Segments of rows `[segments rows inner]`, each times the weight of its own expert, as `[segments rows outer]`.

    Args:
        params: `weight` is `[expert outer inner]`.
        x: the segments.
        segment_experts: int `[segments]`, ascending.
    """
    return grouped_matmul(x, params["weight"], segment_experts)


@typed
def _dense(
    weight: Float[mx.array, "outer inner"], x: Float[mx.array, "*batch inner"]
) -> Float[mx.array, "*batch outer"]:
    return x @ weight.T
