"""What differs between MLX's back ends, and nothing else does: Metal, CUDA and the CPU."""

import mlx.core as mx
from jaxtyping import Float, Integer, Shaped, UInt32

from dbrx_fn.ops.formats import Format, dequantize_matrix
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.compile import typed


def segment_rows(rows: int, experts: int, dtype: mx.Dtype, quantization: Format | None = None) -> int:
    """How many rows one segment of the expert dispatch holds, for `rows` (token, choice) pairs over `experts`
    whose weights are of `dtype` (integers where they are quantized, as `quantization` says).

    A pure function of static facts. Long segments read an expert's weights less often; short ones pad less, since a
    half-empty segment costs as much as a full one and every expert can have one.

    Metal: 1, because MLX has a kernel there for sorted single rows (`gather_mm(sorted_indices=True)`).
    CUDA: few sizes, because MLX compiles a kernel for each on first use (6 to 20 s). 8 layers of the released widths
    in bfloat16 on one H200 (MLX 0.32.4), milliseconds by tokens and rows a segment:
        32 tokens: 1 row 91, 4 rows 29, 16 rows 20;  128: 16 rows 31, 64 rows 28;  512: 16 rows 90, 64 rows 52.
        On one H100, 65,536 pairs by 16 experts of 1792 x 2048, TFLOP/s: 64 rows 192, 128 rows 238, 256 rows 6. In
        float32, 128 rows take more shared memory than MLX's kernel may have ("invalid argument"; 64 fit exactly).
    CPU: the BLAS in MLX's wheel gains nothing from long segments, so padding is all loss until there is little of it
    (d_model 256, 16 experts, 4 of them; milliseconds for 32 tokens: 1 row 36, 16 rows 103; for 512: 611 and 620).
    OpenBLAS does (2 cores with AVX-512, 16 experts of 640 x 512; milliseconds for the three products and the gate,
    by tokens and rows a segment):
        16 tokens: 1 row 3.2, 16 rows 5.2;  32: 1 row 5.8, 16 rows 6.0;  128: 1 row 21, 16 rows 12.3, 32 rows 12.2;
        256: 16 rows 20.5, 32 rows 18.3, 64 rows 18.5;  512: 32 rows 30, 64 rows 28, 128 rows 35;
        2048: 32 rows 95, 64 rows 76, 128 rows 79;  with AVX2: 256: 19.7, 20.1, 23.5;  2048: 134, 115, 120.
    Quantized products, which are row by row, gain nothing.
    """
    average = rows // experts
    if backend() == "metal" or average == 0:
        return 1
    if backend() == "cuda":
        if average >= 1024 and dtype in (mx.bfloat16, mx.float16):
            return 128
        return 16 if average <= 16 else 64
    if FAST_BLAS is None:
        return 1 if average < 64 else 8
    if quantization is not None and not _is_dequantized(average, quantization):
        return 1
    if average < 64:
        return 1 if average < 8 else 16
    return 32 if average < 128 else 64


@typed
def grouped_matmul(
    x: Float[mx.array, "segments rows inner"],
    weight: Float[mx.array, "expert outer inner"],
    segment_experts: Integer[mx.array, " segments"],
) -> Float[mx.array, "segments rows outer"]:
    """`x[s] @ weight[segment_experts[s]].T` for every segment `s`; experts must ascend.

    A single expert is one dense product. The CPU back end's `gather_mm` knows float32 only, so other dtypes pass
    through it there.
    """
    dtype = x.dtype
    if backend() == "cpu":
        x, weight = x.astype(mx.float32), weight.astype(mx.float32)
    if weight.shape[0] == 1:
        return (x @ weight[0].T).astype(dtype)
    # Told that they ascend, MLX makes the weights' gradient expert by expert; else it makes a matrix for every segment.
    # On CUDA (MLX 0.32.4) single rows then take another kernel, which is slower and was seen to be wrong.
    ascending = backend() != "cuda" or x.shape[1] > 1
    product = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=segment_experts, sorted_indices=ascending)
    return product.astype(dtype)


