"""LayerNorm with a weight and no bias."""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.ops import cpu
from dbrx_fn.ops.kernels import layer_norm as kernel
from dbrx_fn.ops.twin import with_kernel
from dbrx_fn.runtime.compile import typed


def _has_kernel(weight: mx.array, x: mx.array, *, eps: float) -> bool:
    return kernel.fits(weight, x)


@typed
@with_kernel(kernel.layer_norm, fits=_has_kernel)
def layer_norm(
    weight: Float[mx.array, " d_model"], x: Float[mx.array, "*batch d_model"], *, eps: float
) -> Float[mx.array, "*batch d_model"]:
    """Normalizes `x` `[... d_model]` to mean 0 and variance 1 over the last axis, times `weight`."""
    if cpu.on_linux_cpu():
        return cpu.layer_norm(weight, x, eps)
    return mx.fast.layer_norm(x, weight, None, eps)
