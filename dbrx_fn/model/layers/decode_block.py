"""The block for one token of each sequence on Hopper GPUs: of one sequence nine launches, of stock operations eighty.

What they compute is `dbrx_fn.model.layers.block`; that, by stock operations, is what runs everywhere else and what this is
tested against. Reading the weights is the bound, so all else has to be short: the host needs some 10 us for each
launch, 2 for an operation without one (kernels therefore take and make any shape), and the GPU 2 to 5 for each small
kernel, forty layers deep.
"""

from typing import Any

import mlx.core as mx

from dbrx_fn.model.cache import Window, write
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.rotary import inverse_frequencies
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.ops.kernels import combine, decode_attention, experts, linears, norm_router, project_qkv


def fits(params: dict[str, Any], x: mx.array, window: Window, jitter_key: mx.array | None, config: Config) -> bool:
    """Whether this is one token of few sequences, with a cache, and there are kernels for all of it."""
    batch, time, _ = x.shape
    if time != 1 or batch > linears.FEW_ROWS or window["slots"] is None or window["kept"] is not None:
        return False
    attn, ffn = params["norm_attn_norm"]["attn"], params["ffn"]
    jitters = jitter_key is not None and config.ffn.moe_jitter_eps
    return (
        not jitters
        and all(linears.fits(attn[name], x) for name in ("Wqkv", "out_proj"))
        and experts.fits(ffn["experts"]["mlp"], x.dtype, config.ffn)
        and "scales" not in ffn["router"]["layer"]
        and project_qkv.fits(head_dim=config.head_dim, dtype=x.dtype)
        and decode_attention.fits(head_dim=config.head_dim, dtype=x.dtype)
        and norm_router.fits(d_model=config.d_model, experts=config.ffn.moe_num_experts, dtype=x.dtype)
        and combine.fits(d_model=config.d_model, top_k=config.ffn.moe_top_k, dtype=x.dtype)
    )


def decode_block(
    params: dict[str, Any], x: mx.array, keys: mx.array, values: mx.array, window: Window, *, config: Config
) -> tuple[mx.array, mx.array, mx.array, Routing]:
    """`dbrx_fn.model.layers.block.block` where `fits` says so. MLX raises where a gradient is asked of it."""
    first, ffn = params["norm_attn_norm"], params["ffn"]
    offsets, slots = window["near_offsets"], window["slots"]
    assert offsets is not None
    assert slots is not None
    q, k, v = project_qkv.project_qkv(
        first["norm_1"]["weight"],
        first["attn"]["Wqkv"],
        x,
        offsets,
        inverse_frequencies(config.head_dim, config.attn.rope_theta),
        kv_n_heads=config.attn.kv_n_heads,
        head_dim=config.head_dim,
        clip=config.attn.clip_qkv,
    )
    keys, values = write(keys, k, slots, None), write(values, v, slots, None)
    attended = decode_attention.decode_attention(q, keys, values, offsets)
    residual = linears.linear(first["attn"]["out_proj"], attended, residual=x)
    normed, expert_weights, logits, top_experts = norm_router.norm_router(
        residual,
        first["norm_2"]["weight"],
        ffn["router"]["layer"]["weight"],
        top_k=config.ffn.moe_top_k,
        order=config.ffn.moe_normalize_expert_weights,
    )
    x = experts.mix_experts(ffn["experts"]["mlp"], normed, expert_weights, top_experts, residual)
    return x, keys, values, Routing(logits, top_experts)
