"""LayerNorm with a weight and no bias, as DBRX has it three times: before attention, before the experts, at the end."""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.ops.kernels import layer_norm as kernel
from dbrx_fn.ops.products import normalized
from dbrx_fn.ops.twin import with_gradients_of
from dbrx_fn.runtime.compile import typed

EPS = 1e-5
"""`torch.nn.LayerNorm`'s default, which the reference leaves as it is."""


def layer_norm(params: dict[str, mx.array], x: mx.array) -> mx.array:
    """Normalizes `[... d_model]` to mean 0 and variance 1 over the last axis, times `weight` `[d_model]`."""
    return _layer_norm(params["weight"], x)


@typed
def _layer_norm(
    weight: Float[mx.array, " d_model"], x: Float[mx.array, "*batch d_model"]
) -> Float[mx.array, "*batch d_model"]:
    def stock(weight: mx.array, x: mx.array) -> mx.array:
        return normalized(weight, x, EPS)

    if kernel.fits(weight, x):
        return with_gradients_of(stock, lambda weight, x: kernel.layer_norm(weight, x, eps=EPS), weight, x)
    return stock(weight, x)
