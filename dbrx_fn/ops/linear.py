"""Matrix products with the tree's weights: `linear` for one matrix, `expert_linear` for segments and their experts.

A matrix is dense or quantized, and may have an adapter (`dbrx_fn.ops.formats`). Activations have gradients through all
of them. Of the leaves, dense weights and adapters have gradients.
"""

import mlx.core as mx
from jaxtyping import Float, Integer

from dbrx_fn.ops.formats import Linear, Matrices, Matrix, format_of, is_adapted, scaled
from dbrx_fn.ops.kernels import linears
from dbrx_fn.ops.kernels.cpu import products
from dbrx_fn.ops.quantized import as_floats, has_no_kernel, operands, pays_as_floats
from dbrx_fn.ops.twin import with_kernel
from dbrx_fn.runtime.compile import typed
from dbrx_fn.runtime.device import backend, on_cpu


def _has_kernel(params: Linear, x: mx.array) -> bool:
    # For a dense matrix cuBLAS is as fast.
    return "scales" in params and linears.fits(params, x)


@typed
def linear(params: Matrix, x: Float[mx.array, "*batch inner"]) -> Float[mx.array, "*batch outer"]:
    """`x` `[... inner]` times a matrix `[outer inner]`, as `[... outer]`, in `x`'s dtype.

    Raises:
        CheckpointError: if the matrix has an unknown quantized format.
    """
    product = _product(params, x)
    if not is_adapted(params):
        return product
    return product + scaled(x @ params["lora_a"].T, params["lora_scale"]) @ params["lora_b"].T


@with_kernel(products.linear, fits=products.fits, gradients=False)
@with_kernel(linears.linear, fits=_has_kernel)
def _product(params: Linear, x: mx.array) -> mx.array:
    """The product with the matrix alone."""
    if "scales" not in params:
        return x @ params["weight"].T
    inner = x.shape[-1]
    rows, form = x.size // inner, format_of(params, inner)
    if pays_as_floats(rows, form) or has_no_kernel(rows, inner, x.dtype, form):
        return (x.astype(mx.float32) @ as_floats(params, form).T).astype(x.dtype)
    product = mx.quantized_matmul(
        *operands(x, params),
        transpose=True,
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
    )
    return product.astype(x.dtype)


@typed
def expert_linear(
    params: Matrices,
    x: Float[mx.array, "segments rows inner"],
    segment_experts: Integer[mx.array, " segments"],
    *,
    cached: bool = False,
) -> Float[mx.array, "segments rows outer"]:
    """`x[s] @ matrix[segment_experts[s]].T` for each segment `s`, in `x`'s dtype.

    Args:
        params: matrices `[expert outer inner]`, dense or quantized. Each expert has its own adapter, if there are any.
            Scales that differ between rows are `[segments rows rank]`.
        x: the segments.
        segment_experts: each segment's expert, ascending.
        cached: whether there is a cache, so that no gradients are expected and a CPU's kernel may be used.

    Raises:
        CheckpointError: if the matrices have an unknown quantized format.
    """
    product = _expert_product(params, x, segment_experts, cached)
    if not is_adapted(params):
        return product
    narrow = _expert_product({"weight": params["lora_a"]}, x, segment_experts, cached)
    narrow = scaled(narrow, params["lora_scale"])
    return product + _expert_product({"weight": params["lora_b"]}, narrow, segment_experts, cached)


def _segments_kernel(params: Linear, x: mx.array, segment_experts: mx.array, cached: bool) -> mx.array:
    return linears.segments_linear(params, x, segment_experts)


def _has_segments_kernel(params: Linear, x: mx.array, segment_experts: mx.array, cached: bool) -> bool:
    return "scales" in params and linears.fits_segments(params, x)


@with_kernel(_segments_kernel, fits=_has_segments_kernel)
def _expert_product(params: Linear, x: mx.array, segment_experts: mx.array, cached: bool) -> mx.array:
    """The product with the matrices alone."""
    if cached and products.fits(params, x):
        return products.expert_linear(params, x, segment_experts)
    segments, rows, inner = x.shape
    experts = params["weight"].shape[0]
    weight = params["weight"]
    if "scales" in params:
        form = format_of(params, inner)
        average = segments * rows // experts
        if not (pays_as_floats(average, form) or has_no_kernel(rows, inner, x.dtype, form)):
            product = mx.gather_qmm(
                *operands(x, params),
                rhs_indices=segment_experts,
                transpose=True,
                group_size=form.group_size,
                bits=form.bits,
                mode=form.mode,
                # Without it, MLX adds the gradient's rows to zeros.
                sorted_indices=backend() != "cuda" or rows > 1,
            )
            return product.astype(x.dtype)
        weight = as_floats(params, form)
    given = x.dtype
    # On the CPU, `gather_mm` supports float32 only.
    dtype = mx.float32 if on_cpu() else x.dtype
    if experts == 1:
        return (x.astype(dtype) @ weight[0].astype(dtype).T).astype(x.dtype)
    # With `sorted_indices`, MLX computes the weights' gradient expert by expert. Without, it makes one matrix per
    # segment. But for single rows on CUDA, sorted indices select a kernel that is slower and was wrong for some
    # operands (MLX 0.32.4).
    ascending = backend() != "cuda" or rows > 1
    x, weight = _in_eights(x.astype(dtype)), _in_eights(weight.astype(dtype))
    product = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=segment_experts, sorted_indices=ascending)
    return product.astype(given)


def _in_eights(matrices: mx.array) -> mx.array:
    """Rows padded with zeros to a multiple of 8 entries on CUDA.

    The gradient's product reads 8 entries at a time along these rows, whatever their length (MLX 0.32.4). Any other
    length ends in a "misaligned address".
    """
    odd = -matrices.shape[-1] % 8 if backend() == "cuda" else 0
    return mx.pad(matrices, [(0, 0), (0, 0), (0, odd)]) if odd else matrices
