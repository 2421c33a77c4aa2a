"""Training losses: cross-entropy, and the routers' load-balancing loss and z-loss.

A router that is only trained to predict sends most tokens to a few experts, which then learn fastest. The
load-balancing loss works against that (Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6). For one
layer with E experts and K choices per token it is

    load_balance = E * sum over e of f_e * P_e

f_e is the share of (token, choice) pairs that went to expert e. P_e is the router's probability for it, averaged over
tokens. The loss is 1 at perfect balance, and nears E / K when all tokens go to the same experts. f_e has no gradient.
The gradient lowers P_e for experts with a large f_e. The loss is averaged over layers and multiplied by
`moe_loss_weight`, so the weight means the same for every depth, batch, and number of experts and choices. This is
MegaBlocks' form, with which DBRX was trained
(https://github.com/databricks/megablocks/blob/main/megablocks/layers/moe.py, `batched_load_balancing_loss`). Other
implementations scale it differently, so their weights don't carry over:

- transformers 5.23 counts choices per token instead of their share, so its loss is K at perfect balance, 4 for DBRX. It
  averages f and P over layers before it multiplies them, so two layers with opposite imbalance look balanced.
- The reference (modeling_dbrx.py of databricks/dbrx-instruct) does the same and takes the softmax twice. Its P is a
  softmax of probabilities, which is nearly flat, so its gradient is weak.

The z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5) is optional. It keeps the router's logits small, so a
softmax in low precision stays exact.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32
from numpy.typing import ArrayLike

from dbrx_fn.errors import InputError
from dbrx_fn.model.argument_checks import check_key, check_tree
from dbrx_fn.model.config import Config
from dbrx_fn.model.partition import joined
from dbrx_fn.model.transformer import run_sequences
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.compile import compiled
from dbrx_fn.training.target_nats import target_nats


class LossParts(NamedTuple):
    """The parts of a loss, and its tokens' routing. All are float32.

    `cross_entropy`: nats per target token.
    `load_balance`: mean over layers. 1 at perfect balance.
    `router_z`: mean over layers and tokens of the squared log-sum-exp of the router's logits.
    `expert_share`: `[layer expert]`, the share of (token, choice) pairs that each expert got. Rows add up to 1.
    `expert_probability`: `[layer expert]`, the router's mean probability for each expert. Rows add up to 1.
    """

    cross_entropy: mx.array
    load_balance: mx.array
    router_z: mx.array
    expert_share: mx.array
    expert_probability: mx.array


@checked
def loss(
    params: Params,
    tokens: mx.array,
    mask: mx.array | None,
    config: Config,
    *,
    lengths: mx.array | None = None,
    jitter_key: mx.array | None = None,
    z_loss_weight: float = 0.0,
    recompute: bool = False,
    frozen: Params | None = None,
) -> tuple[mx.array, LossParts]:
    """`cross_entropy + moe_loss_weight * load_balance + z_loss_weight * router_z`, and these parts.

    Its gradient with respect to `params`: `mx.value_and_grad(dbrx_fn.loss)(params, tokens, mask, config)`.

    Args:
        params: the tree, or a part of it. Quantized matrices have no gradient; all other leaves have one.
        tokens: integer `[batch time]`, at least two per row. Each is predicted from those before it in its row. An id
            outside of the vocabulary makes the loss NaN, except in padding.
        mask: bool `[batch time]`, true for targets. All, if `None`. The first token of a row is never a target.
        config: the model's, with `moe_loss_weight` and `moe_jitter_eps`.
        lengths: int32 `[batch]`, how many of each row's tokens are real, counted from the left. All, if not given. The
            rest is padding. Padding is never a target. Neither padding nor a row's last token, which predicts nothing,
            counts in the routing.
        jitter_key: an `mx.random.key` for the routers' jitter. No jitter, if not given.
        z_loss_weight: weight of the z-loss. ST-MoE's is 0.001.
        recompute: gradient checkpointing, as in `score`.
        frozen: the tree's other leaves, if `params` is a part (`dbrx_fn.model.partition`).

    Returns:
        The loss, a float32 scalar, and its parts.

    Raises:
        InputError: if an argument has another type or shape.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_tree(params)
    check_batch(tokens, mask, lengths)
    if jitter_key is not None:
        check_key("jitter_key", jitter_key)
    if lengths is not None:
        tokens = mx.where(mx.arange(tokens.shape[1], dtype=mx.int32) < lengths[:, None], tokens, 0)
    whole = params if frozen is None else joined(params, frozen, config)
    x, routing = run_sequences(whole, tokens[:, :-1], config, jitter_key=jitter_key, recompute=recompute, frozen=frozen)
    nats = target_nats(params, x, tokens[:, 1:], config=config.layer, frozen=frozen)
    parts = loss_parts(nats, routing.logits, routing.top_experts, mask, lengths)
    total = parts.cross_entropy + config.ffn.moe_loss_weight * parts.load_balance + z_loss_weight * parts.router_z
    return total, parts


