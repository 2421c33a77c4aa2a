"""Products of segments of rows with their experts' matrices, on Hopper GPUs.

Two kernels: `short_segments`, where the weights' bytes are the bound, and `long_segments`, where arithmetic is. Both
read weights as they are stored and make bfloat16 of them in registers, so a quantized matrix is never written out.
Their sources say how. A plain matrix is one expert, of which slot n is row n.

In a segment real rows come first, then padding, whose results are not written: they are anything.
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.ops.formats import Linear, Mode, format_of
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch

LONG_ROWS = 256
"""Rows of a long segment. Short ones have 8 or 16."""
MATRIX_ROWS = {"short": 16, "long": 128}
"""What the rows of a matrix must be a multiple of; of gated ones half of it is enough."""
INNER = 128
"""What the inner axis must be a multiple of."""

_DENSE = 0
_QUANTIZED: dict[tuple[Mode, int], int] = {("affine", 4): 1, ("affine", 8): 2, ("mxfp4", 4): 3}
# Warps of a block, blocks on a multiprocessor, rows of a matrix that are enough blocks even of twice the height.
_SHORT_WARPS, _SHORT_BLOCKS, _TALL_FROM = 8, 3, 16384
# Shared memory: blocks of rows on their way, and the gated products of half a block on theirs out.
_STAGES, _STAGE_BYTES, _OUTGOING_BYTES = 3, LONG_ROWS * 256, LONG_ROWS * 128


@dataclass(frozen=True)
class Segments:
    """What is where.

    `slot_pairs`: int32 `[segments * rows]`, the (token, choice) pair in each slot; from `pairs` on it is padding.
    `experts`: int32 or uint32, as many as there are segments.
    `rows`: of a segment.
    `pairs`: how many pairs there are, `top_k` for each token.
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
        """What a kernel reads of it."""
        return [self.slot_pairs, self.experts]


def kernel_format(params: Linear, inner: int) -> tuple[int, int] | None:
    """A matrix's FORMAT and GROUP as weights.cuh has them; `None` for those that it hasn't.

    Raises:
        CheckpointError: if the matrix is quantized in a way that isn't known.
    """
    if "scales" not in params:
        return (_DENSE, INNER) if params["weight"].dtype == mx.bfloat16 else None
    form = format_of(params, inner)
    known = _QUANTIZED.get((form.mode, form.bits))
    if known is None or params["scales"].dtype not in (mx.bfloat16, mx.uint8):
        return None
    return known, form.group_size


def short_dense(x: mx.array, matrix: Linear, residual: mx.array | None = None) -> mx.array:
    """Few rows times one matrix: `x` `[... inner]` to bfloat16 `[... outer]`, plus `residual` if there is one."""
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
    """`silu(gate x) * (up x)` by each slot's expert: tokens `x` `[tokens inner]` to bfloat16 `[slots outer]`."""
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
    """`short_slots` of a single token, each of whose choices has a segment, weighted and added up.

    Args:
        x: bfloat16 `[slots inner]`.
        matrix: the experts' matrices.
        segments: one for each choice.
        expert_weights: how much each choice counts.
        residual: added to the sum, which then has its shape; `[1 outer]` without.
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
    """One launch of short_segments.cu, whose macros the options are.

    Args:
        arrays: what it reads, in its order.
        shape: of what it writes.
        matrix: one of the matrices, for their format.
        source: what the rows of activations are.
        sizes: number of segments, rows of one, inner and outer width.
        scalars: the number of pairs (or tokens), and of choices to a token.
        gated: whether there are two matrices, gate and up.
        mixed: whether the segments' products are weighted and added up.
        residual: whether there is something to add to.
    """
    count, rows, inner, outer = sizes
    height = 8 if gated else 16
    defines = format_defines(matrix, inner)
    # Of 4 bits, a warp that has twice as many rows on their way is 1 to 3% faster, if there are enough for all
    # multiprocessors; wider entries or 16 rows of x leave it no registers for that (docs/performance.md, section 4).
    four_bits = defines["FORMAT"] in (_QUANTIZED["affine", 4], _QUANTIZED["mxfp4", 4])
    enough = outer % (2 * height) == 0 and outer * count >= _TALL_FROM
    tall = 2 if four_bits and enough and rows == 8 and not mixed else 1
    # Mixed experts' blocks are too few for that, so there a warp has twice as long rows on their way: 56 us for 61.
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


def pack_rows(x: mx.array, matrix: Linear, segments: Segments | None = None) -> mx.array:
    """Rows as `long_segments` wants them: bfloat16 `[segments * 256 inner]`, permuted in a way of its own.

    Args:
        x: bfloat16 `[tokens inner]`.
        matrix: by which they will be multiplied; its format decides on the order.
        segments: which row goes to which expert; none for a plain matrix.
    """
    tokens, inner = x.shape
    defines = format_defines(matrix, inner) | {"DENSE": int(segments is None)}
    slots = LONG_ROWS * (segments.count if segments else -(-tokens // LONG_ROWS))
    return launch(
        Kernel("pack_rows", tuple(defines.items())),
        [x, *([segments.slot_pairs] if segments else ())],
        [((slots, inner), mx.bfloat16)],
        blocks=(slots, 1, 1),
        threads=256,
        scalars=(segments.pairs if segments else tokens, segments.top_k if segments else 1, inner),
    )[0]


def long_segments(
    packed: mx.array, *matrices: Linear, segments: Segments | None = None, tokens: int | None = None
) -> mx.array:
    """Packed rows times their matrix: bfloat16 `[slots outer]`, or packed for another product if gated.

    Args:
        packed: what `pack_rows` made, or a gated product.
        matrices: one, or gate and up: then it is `silu(gate x) * (up x)`.
        segments: which row goes to which expert; none for a plain matrix.
        tokens: how many of the rows are real, for a plain matrix; its result has only those.
    """
    slots, inner = packed.shape
    outer, gated = matrices[0]["weight"].shape[-2], len(matrices) == 2
    defines = format_defines(matrices[0], inner) | {
        "GATED": int(gated),
        "DENSE": int(segments is None),
        "STAGES": _STAGES,
    }
    barriers = 16 * _STAGES
    return launch(
        Kernel("long_segments", tuple(defines.items())),
        [packed, *leaves(*matrices), *(segments.arrays if segments else ())],
        [((slots if tokens is None else tokens, outer), mx.bfloat16)],
        blocks=(slots // LONG_ROWS * (outer // (64 if gated else 128)), 1, 1),
        threads=384,
        scalars=(segments.pairs if segments else tokens or slots, slots // LONG_ROWS, inner, outer),
        shared_memory=_STAGES * _STAGE_BYTES + (_OUTGOING_BYTES if gated else 0) + barriers,
    )[0]


def leaves(*matrices: Linear) -> list[mx.array]:
    """Arrays of matrices, in the order of weights.cuh's MATRIX."""
    parts = ((matrix["weight"], matrix.get("scales"), matrix.get("biases")) for matrix in matrices)
    return [leaf for leaves in parts for leaf in leaves if leaf is not None]


def format_defines(matrix: Linear, inner: int) -> dict[str, int | str]:
    """The macros of weights.cuh, for a matrix that has a kernel."""
    known = kernel_format(matrix, inner)
    assert known is not None
    return dict(zip(("FORMAT", "GROUP"), known, strict=True))
