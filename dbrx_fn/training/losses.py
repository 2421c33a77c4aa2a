"""What training makes small: cross-entropy, and what keeps the experts evenly used.

A router that is only trained to predict well sends most tokens to few experts, which then learn fastest. The
load-balancing loss works against that (Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6). For
one layer with E experts,

    load_balance = E * sum over e of f_e * P_e

where f_e is the share of (token, choice) pairs that went to expert e, and P_e the mean over tokens of the router's
probability for it. At perfect balance it is 1, and when all tokens go one way it nears E / K. f_e has no gradient; P_e
has, and is pushed down where f_e is large. Here it is the mean over layers, and `moe_loss_weight` is its weight, so the
weight means the same for any depth, batch, number of experts or choices. That is MegaBlocks' form, with which DBRX was
trained (https://github.com/databricks/megablocks/blob/main/megablocks/layers/moe.py, `batched_load_balancing_loss`).
Others differ, and a weight can't be carried over without care:

- transformers 5.23 counts choices per token instead of their share, so its loss is K at perfect balance, 4 for DBRX;
  and it averages f and P over layers before it multiplies them, so that two layers which are unbalanced in opposite
  ways look balanced.
- The reference (modeling_dbrx.py of databricks/dbrx-instruct) is transformers' with the softmax taken twice: its P
  is a softmax of probabilities, which is nearly flat, and so is what pushes.

The z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5) is optional: it keeps the router's logits small, where
a softmax in low precision is exact.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Integer, UInt32
from mlx import nn
from numpy.typing import ArrayLike

from dbrx_fn.errors import InputError
from dbrx_fn.model.argument_checks import check_key, check_tree
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import score
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.bounded import within
from dbrx_fn.runtime.compile import compiled


class LossParts(NamedTuple):
    """What a loss is made of, and how its tokens were routed. All float32.

    `cross_entropy`: nats per target token.
    `load_balance`: mean over layers; 1 at perfect balance.
    `router_z`: mean over layers and tokens of the squared log-sum-exp of the router's logits.
    `expert_share`: `[layer expert]`, the share of (token, choice) pairs that each expert got; rows add up to 1.
    `expert_probability`: `[layer expert]`, the router's mean probability for each expert; rows add up to 1.
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
) -> tuple[mx.array, LossParts]:
    """`cross_entropy + moe_loss_weight * load_balance + z_loss_weight * router_z`, and those parts.

    Differentiate it with respect to `params`: `mx.value_and_grad(dbrx_fn.loss)(params, tokens, mask, config)`.

    Args:
        params: the tree; a quantized one has a loss and no gradient.
        tokens: integer `[batch time]`, at least two in a row; each is predicted from those before it in its row. An id
            outside of the vocabulary makes the loss NaN, except in padding.
        mask: bool `[batch time]`, which tokens are targets. All, if `None`; the first of a row never is.
        config: the model's, with `moe_loss_weight` and `moe_jitter_eps`.
        lengths: int32 `[batch]`, how many of each row's tokens are real, counted from the left; the rest is padding,
            which is no target and isn't counted in the routing, just as each row's last token, which predicts
            nothing. All of them, if not given.
        jitter_key: an `mx.random.key` for the routers' jitter; none, if not given.
        z_loss_weight: of the z-loss. ST-MoE's is 0.001.
        recompute: see `score`.

    Returns:
        The loss, a float32 scalar, and its parts.

    Raises:
        InputError: if an argument isn't what it is said to be here.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_tree(params)
    check_batch(tokens, mask, lengths)
    if jitter_key is not None:
        check_key("jitter_key", jitter_key)
    if lengths is not None:
        tokens = mx.where(mx.arange(tokens.shape[1], dtype=mx.int32) < lengths[:, None], tokens, 0)
    logits, routing = score(params, tokens[:, :-1], config, jitter_key=jitter_key, recompute=recompute)
    parts = loss_parts(logits, routing.logits, routing.top_experts, tokens[:, 1:], mask, lengths)
    total = parts.cross_entropy + config.ffn.moe_loss_weight * parts.load_balance + z_loss_weight * parts.router_z
    return total, parts


@compiled
def loss_parts(
    logits: Float[mx.array, "batch time vocab"],
    router_logits: Float32[mx.array, "layer batch time expert"],
    top_experts: UInt32[mx.array, "layer batch time top_k"],
    targets: Integer[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time+1"] | None,
    lengths: Int32[mx.array, " batch"] | None,
) -> LossParts:
    """The parts of `loss`, of what `score` made of all tokens of a row but its last; `targets`: all but its first."""
    batch, time = targets.shape
    last = mx.full(batch, time + 1, mx.int32) if lengths is None else lengths
    # A row's last token predicts nothing, so it isn't read, with padding behind it or without.
    has_next = mx.arange(1, time + 1, dtype=mx.int32) < last[:, None]
    predicted = has_next if mask is None else has_next & mask[:, 1:]
    nats = token_nats(logits, targets)
    cross_entropy = mx.where(predicted, nats, 0).sum() / mx.maximum(predicted.sum(), 1)

    read = has_next.astype(mx.float32)
    probability = _mean_over_tokens(mx.softmax(router_logits, axis=-1), read)
    experts = router_logits.shape[-1]
    chosen = chosen_experts(top_experts, experts).astype(mx.float32).mean(axis=-2)
    share = mx.stop_gradient(_mean_over_tokens(chosen, read))
    load_balance = experts * (share * probability).sum(axis=-1).mean()
    router_z = _mean_over_tokens(mx.logsumexp(router_logits, axis=-1, keepdims=True).square(), read).mean()
    return LossParts(cross_entropy, load_balance, router_z, share, probability)


def token_nats(
    logits: Float[mx.array, "batch time vocab"], targets: Integer[mx.array, "batch time"]
) -> Float32[mx.array, "batch time"]:
    """Minus the natural logarithm of each target's probability, in float32 whatever the logits' dtype.

    NaN for a target outside of the vocabulary.
    """
    ids, known = within(targets, logits.shape[-1])
    nats: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), ids)
    return mx.where(known, nats, mx.nan)


def chosen_experts(
    top_experts: UInt32[mx.array, "*token top_k"], experts: int
) -> Bool[mx.array, "*token top_k expert"]:
    """Which of the `experts` each choice is: true for that one."""
    chosen: mx.array = top_experts[..., None] == mx.arange(experts, dtype=top_experts.dtype)
    return chosen


def busiest_expert(expert_share: mx.array | ArrayLike) -> float:
    """How many times its fair share the busiest expert of any layer got: 1 at perfect balance.

    `expert_share`: `[layer expert]`, rows adding up to 1.
    """
    share = np.array(expert_share)
    return float(share.max() * share.shape[-1])


def bits_per_byte(nats: float, tokens: int, text_bytes: int) -> float:
    """`nats` per token, over `tokens` tokens that spell `text_bytes` bytes, at least one, as bits per byte."""
    return nats * tokens / (math.log(2) * text_bytes)


def check_batch(tokens: mx.array, mask: mx.array | None, lengths: mx.array | None = None) -> None:
    """Raises what `loss` says, where these aren't what it takes."""
    shape = list(tokens.shape) if isinstance(tokens, mx.array) else []
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(
            f"tokens is {_kind(tokens)} where integers [batch time] with at least 1 row of at least 2 are expected."
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
    """The mean over tokens that were `read`."""
    return (values * read[..., None]).sum(axis=(1, 2)) / mx.maximum(read.sum(), 1)


def _kind(value: object) -> str:
    if not isinstance(value, mx.array):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('mlx.core.')} {list(value.shape)}"
