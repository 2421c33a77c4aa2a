"""The mixture of experts: route, sort, cut into segments, multiply, put back, weigh and add.

Every (token, choice) pair is a row of work for one expert. Sorting the rows by expert makes each expert's rows
neighbours; cutting them into segments of a fixed number of rows, the last of each expert padded with zeros, gives
arrays whose shapes don't depend on what the router says. So one compiled graph serves every routing, and each
segment is one matrix product with one expert's weights:

    tokens     t0      t1      t2            2 choices each, 3 experts, segments of 2 rows
    choices    2 0     0 1     0 2
    sorted     t0 t1 t2 | t1 | t0 t2         expert 0 | expert 1 | expert 2
    segments   [t0 t1] [t2 .] [t1 .] [t0 t2] [. .] [. .]
    of expert     0       0      1      2      2     2

There are at most `rows // segment_rows + experts` segments, or as many as rows if that is fewer, and that is how many
are computed. With one row a segment this is the gather that decoding a single token wants; with long ones it is the
batched product that long prompts and training want. It is one plan for all of them, and gradients flow through it (the
choice of experts aside, which has none). On GPUs that `dbrx_fn.kernels` has kernels for, those carry it out.

This is dropless routing as in MegaBlocks (https://arxiv.org/abs/2211.15841), the library that DBRX was trained with: no
capacity factor, no dropped token. Its vocabulary is used here: `top_experts`, `expert_weights`, `tokens_per_expert`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer, UInt32

from dbrx_fn.model.config import Activation, FFNConfig
from dbrx_fn.model.layers.router import Routing, router
from dbrx_fn.ops.activations import sigmoid
from dbrx_fn.ops.bounded import within
from dbrx_fn.ops.dispatch import Dispatch, dispatch
from dbrx_fn.ops.formats import format_of
from dbrx_fn.ops.kernels import experts
from dbrx_fn.ops.linear import expert_linear
from dbrx_fn.ops.products import segment_rows
from dbrx_fn.ops.twin import with_gradients_of
from dbrx_fn.runtime.compile import compiled, typed


def _silu(x: mx.array) -> mx.array:
    return x * sigmoid(x)


ACTIVATIONS: dict[Activation, Callable[[mx.array], mx.array]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "sigmoid": sigmoid,
    "tanh": mx.tanh,
    "mish": nn.mish,
}
"""The gate's activation by the name that transformers has for it (`transformers.activations.ACT2FN`). `mlx.nn`'s
are compiled by themselves, which on the CPU is half a second of g++ for a kernel on first use; DBRX's own isn't."""


@compiled
def moe(
    params: dict[str, Any],
    x: Float[mx.array, "batch time d_model"],
    jitter_key: UInt32[mx.array, "2"] | None = None,
    *,
    config: FFNConfig,
    cached: bool = False,
) -> tuple[Float[mx.array, "batch time d_model"], Routing]:
    """Sends each token through its chosen experts and adds what they say, weighted.

    Args:
        params: `router` and `experts.mlp`, whose `w1` and `v1` are `[expert ffn_hidden d_model]` and `w2`
            `[expert d_model ffn_hidden]`.
        x: normalized activations.
        jitter_key: for the router's jitter; none, if not given.
        config: number of experts, how many a token goes to, the activation.
        cached: whether the tokens go into a cache (`mix_experts`).

    Returns:
        The experts' output, and what the router said of each of the `batch * time` tokens.
    """
    tokens = x.reshape(-1, x.shape[-1])
    expert_weights, logits, top_experts = router(params["router"], tokens, jitter_key, config=config)
    mixed = _mixed(params["experts"]["mlp"], tokens, expert_weights, top_experts, config=config, cached=cached)
    return mixed.reshape(x.shape), Routing(logits, top_experts)


@compiled
def mix_experts(
    params: dict[str, Any],
    x: Float[mx.array, "tokens d_model"],
    expert_weights: Float[mx.array, "tokens top_k"],
    top_experts: Integer[mx.array, "tokens top_k"],
    *,
    config: FFNConfig,
    cached: bool = False,
) -> Float[mx.array, "tokens d_model"]:
    """`moe` after its router: for any choice of experts, also one that names an expert twice.

    A token one of whose experts isn't among the config's becomes NaN.
    """
    chosen, known = within(top_experts, config.moe_num_experts)
    expert_weights = mx.where(known, expert_weights, mx.nan)
    return _mixed(params, x, expert_weights, chosen, config=config, cached=cached)


@typed
def _mixed(
    params: dict[str, Any],
    x: Float[mx.array, "tokens d_model"],
    expert_weights: Float[mx.array, "tokens top_k"],
    top_experts: Integer[mx.array, "tokens top_k"],
    *,
    config: FFNConfig,
    cached: bool,
) -> Float[mx.array, "tokens d_model"]:
    """`mix_experts` of experts that there are.

    Where there are kernels for these experts, they compute it, and a gradient is that of the stock operations, which
    then have to be run as well. So plain weights, which are what is trained, take kernels only with a cache behind
    (`cached`).
    """

    def by_kernels(params: dict[str, Any], x: mx.array, expert_weights: mx.array) -> mx.array:
        return experts.mix_experts(params, x, expert_weights, top_experts)

    def stock(params: dict[str, Any], x: mx.array, expert_weights: mx.array) -> mx.array:
        return in_segments(params, x, expert_weights, top_experts, config=config)

    quantized = "scales" in params["w1"]
    fits = expert_weights.dtype == x.dtype and experts.fits(params, x.dtype, config)
    if not (quantized or cached) or not fits:
        return stock(params, x, expert_weights)
    if quantized:
        return with_gradients_of(partial(stock, params), partial(by_kernels, params), x, expert_weights)
    return with_gradients_of(stock, by_kernels, params, x, expert_weights)


@typed
def in_segments(
    params: dict[str, Any],
    x: Float[mx.array, "tokens d_model"],
    expert_weights: Float[mx.array, "tokens top_k"],
    top_experts: Integer[mx.array, "tokens top_k"],
    *,
    config: FFNConfig,
) -> Float[mx.array, "tokens d_model"]:
    """`mix_experts` by stock operations."""
    w1 = params["w1"]
    quantization = format_of(w1, x.shape[-1]) if "scales" in w1 else None
    rows = segment_rows(top_experts.size, config.moe_num_experts, w1["weight"].dtype, quantization)
    plan = dispatch(top_experts, experts=config.moe_num_experts, rows=rows)
    segments = gather_segments(x, plan)
    gate = ACTIVATIONS[config.ffn_act_fn](expert_linear(params["w1"], segments, plan.segment_experts))
    up = expert_linear(params["v1"], segments, plan.segment_experts)
    down = expert_linear(params["w2"], gate * up, plan.segment_experts)
    return combine(down, expert_weights, plan)


@typed
def gather_segments(x: Float[mx.array, "tokens d_model"], plan: Dispatch) -> Float[mx.array, "segments rows d_model"]:
    """The rows of each segment. Padding is zeros, so that it can't overflow and spoil a gradient."""
    return cast(mx.array, _tokens_to_slots(x, plan.slot_pairs, plan.pair_slots))


