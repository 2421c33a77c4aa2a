"""The weighted sum of each token's expert outputs, optionally added to the residual stream.

It is computed in float32 and rounded once, in one launch. Stock operations gather, multiply, sum and add in bfloat16.
"""

import mlx.core as mx
from jaxtyping import BFloat16, Int32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.runtime.compile import typed

_THREADS = 128


def fits(*, d_model: int, top_k: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel supports these sizes."""
    return dtype == mx.bfloat16 and d_model % 8 == 0 and top_k <= 16


@typed
def combine(
    down: BFloat16[mx.array, "slots d_model"],
    pair_slots: Int32[mx.array, "tokens top_k"],
    expert_weights: BFloat16[mx.array, "tokens_or_more top_k"],
    residual: BFloat16[mx.array, "*batch d_model"] | None = None,
) -> BFloat16[mx.array, "... d_model"]:
    """`sum_k expert_weights[t, k] * down[pair_slots[t, k]]`, plus `residual` if given.

    Args:
        down: the experts' outputs, in slots.
        pair_slots: the slot of each of a token's choices.
        expert_weights: the weights of the choices. More rows may follow.
        residual: the stream to add to.

    Returns:
        `[tokens d_model]`, or `residual`'s shape.
    """
    tokens, top_k = pair_slots.shape
    d_model = down.shape[1]
    defines = {"TOP_K": top_k, "THREADS": _THREADS, "RESIDUAL": int(residual is not None)}
    (out,) = launch(
        Kernel("combine", tuple(defines.items())),
        [down, pair_slots, expert_weights, *([] if residual is None else [residual])],
        [((tokens, d_model) if residual is None else residual.shape, mx.bfloat16)],
        blocks=(-(-tokens * (d_model // 8) // _THREADS), 1, 1),
        threads=_THREADS,
        scalars=(tokens, d_model),
    )
    return out
