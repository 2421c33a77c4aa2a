"""Which experts a token goes to, and how much each of them counts.

Softmax over all experts comes first and the choice second; the chosen weights are then divided by their p-norm,
p = `moe_normalize_expert_weights`, so that for p = 1 they sum to one. The softmax is taken in float32 whatever the
activations' dtype, as in the reference
(https://huggingface.co/databricks/dbrx-instruct/blob/main/modeling_dbrx.py): in bfloat16 it makes ties of near ones.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, UInt32

from dbrx_fn.compile import compiled
from dbrx_fn.config import FFNConfig
from dbrx_fn.layers.linear import linear


@compiled
def router(
    params: dict[str, Any], x: Float[mx.array, "tokens d_model"], *, config: FFNConfig
) -> tuple[Float[mx.array, "tokens top_k"], UInt32[mx.array, "tokens top_k"]]:
    """Chooses `moe_top_k` experts for each token.

    Args:
        params: `layer.weight` `[expert d_model]`.
        x: normalized activations.
        config: number of experts, how many to choose, and the norm of their weights.

    Returns:
        expert_weights: in `x`'s dtype, in no particular order.
        top_experts: the experts they belong to. No gradient passes through the choice itself.
    """
    probabilities = mx.softmax(linear(params["layer"], x).astype(mx.float32), axis=-1)
    last = config.moe_num_experts - config.moe_top_k
    top_experts = mx.stop_gradient(mx.argpartition(probabilities, kth=last, axis=-1)[:, last:])
    expert_weights = mx.take_along_axis(probabilities, top_experts, axis=-1)
    if config.moe_normalize_expert_weights is not None:
        norm = mx.linalg.norm(expert_weights, ord=config.moe_normalize_expert_weights, axis=-1, keepdims=True)
        expert_weights = expert_weights / norm
    return expert_weights.astype(x.dtype), top_experts