@compiled
def loss_parts(
    nats: Float32[mx.array, "batch time"],
    router_logits: Float32[mx.array, "layer batch time expert"],
    top_experts: UInt32[mx.array, "layer batch time top_k"],
    mask: Bool[mx.array, "batch time+1"] | None,
    lengths: Int32[mx.array, " batch"] | None,
) -> LossParts:
    """The parts of `loss`, from the targets' nats and the routing of each row without its last token."""
    batch, time = nats.shape
    last = mx.full(batch, time + 1, mx.int32) if lengths is None else lengths
    # A row's last token predicts nothing, so it doesn't count, with or without padding behind it.
    has_next = mx.arange(1, time + 1, dtype=mx.int32) < last[:, None]
    predicted = has_next if mask is None else has_next & mask[:, 1:]
    cross_entropy = mx.where(predicted, nats, 0).sum() / mx.maximum(predicted.sum(), 1)

    read = has_next.astype(mx.float32)
    probability = _mean_over_tokens(mx.softmax(router_logits, axis=-1), read)
    experts = router_logits.shape[-1]
    chosen = chosen_experts(top_experts, experts).astype(mx.float32).mean(axis=-2)
    share = mx.stop_gradient(_mean_over_tokens(chosen, read))
    load_balance = experts * (share * probability).sum(axis=-1).mean()
    router_z = _mean_over_tokens(mx.logsumexp(router_logits, axis=-1, keepdims=True).square(), read).mean()
    return LossParts(cross_entropy, load_balance, router_z, share, probability)


def chosen_experts(
    top_experts: UInt32[mx.array, "*token top_k"], experts: int
) -> Bool[mx.array, "*token top_k expert"]:
    """The choices one-hot: for each choice, true at the chosen one of `experts` experts."""
    chosen: mx.array = top_experts[..., None] == mx.arange(experts, dtype=top_experts.dtype)
    return chosen


def busiest_expert(expert_share: mx.array | ArrayLike) -> float:
    """The busiest expert's load, over all layers, as a multiple of its fair share. 1 at perfect balance.

    `expert_share`: `[layer expert]`. Rows add up to 1.
    """
    share = np.array(expert_share)
    return float(share.max() * share.shape[-1])


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """Bits per byte of a text of `tokens` tokens and `text_bytes` bytes (at least one), from `nats` per token."""
    return nats * tokens / (math.log(2) * text_bytes)


def check_batch(tokens: mx.array, mask: mx.array | None, lengths: mx.array | None = None) -> None:
    """Raises `InputError` unless these arguments are as `loss` takes them."""
    shape = list(tokens.shape) if isinstance(tokens, mx.array) else []
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(
            f"tokens is {_kind(tokens)} where integers [batch time], at least 1 row of 2 tokens, are expected."
        )
    if mask is not None and (not isinstance(mask, mx.array) or (list(mask.shape), mask.dtype) != (shape, mx.bool_)):
        raise InputError(f"mask is {_kind(mask)} where bool {shape}, the shape of tokens, is expected.")
    if lengths is not None and (
        not isinstance(lengths, mx.array) or (list(lengths.shape), lengths.dtype) != (shape[:1], mx.int32)
    ):
        raise InputError(f"lengths is {_kind(lengths)} where int32 {shape[:1]}, one a row, is expected.")


def _mean_over_tokens(
    values: Float32[mx.array, "layer batch time wide"], read: Float32[mx.array, "batch time"]
) -> Float32[mx.array, "layer wide"]:
    """The mean over the tokens where `read` is 1."""
    return (values * read[..., None]).sum(axis=(1, 2)) / mx.maximum(read.sum(), 1)


def _kind(value: object) -> str:
    if not isinstance(value, mx.array):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('mlx.core.')} {list(value.shape)}"
