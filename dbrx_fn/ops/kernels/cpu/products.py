"""Rows times a matrix, or each segment's rows times its expert's, on a CPU. Quantized matrices are read as stored."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from dbrx_fn.ops.formats import LEAVES, Linear
from dbrx_fn.ops.kernels.cpu.library import Output, Twin, has_kernels, launch
from dbrx_fn.ops.kernels.cpu.matrix import leaves, matrix_numbers


def fits(matrix: Linear, x: mx.array) -> bool:
    """Whether the kernel takes this product."""
    inner = x.shape[-1]
    return x.dtype == mx.float32 and has_kernels() and matrix_numbers(matrix, inner) is not None


def linear(matrix: Linear, x: mx.array) -> mx.array:
    """`dbrx_fn.ops.linear.linear`, for arguments that `fits` accepts."""
    inner = x.shape[-1]
    numbers = matrix_numbers(matrix, inner)
    assert numbers is not None
    rows, outer = x.size // inner, numbers[3]
    twin = Twin(_stock, tuple(name for name in LEAVES if name in matrix))
    output = Output((*x.shape[:-1], outer), mx.float32)
    return launch("tiled_linear", [*leaves(matrix), x], [output], numbers=[*numbers, rows], twin=twin)[0]


def expert_linear(matrices: Linear, x: mx.array, segment_experts: mx.array) -> mx.array:
    """`dbrx_fn.ops.linear.expert_linear` without adapters, for a matrix and rows that `fits` accepts."""
    segments, rows, inner = x.shape
    numbers = matrix_numbers(matrices, inner)
    assert numbers is not None
    twin = Twin(_stock_of_experts, tuple(name for name in LEAVES if name in matrices))
    return launch(
        "tiled_expert_linear",
        [*leaves(matrices), x, segment_experts.astype(mx.int32)],
        [Output((segments, rows, numbers[3]), mx.float32)],
        numbers=[*numbers, segments, rows, matrices["weight"].shape[0]],
        twin=twin,
    )[0]


def _stock_of_experts(inputs: Sequence[mx.array], *names: str) -> list[mx.array]:
    from dbrx_fn.ops import linear as operations

    *parts, x, segment_experts = inputs
    matrices = cast(Linear, dict(zip(names, parts, strict=True)))
    return [operations.expert_linear(matrices, x, segment_experts)]


def _stock(inputs: Sequence[mx.array], *names: str) -> list[mx.array]:
    # Within a twin no kernel fits, so this is the stock product.
    from dbrx_fn.ops import linear as operations

    *parts, x = inputs
    return [operations.linear(cast(Linear, dict(zip(names, parts, strict=True))), x)]