@typed
def quantized_matmul(
    x: Float[mx.array, "*batch inner"],
    weight: UInt32[mx.array, "outer packed"],
    scales: Shaped[mx.array, "outer group"],
    biases: Float[mx.array, "outer group"] | None,
    quantization: Format,
) -> Float[mx.array, "*batch outer"]:
    """`x @ w.T`, with `w` `[outer inner]` what `mx.dequantize` makes of weight, scales and biases."""
    rows = x.size // x.shape[-1]
    if _is_dequantized(rows, quantization) or _has_no_kernel(rows, x.shape[-1], x.dtype, quantization):
        return (x.astype(mx.float32) @ _dequantized(weight, scales, biases, quantization).T).astype(x.dtype)
    product = mx.quantized_matmul(
        *_as_computed(x, weight, scales, biases),
        transpose=True,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
    )
    return product.astype(x.dtype)


@typed
def grouped_quantized_matmul(
    x: Float[mx.array, "segments rows inner"],
    weight: UInt32[mx.array, "expert outer packed"],
    scales: Shaped[mx.array, "expert outer group"],
    biases: Float[mx.array, "expert outer group"] | None,
    segment_experts: Integer[mx.array, " segments"],
    quantization: Format,
) -> Float[mx.array, "segments rows outer"]:
    """`grouped_matmul` by quantized weights; experts must ascend."""
    average = x.shape[0] * x.shape[1] // weight.shape[0]
    if _is_dequantized(average, quantization) or _has_no_kernel(x.shape[1], x.shape[2], x.dtype, quantization):
        return grouped_matmul(x, _dequantized(weight, scales, biases, quantization), segment_experts)
    product = mx.gather_qmm(
        *_as_computed(x, weight, scales, biases),
        rhs_indices=segment_experts,
        transpose=True,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        sorted_indices=backend() != "cuda",
    )
    return product.astype(x.dtype)


def _dequantized_from(quantization: Format) -> int | None:
    """From how many rows a matrix a dense product with floats made of it is faster; `None`: never.

    On a CPU with OpenBLAS it soon is, as MLX computes quantized products there row by row. 6 layers of d_model 512, 16
    experts of 640, milliseconds for prompts of 16, 32 and 64 tokens (4, 8, 16 rows) by quantized products, and for 64
    and 128 tokens by dense ones:
        affine 4 bits: 288, 563, 1127 and 363, 393;  6 bits: 288, 565, 1233 and 1590, 1680;
        mxfp4: 114, 223, 499 and 850, 885;  mxfp8: 579, 1141, 2288 and 273, 310.
    All of a layer's experts are floats at once then, 4 bytes a weight, for as long as one product takes.
    """
    if backend() != "cpu" or FAST_BLAS is None:
        return None
    if quantization.mode in ("mxfp4", "nvfp4"):
        return 32
    if quantization.mode == "mxfp8":
        return 3
    return 24 if quantization.bits in (3, 5, 6) else 6


def _is_dequantized(rows: int, quantization: Format) -> bool:
    least = _dequantized_from(quantization)
    return least is not None and rows >= least


def _has_no_kernel(rows: int, inner: int, dtype: mx.Dtype, quantization: Format) -> bool:
    """Whether MLX's CUDA kernels fail for so many rows in float32 (MLX 0.32.4, H100).

    Groups of 128, from 33 rows on: the kernel asks for more shared memory than it may have ("invalid argument").
    Affine 4 and 8 bits where a row of the matrix is one group: a kernel for Hopper GPUs takes those
    (`supports_qmm_sm90`), and what it writes in float32 is anything.
    """
    if backend() != "cuda" or dtype != mx.float32:
        return False
    one_group = quantization.mode == "affine" and quantization.bits in (4, 8) and inner <= quantization.group_size
    return one_group or (quantization.group_size == 128 and rows > 32)


def _dequantized(weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Format) -> mx.array:
    """float32, as the CPU's products are."""
    if biases is None:
        return dequantize_matrix([weight, scales], quantization, mx.float32)
    return dequantize_matrix([weight, scales.astype(mx.float32), biases.astype(mx.float32)], quantization, mx.float32)


def _as_computed(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None
) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """The operands in the dtypes that the back end computes quantized products in.

    The CPU's adds up in the operands' own dtype. 2048 x 2048 weights of 4 bits by one vector there: 33 ms and a
    relative error of 5e-2 in bfloat16, 186 ms and 6e-3 in float16, and by way of float32 4 ms and 2e-3 and 2e-4.
    """
    if backend() != "cpu":
        return x, weight, scales, biases
    # The scales of the modes without biases are packed, not numbers.
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return x.astype(mx.float32), weight, scales, biases
