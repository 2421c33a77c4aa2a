"""The norm before the experts and the router behind it, in one kernel.

Decoding one token, stock operations take eight launches for it. Logits stay in float32 from the sum on, where stock
ones are rounded to bfloat16, and the probabilities' order is that of the logits.
"""

import mlx.core as mx
from jaxtyping import BFloat16, Float32, UInt32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.runtime.compile import typed

_MULTIPROCESSORS = 132


def fits(*, d_model: int, experts: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel has these sizes. A wider model's block would have too few registers for a thread."""
    return dtype == mx.bfloat16 and d_model % 256 == 0 and d_model <= 6144 and experts <= 32


@typed
def norm_router(
    x: BFloat16[mx.array, "*batch d_model"],
    weight: BFloat16[mx.array, " d_model"],
    router: BFloat16[mx.array, "expert d_model"],
    *,
    eps: float,
    top_k: int,
    order: float | None,
) -> tuple[
    BFloat16[mx.array, "tokens d_model"],
    BFloat16[mx.array, "tokens_and_one {top_k}"],
    Float32[mx.array, "tokens expert"],
    UInt32[mx.array, "tokens {top_k}"],
]:
    """`layer_norm`, then `router` of its result.

    Args:
        x: the residual stream, `[... d_model]`; each row is a token.
        weight: of the norm.
        router: `[expert d_model]`.
        eps: of the norm.
        top_k: how many experts to choose.
        order: of the norm that the chosen experts' weights are divided by; nothing is, if `None`.

    Returns:
        normed: `[tokens d_model]`.
        expert_weights: `[tokens + 1, top_k]`; the last row is anything, and is there because of arrays of up to 8 bytes
            (`dbrx_fn.model.positions.Slots`).
        logits: float32 `[tokens expert]`.
        top_experts: uint32 `[tokens top_k]`, ascending.
    """
    d_model = x.shape[-1]
    tokens = x.size // d_model
    experts = router.shape[0]
    # Two of them share a block's reading of the router as soon as there are blocks for all multiprocessors.
    together = 1 if tokens <= _MULTIPROCESSORS else 2
    defines: dict[str, int | str] = {
        "WIDTH": d_model,
        "EXPERTS": experts,
        "TOP_K": top_k,
        "TOKENS": together,
        "NORM": "NONE" if order is None else "SUM" if order == 1 else "ORDER",
    }
    normed, expert_weights, logits, top_experts = launch(
        Kernel("norm_router", tuple(defines.items())),
        [x, weight, router],
        [
            ((tokens, d_model), mx.bfloat16),
            ((tokens + 1, top_k), mx.bfloat16),
            ((tokens, experts), mx.float32),
            ((tokens, top_k), mx.uint32),
        ],
        blocks=(-(-tokens // together), 1, 1),
        threads=d_model // 8,
        scalars=(tokens, eps, 1.0 if order is None else float(order)),
    )
    return normed, expert_weights, logits, top_experts
