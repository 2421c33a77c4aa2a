"""Linear maps of the tree: one for activations, one for stacked experts.

A linear is a dict whose leaves say what it is, dense or quantized (`dbrx_fn.model.params`); everything that multiplies by a
weight goes through here. Gradients reach the activations through either kind, and the weight of a dense one.
"""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.ops.formats import Linear, format_of
from dbrx_fn.ops.kernels import linears
from dbrx_fn.ops.products import grouped_matmul, grouped_quantized_matmul, quantized_matmul
from dbrx_fn.ops.twin import with_gradients_of
from dbrx_fn.runtime.compile import typed


def linear(params: Linear, x: mx.array) -> mx.array:
    """`[... inner]` times a weight `[outer inner]`, as `[... outer]`.

    Raises:
        CheckpointError: if the weight is quantized in a way that isn't known.
    """
    if "scales" not in params:
        return _dense(params["weight"], x)
    quantization = format_of(params, x.shape[-1])

    def stock(x: mx.array) -> mx.array:
        return quantized_matmul(x, params["weight"], params["scales"], params.get("biases"), quantization)

    if linears.fits(params, x):
        return with_gradients_of(stock, lambda x: linears.linear(params, x), x)
    return stock(x)


def expert_linear(params: Linear, x: mx.array, segment_experts: mx.array) -> mx.array:
    """Segments of rows `[segments rows inner]`, each times the weight of its own expert, as `[segments rows outer]`.

    Args:
        params: `weight` is `[expert outer inner]`, or quantized from that.
        x: the segments.
        segment_experts: int `[segments]`, ascending.

    Raises:
        CheckpointError: as `linear`.
    """
    if "scales" not in params:
        return grouped_matmul(x, params["weight"], segment_experts)
    quantization = format_of(params, x.shape[-1])
    return grouped_quantized_matmul(
        x, params["weight"], params["scales"], params.get("biases"), segment_experts, quantization
    )


@typed
def _dense(
    weight: Float[mx.array, "outer inner"], x: Float[mx.array, "*batch inner"]
) -> Float[mx.array, "*batch outer"]:
    return x @ weight.T
