"""The norm before the experts and the router after it, in one kernel.

Stock operations take eight launches for one token. Here logits stay in float32, while stock operations round them to
bfloat16. The experts are chosen by their logits.
"""

import mlx.core as mx
from jaxtyping import BFloat16, Float32, UInt32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, multiprocessors
from dbrx_fn.runtime.compile import typed


def fits(*, d_model: int, experts: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel supports these sizes. A wider row would leave each thread too few registers."""
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
        x: the residual stream, `[... d_model]`, one row per token.
        weight: the norm's weight.
        router: `[expert d_model]`.
        eps: the norm's epsilon.
        top_k: how many experts to choose.
        order: the p of the p-norm that divides the chosen experts' weights; `None` means no division.

    Returns:
        normed: `[tokens d_model]`.
        expert_weights: `[tokens + 1, top_k]`. The last row is undefined; it keeps a small array in the GPU's memory
            (`starts` in `dbrx_fn.model.positions.Slots`).
        logits: float32 `[tokens expert]`.
        top_experts: uint32 `[tokens top_k]`, ascending.
    """
    d_model = x.shape[-1]
    tokens = x.size // d_model
    experts = router.shape[0]
    # Several tokens share one read of the router, if there are more tokens than multiprocessors. Six spill registers.
    together = 1 if tokens <= multiprocessors() else 5
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
        # A single token's row is declared in the source. Each row has PITCH numbers of 2 bytes.
        shared_memory=together * (d_model + 32) * 2 if together > 1 else 0,
    )
    return normed, expert_weights, logits, top_experts
