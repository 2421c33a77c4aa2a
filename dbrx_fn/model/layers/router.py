"""The router: chooses each token's experts and their weights.

The softmax over all experts comes first, the choice second. The chosen weights are then divided by their p-norm, with
p = `moe_normalize_expert_weights`; for p = 1 they sum to one. The softmax is computed in float32 for every dtype of
activations, as in the reference (https://huggingface.co/databricks/dbrx-instruct/blob/main/modeling_dbrx.py). In
bfloat16, close probabilities would become ties.

Jitter is for training. It multiplies each entry of the router's input by noise from [1 - eps, 1 + eps], so close
choices of experts are tried both ways (https://arxiv.org/abs/2101.03961, section 2.4). The experts read their input
without noise, as in the reference. (transformers 5.23 multiplies in place, so its experts see the noise.)
"""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32, UInt32

from dbrx_fn.model.config import FFNConfig
from dbrx_fn.model.tree import RouterParams
from dbrx_fn.ops.linear import linear
from dbrx_fn.runtime.compile import compiled


class Routing(NamedTuple):
    """A router's decisions, for losses and statistics.

    `logits`: float32 `[tokens expert]`, before the softmax.
    `top_experts`: uint32 `[tokens top_k]`, in no particular order. No gradient passes through the choice.
    """

    logits: mx.array
    top_experts: mx.array


@compiled
def router(
    params: RouterParams,
    x: Float[mx.array, "tokens d_model"],
    jitter_key: UInt32[mx.array, "2"] | None = None,
    *,
    config: FFNConfig,
) -> tuple[Float[mx.array, "tokens top_k"], Float32[mx.array, "tokens expert"], UInt32[mx.array, "tokens top_k"]]:
    """Chooses `moe_top_k` experts for each token.

    Args:
        params: `layer.weight` `[expert d_model]`.
        x: normalized activations.
        jitter_key: an `mx.random.key` for `moe_jitter_eps`. No jitter, if not given.
        config: number of experts, how many to choose, the norm of their weights, the jitter.

    Returns:
        expert_weights: the chosen experts' weights, in `x`'s dtype.
        logits, top_experts: the fields of a `Routing`.
    """
    dtype = x.dtype
    if jitter_key is not None and config.moe_jitter_eps:
        eps = config.moe_jitter_eps
        # The input stays float32 up to the logits: bfloat16 has only four numbers within 0.01 of 1.
        x = x * mx.random.uniform(1 - eps, 1 + eps, x.shape, mx.float32, jitter_key)
    logits = linear(params["layer"], x).astype(mx.float32)
    probabilities = mx.softmax(logits, axis=-1)
    last = config.moe_num_experts - config.moe_top_k
    top_experts = mx.stop_gradient(mx.argpartition(probabilities, kth=last, axis=-1)[:, last:])
    expert_weights = mx.take_along_axis(probabilities, top_experts, axis=-1)
    if config.moe_normalize_expert_weights is not None:
        norm = mx.linalg.norm(expert_weights, ord=config.moe_normalize_expert_weights, axis=-1, keepdims=True)
        expert_weights = expert_weights / norm
    return expert_weights.astype(dtype), logits, top_experts
