"""Products of segments of rows with their experts' matrices.

There are three kernels. `short_segments` and `medium_segments` are bound by reading the weights, `long_segments` by
arithmetic; the last two are for Hopper GPUs only. All read weights as stored and convert them to bfloat16 in registers,
so a dequantized matrix is never written to memory. The `.cu` files say how. A single matrix is treated as one expert,
with row n in slot n.

In a segment, real rows come first, then padding. Results of padding are undefined.
"""

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.ops.dispatch import PackedDispatch
from dbrx_fn.ops.formats import Linear, Mode, format_of
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, multiprocessors, on_hopper

MEDIUM_ROWS, LONG_ROWS = 64, 256
"""The most rows of a medium and of a long segment. Short segments have 8 or 16."""
PADDED_ROWS = 8
"""Medium and long segments have a multiple of this many rows, with padding."""
MATRIX_ROWS = {"short": 16, "medium": 128, "long": 128}
"""The number of a matrix's rows must be a multiple of this. For gated matrices, half of it is enough."""
INNER = 128
"""The inner axis must be a multiple of this."""

_DENSE = 0
_QUANTIZED: dict[tuple[Mode, int], int] = {("affine", 4): 1, ("affine", 8): 2, ("mxfp4", 4): 3}
# Warps per block; blocks per multiprocessor; matrix rows in all segments from which blocks are twice as tall.
_SHORT_WARPS, _SHORT_BLOCKS, _TALL_FROM = 8, 3, 16384
# Shared memory of long segments: a pipeline of blocks of rows, and its barriers.
_STAGES, _STAGE_BYTES, _BARRIER_BYTES = 3, LONG_ROWS * 256, 128


@dataclass(frozen=True)
class Segments:
    """The plan of `dbrx_fn.ops.dispatch`, as short segments read it.

    `slot_pairs`: int32 `[segments * rows]`, the (token, choice) pair in each slot. Padding has numbers from `pairs` on.
    `experts`: int32 or uint32 `[segments]`, each segment's expert.
    `rows`: number of rows per segment.
    `pairs`: number of pairs, `top_k` for each token.
    """

    slot_pairs: mx.array
    experts: mx.array
    rows: int
    pairs: int
    top_k: int

    @property
    def count(self) -> int:
        """Number of segments."""
        return self.experts.size

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that a kernel reads."""
        return [self.slot_pairs, self.experts]


def kernel_format(params: Linear, inner: int) -> tuple[int, int] | None:
    """A matrix's FORMAT and GROUP in weights.cuh, or `None` if weights.cuh doesn't support it.

    Raises:
        CheckpointError: if the matrix has an unknown quantized format.
    """
    if "scales" not in params:
        return (_DENSE, INNER) if params["weight"].dtype == mx.bfloat16 else None
    form = format_of(params, inner)
    known = _QUANTIZED.get((form.mode, form.bits))
    if known is None or params["scales"].dtype not in (mx.bfloat16, mx.uint8):
        return None
    return known, form.group_size


def short_dense(x: mx.array, matrix: Linear, residual: mx.array | None = None) -> mx.array:
    """Few rows times one matrix: `x` `[... inner]` to bfloat16 `[... outer]`, plus `residual` if given."""
    inner, outer = x.shape[-1], matrix["weight"].shape[-2]
    tokens = x.size // inner
    rows = 8 if tokens <= 8 else 16
    return _short_segments(
        [x, *leaves(matrix), *_given(residual)],
        (*x.shape[:-1], outer),
        matrix,
        source="DENSE",
        sizes=(-(-tokens // rows), rows, inner, outer),
        scalars=(tokens, 1),
        residual=residual is not None,
    )


def short_gated(x: mx.array, gate: Linear, up: Linear, segments: Segments) -> mx.array:
    """`silu(gate x) * (up x)` for each slot's expert: tokens `x` `[tokens inner]` to bfloat16 `[slots outer]`."""
    return _short_segments(
        [x, *leaves(gate, up), *segments.arrays],
        (segments.count * segments.rows, gate["weight"].shape[-2]),
        gate,
        source="TOKENS",
        sizes=(segments.count, segments.rows, x.shape[-1], gate["weight"].shape[-2]),
        scalars=(segments.pairs, segments.top_k),
        gated=True,
    )


def short_slots(x: mx.array, matrix: Linear, segments: Segments) -> mx.array:
    """Slots `x` `[slots inner]` times their experts' matrices, as bfloat16 `[slots outer]`."""
    return _short_segments(
        [x, *leaves(matrix), *segments.arrays],
        (segments.count * segments.rows, matrix["weight"].shape[-2]),
        matrix,
        source="SLOTS",
        sizes=(segments.count, segments.rows, x.shape[-1], matrix["weight"].shape[-2]),
        scalars=(segments.pairs, segments.top_k),
    )


