"""The mixture of experts: a router chooses experts for each token, and their outputs are weighted and summed.

`dbrx_fn.ops.dispatch` sorts the tokens by expert and cuts them into segments.
"""

import mlx.core as mx
from jaxtyping import Float, UInt32

from dbrx_fn.model.config import FFNConfig
from dbrx_fn.model.layers.router import Routing, router
from dbrx_fn.model.shard import WHOLE, Shard
from dbrx_fn.model.tree import FFNParams
from dbrx_fn.ops.collectives import all_sum, sum_gradients
from dbrx_fn.ops.experts import mix_experts
from dbrx_fn.runtime.compile import compiled


@compiled
def moe(
    params: FFNParams,
    x: Float[mx.array, "batch time d_model"],
    jitter_key: UInt32[mx.array, "2"] | None = None,
    *,
    config: FFNConfig,
    cached: bool = False,
    shard: Shard = WHOLE,
) -> tuple[Float[mx.array, "batch time d_model"], Routing]:
    """Sends each token through its chosen experts.

    Args:
        params: `router`, and the experts' matrices in `experts.mlp`.
        x: normalized activations.
        jitter_key: for the router's jitter. No jitter, if not given.
        config: how many experts a token goes to, and the activation.
        cached: whether there is a cache (`mix_experts`).
        shard: this process's part of every expert.

    Returns:
        The experts' output, and the routing of the `batch * time` tokens.
    """
    tokens = x.reshape(-1, x.shape[-1])
    expert_weights, logits, top_experts = router(params["router"], tokens, jitter_key, config=config)
    mixed = mix_experts(
        params["experts"]["mlp"],
        sum_gradients(tokens, shard.size),
        sum_gradients(expert_weights, shard.size),
        top_experts,
        activation=config.ffn_act_fn,
        cached=cached,
    )
    return all_sum(mixed, shard.size).reshape(x.shape), Routing(logits, top_experts)
