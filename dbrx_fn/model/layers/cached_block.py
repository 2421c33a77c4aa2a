"""`block` by CUDA kernels, for tokens that are added to a cache.

It computes what `block` computes by stock operations. One token takes nine kernel launches instead of about eighty.
Few tokens are bound by reading the weights, so launches are what can be saved (`docs/performance.md`). One new token
of a sequence is the same case as several: each has a row of its own in every product. Many tokens have kernels for the
steps between the products. Each kernel's results have the shapes that the next one reads, which saves reshapes.
"""

import mlx.core as mx

from dbrx_fn.model.cache import LayerCache, write
from dbrx_fn.model.config import NORM_EPS, LayerConfig
from dbrx_fn.model.layers.rotary import inverse_frequencies
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.positions import Positions, Slots, pick
from dbrx_fn.model.tree import BlockParams, NormAttnNormParams
from dbrx_fn.ops.collectives import all_sum
from dbrx_fn.ops.formats import is_adapted
from dbrx_fn.ops.kernels import (
    chunk_attention,
    combine,
    decode_attention,
    experts,
    linears,
    norm_router,
    project_qkv,
    split_heads,
)
from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.norm import layer_norm


def fits(
    params: BlockParams,
    x: mx.array,
    cache: LayerCache | None,
    positions: Positions,
    jitter_key: mx.array | None = None,
    wanted: mx.array | None = None,
    *,
    config: LayerConfig,
) -> bool:
    """Whether there is a cache, and kernels exist for every part."""
    if positions["slots"] is None:
        return False
    batch, time, _ = x.shape
    tokens, top_k = batch * time, config.ffn.moe_top_k
    attn, ffn = params["norm_attn_norm"]["attn"], params["ffn"]
    jitters = jitter_key is not None and config.ffn.moe_jitter_eps
    return (
        not jitters
        and all(held.dtype == x.dtype for held in cache or ())
        and not any(map(is_adapted, (attn["Wqkv"], attn["out_proj"], ffn["router"]["layer"])))
        and linears.fits(attn["Wqkv"], x)
        and linears.fits(attn["out_proj"], x[..., : config.sizes["heads"]])
        and experts.fits(ffn["experts"]["mlp"], x.dtype, activation=config.ffn.ffn_act_fn, top_k=top_k, tokens=tokens)
        and "scales" not in ffn["router"]["layer"]
        and project_qkv.fits(head_dim=config.head_dim, dtype=x.dtype)
        and decode_attention.fits(head_dim=config.head_dim, dtype=x.dtype)
        and (time <= decode_attention.FEW_TOKENS or on_hopper())
        and norm_router.fits(d_model=config.d_model, experts=config.ffn.moe_num_experts, dtype=x.dtype)
        and combine.fits(d_model=config.d_model, top_k=top_k, dtype=x.dtype)
    )


def cached_block(
    params: BlockParams,
    x: mx.array,
    cache: LayerCache | None,
    positions: Positions,
    jitter_key: mx.array | None = None,
    wanted: mx.array | None = None,
    *,
    config: LayerConfig,
) -> tuple[mx.array, LayerCache | None, Routing]:
    """`dbrx_fn.model.layers.block.block`, for arguments that `fits` accepts."""
    first, ffn, slots = params["norm_attn_norm"], params["ffn"], positions["slots"]
    assert cache is not None
    assert slots is not None
    at_once = linears.is_short(first["attn"]["Wqkv"], x)
    q, k, v = (_queries_of_few if at_once else _queries_of_many)(first, x, slots, config)
    keys = write(cache[0], k, slots["index"], slots["kept"])
    values = write(cache[1], v, slots["index"], slots["kept"])
    starts = slots["starts"]
    if wanted is not None:
        x, q, starts = pick(x, wanted), pick(q, wanted), starts + mx.pad(wanted, (0, 3))
    few_of_each = x.shape[1] <= decode_attention.FEW_TOKENS
    attend = decode_attention.decode_attention if few_of_each else chunk_attention.chunk_attention
    attended = attend(q, keys, values, starts)
    out_proj = first["attn"]["out_proj"]
    # Products add the residual stream. Among several processes only one adds it.
    adds, processes = config.shard.rank == 0, config.shard.size
    if _are_few(x) or "scales" in out_proj:
        residual = linears.linear(out_proj, attended, residual=x if adds else None)
    else:
        projected = linear(out_proj, attended)
        residual = x + projected if adds else projected
    residual = all_sum(residual, processes)
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


def _are_few(x: mx.array) -> bool:
    batch, time, _ = x.shape
    return batch * time <= linears.FEW_ROWS


def _queries_of_few(
    params: NormAttnNormParams, x: mx.array, slots: Slots, config: LayerConfig
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of few tokens, in one launch or two."""
    return project_qkv.project_qkv(
        params["norm_1"]["weight"],
        params["attn"]["Wqkv"],
        x,
        slots["starts"],
        inverse_frequencies(config.head_dim, config.attn.rope_theta),
        eps=NORM_EPS,
        kv_n_heads=config.local_kv_heads,
        head_dim=config.head_dim,
        clip=config.attn.clip_qkv,
    )


def _queries_of_many(
    params: NormAttnNormParams, x: mx.array, slots: Slots, config: LayerConfig
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of many tokens, whose product is a kernel of its own."""
    weight, matrix = params["norm_1"]["weight"], params["attn"]["Wqkv"]
    if "scales" in matrix:
        projected = linears.normed_linear(weight, matrix, x, eps=NORM_EPS)
    else:
        projected = linear(matrix, layer_norm(weight, x, eps=NORM_EPS))
    return split_heads.split_heads(
        projected,
        slots["starts"],
        inverse_frequencies(config.head_dim, config.attn.rope_theta),
        kv_n_heads=config.local_kv_heads,
        head_dim=config.head_dim,
        clip=config.attn.clip_qkv,
    )