def short_mixed(
    x: mx.array, matrix: Linear, segments: Segments, expert_weights: mx.array, residual: mx.array | None = None
) -> mx.array:
    """The weighted sum of `short_slots` over the choices of a single token.

    Args:
        x: bfloat16 `[slots inner]`.
        matrix: the experts' matrices.
        segments: one for each choice.
        expert_weights: the weight of each choice.
        residual: added to the sum. The result has its shape, or `[1 outer]` without one.
    """
    outer = matrix["weight"].shape[-2]
    return _short_segments(
        [x, *leaves(matrix), *segments.arrays, expert_weights, *_given(residual)],
        (1, outer) if residual is None else residual.shape,
        matrix,
        source="SLOTS",
        sizes=(segments.count, segments.rows, x.shape[-1], outer),
        scalars=(segments.pairs, segments.top_k),
        mixed=True,
        residual=residual is not None,
    )


def _given(array: mx.array | None) -> list[mx.array]:
    return [] if array is None else [array]


def _short_segments(
    arrays: list[mx.array],
    shape: tuple[int, ...],
    matrix: Linear,
    *,
    source: Literal["DENSE", "TOKENS", "SLOTS"],
    sizes: tuple[int, int, int, int],
    scalars: tuple[int, int],
    gated: bool = False,
    mixed: bool = False,
    residual: bool = False,
) -> mx.array:
    """One launch of short_segments.cu. The options become its macros.

    Args:
        arrays: the inputs, in the kernel's order.
        shape: the result's shape.
        matrix: one of the matrices, for their format.
        source: how slots map to rows of activations.
        sizes: number of segments, rows per segment, inner and outer width.
        scalars: the number of pairs (or tokens), and of choices per token.
        gated: whether there are two matrices, gate and up.
        mixed: whether the segments' products are weighted and summed.
        residual: whether a residual is added.
    """
    count, rows, inner, outer = sizes
    height = 8 if gated else 16
    defines = format_defines(matrix, inner)
    # For 4 bits, a warp is faster with twice as many rows in flight, if there are enough rows for all multiprocessors.
    # Wider entries or 16 rows of x leave too few registers for that (docs/performance.md, section 4).
    four_bits = defines["FORMAT"] in (_QUANTIZED["affine", 4], _QUANTIZED["mxfp4", 4])
    enough = outer % (2 * height) == 0 and outer * count >= _TALL_FROM
    tall = 2 if four_bits and enough and rows == 8 and not mixed else 1
    # Mixed experts have too few blocks for that. There a warp has twice as much of each row in flight.
    depth = 2 if four_bits and mixed and inner % (2 * INNER) == 0 else 1
    defines |= {
        "WARPS": _SHORT_WARPS,
        "TALL": tall,
        "DEPTH": depth,
        "TILES": rows // 8,
        "BLOCKS": _SHORT_BLOCKS,
        "GATED": int(gated),
        "SOURCE": source,
        "MIXED": count if mixed else 0,
        "RESIDUAL": int(residual),
    }
    return launch(
        Kernel("short_segments", tuple(defines.items())),
        arrays,
        [(shape, mx.bfloat16)],
        blocks=(outer // (height * tall), 1 if mixed else count, 1),
        threads=32 * _SHORT_WARPS,
        scalars=(*scalars, inner, outer),
    )[0]


def pack_rows(x: mx.array, matrix: Linear, segments: PackedDispatch | None = None, *, rows: int) -> mx.array:
    """Permutes rows into the layout of `medium_segments` or `long_segments`, bfloat16 `[slots inner]` (pack_rows.cu).

    Args:
        x: bfloat16 `[tokens inner]`.
        matrix: the matrix of the product. Its format determines the order.
        segments: each row's experts; `None` for a single matrix.
        rows: the most rows of a segment, `MEDIUM_ROWS` or `LONG_ROWS`.
    """
    tokens, inner = x.shape
    defines = format_defines(matrix, inner) | {"DENSE": int(segments is None), "ROWS": rows}
    plan = [segments.pair_slots, segments.pair_segments, segments.first_slots] if segments else []
    return launch(
        Kernel("pack_rows", tuple(defines.items())),
        [x, *plan],
        [((segments.slots if segments else padded(tokens), inner), mx.bfloat16)],
        blocks=(tokens, 1, 1),
        threads=256,
        scalars=(segments.pair_slots.shape[1] if segments else 1, inner),
    )[0]


def padded(rows: int) -> int:
    """Rows with the padding of medium and long segments."""
    return -(-rows // PADDED_ROWS) * PADDED_ROWS


def takes_medium(matrix: Linear, inner: int) -> bool:
    """Whether medium segments suit a matrix: 4 bits, for which they were measured, on a Hopper GPU."""
    affine4 = _QUANTIZED["affine", 4]
    fits = matrix["weight"].shape[-2] % MATRIX_ROWS["medium"] == 0
    return on_hopper() and fits and (kernel_format(matrix, inner) or (None,))[0] == affine4


def medium_segments(
    packed: mx.array,
    *matrices: Linear,
    segments: PackedDispatch | None = None,
    tokens: int | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """`long_segments` for segments of at most `MEDIUM_ROWS` rows, and matrices that `takes_medium` accepts."""
    slots, inner = packed.shape
    outer, gated = matrices[0]["weight"].shape[-2], len(matrices) == 2
    count, blocks = segments.segment_experts.size if segments else -(-slots // MEDIUM_ROWS), inner // INNER
    # If all tiles of 64 rows can run at once, each takes a multiprocessor, whose groups divide the inner axis.
    divided = segments is None and outer // 64 * count <= multiprocessors() and blocks % 8 == 0
    groups, parts, stages, most_ahead = (4, 4, 3, 2) if divided else (2, 1, 4, 4)
    height = 64 * groups // parts
    defines = format_defines(matrices[0], inner) | {
        "ROWS": MEDIUM_ROWS,
        "GROUPS": groups,
        "PARTS": parts,
        "AHEAD": next(ahead for ahead in range(most_ahead, 0, -1) if blocks % (ahead * parts) == 0),
        "BLOCKS": 4 // groups,
        "GATED": int(gated),
        "DENSE": int(segments is None),
        "RESIDUAL": int(residual is not None),
        "STAGES": stages,
    }
    return launch(
        Kernel("medium_segments", tuple(defines.items())),
        [packed, *leaves(*matrices), *_plan_of(segments), *_given(residual)],
        [((slots if tokens is None else tokens, outer), mx.bfloat16)],
        blocks=(count * outer // (height // 2 if gated else height), 1, 1),
        threads=128 * groups,
        scalars=(tokens or slots, inner, outer),
        shared_memory=parts * stages * (MEDIUM_ROWS * 256 + 16),
    )[0]


def long_segments(
    packed: mx.array,
    *matrices: Linear,
    segments: PackedDispatch | None = None,
    tokens: int | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Packed rows times their matrices, as bfloat16 `[slots outer]`. A gated result is packed for another product.

    Args:
        packed: rows from `pack_rows`, or a gated product.
        matrices: one matrix; or gate and up, for `silu(gate x) * (up x)`.
        segments: each row's expert; `None` for a single matrix.
        tokens: for a single matrix, the number of real rows. The result has only these.
        residual: for a single matrix, `[tokens outer]` to add to the result.
    """
    slots, inner = packed.shape
    outer, gated = matrices[0]["weight"].shape[-2], len(matrices) == 2
    tiles, blocks = outer // (64 if gated else 128), inner // INNER
    count = segments.segment_experts.size if segments else -(-slots // LONG_ROWS)
    # bfloat16 leaves no registers for a second block ahead.
    most_ahead = 1 if matrices[0]["weight"].dtype == mx.bfloat16 else math.gcd(blocks, 4)
    defines = format_defines(matrices[0], inner) | {
        "GATED": int(gated),
        "DENSE": int(segments is None),
        "RESIDUAL": int(residual is not None),
        "STAGES": _STAGES,
        "AHEAD": min(2, most_ahead),
        "MOST_AHEAD": most_ahead,
    }
    return launch(
        Kernel("long_segments", tuple(defines.items())),
        [packed, *leaves(*matrices), *_plan_of(segments), *_given(residual)],
        [((slots if tokens is None else tokens, outer), mx.bfloat16)],
        blocks=(count * tiles, 1, 1),
        threads=384,
        scalars=(tokens or slots, count, inner, outer),
        shared_memory=_STAGES * _STAGE_BYTES + _BARRIER_BYTES,
    )[0]


def _plan_of(segments: PackedDispatch | None) -> list[mx.array]:
    return [] if segments is None else [segments.segment_experts, segments.first_slots]


def leaves(*matrices: Linear) -> list[mx.array]:
    """The arrays of matrices, in the order of MATRIX in weights.cuh."""
    parts = ((matrix["weight"], matrix.get("scales"), matrix.get("biases")) for matrix in matrices)
    return [leaf for leaves in parts for leaf in leaves if leaf is not None]


def format_defines(matrix: Linear, inner: int) -> dict[str, int | str]:
    """The macros of weights.cuh for a matrix that it supports."""
    known = kernel_format(matrix, inner)
    assert known is not None
    return dict(zip(("FORMAT", "GROUP"), known, strict=True))
