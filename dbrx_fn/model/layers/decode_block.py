"""`block` by CUDA kernels, for one token per sequence.

It computes what `block` computes by stock operations. One sequence takes nine kernel launches instead of about eighty.
Launches are what can be saved, since the bound is reading the weights (`docs/performance.md`). Each kernel's results
have the shapes that the next one reads, which saves reshapes.
"""

import mlx.core as mx

from dbrx_fn.model.cache import LayerCache, write
from dbrx_fn.model.config import NORM_EPS, LayerConfig
from dbrx_fn.model.layers.rotary import inverse_frequencies
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.positions import Positions
from dbrx_fn.model.tree import BlockParams
from dbrx_fn.ops.collectives import all_sum
from dbrx_fn.ops.formats import is_adapted
from dbrx_fn.ops.kernels import combine, decode_attention, experts, linears, norm_router, project_qkv


def fits(
    params: BlockParams,
    x: mx.array,
    cache: LayerCache | None,
    positions: Positions,
    jitter_key: mx.array | None = None,
    *,
    config: LayerConfig,
) -> bool:
    """Whether this is one token of each of few sequences, with a cache, and kernels exist for every part."""
    batch, time, _ = x.shape
    slots = positions["slots"]
    if time != 1 or batch > linears.FEW_ROWS or slots is None or slots["kept"] is not None:
        return False
    attn, ffn, top_k = params["norm_attn_norm"]["attn"], params["ffn"], config.ffn.moe_top_k
    jitters = jitter_key is not None and config.ffn.moe_jitter_eps
    return (
        not jitters
        and not any(map(is_adapted, (attn["Wqkv"], attn["out_proj"], ffn["router"]["layer"])))
        and linears.fits(attn["Wqkv"], x)
        and linears.fits(attn["out_proj"], x[..., : config.sizes["heads"]])
        and experts.fits(ffn["experts"]["mlp"], x.dtype, activation=config.ffn.ffn_act_fn, top_k=top_k, tokens=batch)
        and "scales" not in ffn["router"]["layer"]
        and project_qkv.fits(head_dim=config.head_dim, dtype=x.dtype)
        and decode_attention.fits(head_dim=config.head_dim, dtype=x.dtype)
        and norm_router.fits(d_model=config.d_model, experts=config.ffn.moe_num_experts, dtype=x.dtype)
        and combine.fits(d_model=config.d_model, top_k=top_k, dtype=x.dtype)
    )


def decode_block(
    params: BlockParams,
    x: mx.array,
    cache: LayerCache | None,
    positions: Positions,
    jitter_key: mx.array | None = None,
    *,
    config: LayerConfig,
) -> tuple[mx.array, LayerCache | None, Routing]:
    """`dbrx_fn.model.layers.block.block`, for arguments that `fits` accepts."""
    first, ffn, slots = params["norm_attn_norm"], params["ffn"], positions["slots"]
    assert cache is not None
    assert slots is not None
    q, k, v = project_qkv.project_qkv(
        first["norm_1"]["weight"],
        first["attn"]["Wqkv"],
        x,
        slots["starts"],
        inverse_frequencies(config.head_dim, config.attn.rope_theta),
        eps=NORM_EPS,
        kv_n_heads=config.local_kv_heads,
        head_dim=config.head_dim,
        clip=config.attn.clip_qkv,
    )
    keys, values = write(cache[0], k, slots["index"], None), write(cache[1], v, slots["index"], None)
    attended = decode_attention.decode_attention(q, keys, values, slots["starts"])
    # The kernels add the residual stream to a product. Among several processes only one adds it.
    adds, processes = config.shard.rank == 0, config.shard.size
    residual = all_sum(linears.linear(first["attn"]["out_proj"], attended, residual=x if adds else None), processes)
    normed, expert_weights, logits, top_experts = norm_router.norm_router(
        residual,
        first["norm_2"]["weight"],
        ffn["router"]["layer"]["weight"],
        eps=NORM_EPS,
        top_k=config.ffn.moe_top_k,
        order=config.ffn.moe_normalize_expert_weights,
    )
    mixed = experts.mix_experts(ffn["experts"]["mlp"], normed, expert_weights, top_experts, residual if adds else None)
    return all_sum(mixed.reshape(x.shape), processes), (keys, values), Routing(logits, top_experts)