@typed
def combine(
    down: Float[mx.array, "segments rows d_model"], expert_weights: Float[mx.array, "tokens top_k"], plan: Dispatch
) -> Float[mx.array, "tokens d_model"]:
    """Takes each pair's row out of its segment, and adds up each token's, weighted."""
    chosen = cast(mx.array, _slots_to_pairs(down, plan.slot_pairs, plan.pair_slots))
    return (chosen * expert_weights[..., None]).sum(axis=1)


# Of a gather MLX makes a scatter that adds, where rows wait for each other. But a pair knows its slot and a slot its
# pair, so the gradient can be gathered as well: a training step of 1.3B parameters takes 4% less time on an H100, of
# 4 layers of width 256 16%. Nor do sums depend on who comes first.


@mx.custom_function
def _tokens_to_slots(x: mx.array, slot_pairs: mx.array, pair_slots: mx.array) -> mx.array:
    return _rows_or_zeros(x, slot_pairs // pair_slots.shape[1])


@_tokens_to_slots.vjp
def _tokens_to_slots_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, slot_pairs, pair_slots = primals
    of_pairs = cotangent.reshape(-1, cotangent.shape[-1])[pair_slots]
    return of_pairs.sum(axis=1), mx.zeros_like(slot_pairs), mx.zeros_like(pair_slots)


@mx.custom_function
def _slots_to_pairs(down: mx.array, slot_pairs: mx.array, pair_slots: mx.array) -> mx.array:
    return down.reshape(-1, down.shape[-1])[pair_slots]


@_slots_to_pairs.vjp
def _slots_to_pairs_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, slot_pairs, pair_slots = primals
    of_slots = _rows_or_zeros(cotangent.reshape(-1, cotangent.shape[-1]), slot_pairs)
    return of_slots, mx.zeros_like(slot_pairs), mx.zeros_like(pair_slots)


def _rows_or_zeros(x: mx.array, slot_rows: mx.array) -> mx.array:
    """`x[slot_rows]`, with zeros where that is one past the last; segments of one row have no such slots."""
    if slot_rows.shape[1] > 1:
        x = mx.concatenate([x, mx.zeros((1, x.shape[1]), x.dtype)])
    return x[slot_rows]
