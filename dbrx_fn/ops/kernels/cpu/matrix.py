"""Which matrices the kernels for the CPU read, and how a kernel is told of one."""

from typing import cast

import mlx.core as mx

from dbrx_fn.ops.formats import LEAVES, Linear, format_or_problem, is_adapted

DTYPES = {mx.float32: 0, mx.bfloat16: 1, mx.float16: 2}
"""The numbers of float dtypes in C++ (`Kind` in weights.h)."""
MATRIX_NUMBERS = 5
"""How many numbers `matrix_numbers` returns."""
_AFFINE = {8: 3, 4: 4}
_MXFP4 = 5


def matrix_numbers(matrix: Linear, inner: int) -> tuple[int, ...] | None:
    """The numbers that describe a matrix to C++ (`MATRIX_NUMBERS` in weights.h); `None` if the kernels can't read it.

    Args:
        matrix: `[... outer inner]`: `weight`, and if it is quantized `scales` and perhaps `biases`.
        inner: its input width.
    """
    weight = matrix["weight"]
    if "scales" not in matrix:
        kind = DTYPES.get(weight.dtype)
        return None if kind is None else (kind, 0, 1, weight.shape[-2], inner)
    form = format_or_problem(cast(dict[str, mx.array], matrix), inner)
    if isinstance(form, str):
        return None
    if form.mode == "mxfp4":
        return _MXFP4, 0, form.group_size, weight.shape[-2], inner
    scale_kind = DTYPES.get(matrix["scales"].dtype)
    if form.mode != "affine" or form.bits not in _AFFINE or scale_kind is None:
        return None
    if "biases" not in matrix or matrix["biases"].dtype != matrix["scales"].dtype:
        return None
    return _AFFINE[form.bits], scale_kind, form.group_size, weight.shape[-2], inner


def adapter_numbers(matrix: Linear, batch: int) -> tuple[int, int] | None:
    """The numbers of its adapter, where a kernel takes adapters (`next_adapted` in weights.h).

    Args:
        matrix: as above, its leaves of the right shapes.
        batch: rows of the batch.

    Returns:
        The rank, 0 without an adapter, and whether scales differ between rows; `None` if they are another batch's.
    """
    if not is_adapted(matrix):
        return 0, 0
    scales = matrix["lora_scale"].shape
    return None if scales and scales[0] != batch else (matrix["lora_a"].shape[-2], len(scales) > 0)


def leaves(matrix: Linear) -> list[mx.array]:
    """A matrix's arrays, in the order in which kernels read them."""
    return [cast(dict[str, mx.array], matrix)[name] for name in LEAVES if name in matrix]
