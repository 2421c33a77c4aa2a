"""LayerNorm of wide rows, faster than MLX's own (`docs/performance.md`, section 3)."""

import mlx.core as mx
from jaxtyping import BFloat16

from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, on_gpu
from dbrx_fn.ops.kernels.segments import format_defines, padded
from dbrx_fn.runtime.compile import typed


def fits(weight: mx.array, x: mx.array) -> bool:
    """Whether the kernel supports this width: 256 to 8192, in steps of 256."""
    width = x.shape[-1]
    return on_gpu() and x.dtype == weight.dtype == mx.bfloat16 and width % 256 == 0 and width <= 8192


@typed
def layer_norm(
    weight: BFloat16[mx.array, " d_model"], x: BFloat16[mx.array, "*batch d_model"], *, eps: float
) -> BFloat16[mx.array, "*batch d_model"]:
    """Normalizes `x` `[... d_model]` to mean 0 and variance 1, times `weight`."""
    width = x.shape[-1]
    return launch(
        Kernel("layer_norm", (("WIDTH", width), ("PACKED", 0))),
        [x, weight],
        [(x.shape, mx.bfloat16)],
        blocks=(x.size // width, 1, 1),
        threads=width // 8,
        scalars=(eps,),
    )[0]


def packed_layer_norm(weight: mx.array, x: mx.array, matrix: Linear, *, eps: float, rows: int) -> mx.array:
    """`pack_rows` of normalized rows `x` `[tokens d_model]`, in one launch: bfloat16 `[slots d_model]`.

    Args:
        weight: the norm's weight.
        x: the rows.
        matrix: the matrix of the product.
        eps: the norm's epsilon.
        rows: the most rows of a segment.
    """
    tokens, width = x.shape
    defines = format_defines(matrix, width) | {"ROWS": rows, "WIDTH": width, "PACKED": 1}
    return launch(
        Kernel("layer_norm", tuple(defines.items())),
        [x, weight],
        [((padded(tokens), width), mx.bfloat16)],
        blocks=(tokens, 1, 1),
        threads=width // 8,
        scalars=(eps,),
    )[0]
