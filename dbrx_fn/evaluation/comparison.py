"""Compares checkpoints of one model with the first of them: their predictions, and their routing.

The quality of predictions is a rough measure of quantization, since errors that help by chance hide errors that hurt.
The Kullback-Leibler divergence compares the whole distribution at each token, and every change increases it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32
from numpy.typing import NDArray

from dbrx_fn.data.batches import eval_windows
from dbrx_fn.data.token_file import TokenFile, check_ids
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.perplexity import Evaluation, check_targets, of_sums, read_tokens, window_sums
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import score
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.compile import compiled
from dbrx_fn.runtime.memory import wired
from dbrx_fn.training.target_nats import token_nats

Progress = Callable[[int, int], None]
"""Called with the number of passes done (one batch through one model), and the number in all."""

_Sums = list[NDArray[np.float64]]


class Model(NamedTuple):
    """A parameter tree, dense or quantized, and its config."""

    params: Params
    config: Config


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model's results on a text, compared with the first model's.

    `evaluation`: the model's own evaluation.
    `kl_divergence`: KL(first || model) of the predicted distributions, in nats; mean over target tokens.
    `top1_agreement`: share of the target tokens for which both models have the same most likely token.
    `router_agreement`: float64 `[layer]`, share of the first model's chosen experts that the model chose too, in any
        order; mean over all tokens read. Two routers that choose K of E at random agree in K / E.
    """

    evaluation: Evaluation
    kl_divergence: float
    top1_agreement: float
    router_agreement: NDArray[np.float64]


def check_same_model(first: Config, other: Config, first_name: str, name: str) -> None:
    """Checks that two configs describe one model: all fields that logits depend on are equal, except the dtype.

    Raises:
        InputError: if a field differs. It names the field and both checkpoints.
    """
    fields, expected = _fields(other), _fields(first)
    for field, value in expected.items():
        if fields[field] != value:
            raise InputError(
                f"{name} has {field} {fields[field]} where {first_name} has {value}: compare checkpoints of one model."
            )


def compare(
    first: Model,
    others: Sequence[Model],
    token_file: TokenFile,
    *,
    batch_size: int,
    sequence_length: int,
    progress: Progress | None = None,
) -> tuple[Evaluation, list[Comparison]]:
    """Runs models over a text side by side, one batch at a time.

    Only the logits of the first model and of one other are in memory at a time. Results are computed from the logits in
    float32, for every dtype of the models.

    Args:
        first: the model to compare with.
        others: the other models. Their configs must pass `check_same_model`.
        token_file: the text, in the models' tokens.
        batch_size: number of windows at a time.
        sequence_length: tokens per window, as in `evaluate`.
        progress: called after each batch of each model.

    Returns:
        evaluation: the first model's.
        comparisons: those of the other models, in their order.

    Raises:
        InputError: if a size isn't positive, if there is nothing to predict, if a token isn't in the model's
            vocabulary, or if the configs describe different models.
    """
    _check_comparable(first, others, token_file)
    targets, read, done = 0, 0, 0
    of_first: _Sums = []
    of_others: list[_Sums] = [[] for _ in others]
    windows = -(-(len(token_file) - 1) // max(sequence_length, 1))
    passes = -(-windows // max(batch_size, 1)) * (1 + len(others))

    def passed() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    with wired([first.params, *(params for params, _ in others)]):
        for tokens, mask, lengths in eval_windows(token_file, batch_size, sequence_length):
            targets += int(mask.sum())
            read += int(lengths.sum())
            batch = mx.array(tokens), mx.array(mask), mx.array(lengths)
            logits, top_experts, nats, pairs = _score(first.params, *batch, config=first.config)
            of_first = _added(of_first, nats, pairs)
            passed()
            for number, (params, config) in enumerate(others):
                # Adding waits for the device, so one model's logits are freed before the next model's are made.
                compared = _compare(params, logits, top_experts, *batch, config=config)
                of_others[number] = _added(of_others[number], *compared)
                passed()

    def evaluation(nats: NDArray[np.float64], pairs: NDArray[np.float64]) -> Evaluation:
        return of_sums(float(nats), pairs, targets, token_file)

    return evaluation(*of_first), [
        Comparison(
            evaluation=evaluation(nats, pairs),
            kl_divergence=float(divergence) / targets,
            top1_agreement=float(same_token) / targets,
            router_agreement=same_experts / (read * first.config.ffn.moe_top_k),
        )
        for nats, pairs, divergence, same_token, same_experts in of_others
    ]


def _check_comparable(first: Model, others: Sequence[Model], token_file: TokenFile) -> None:
    check_targets(token_file)
    check_ids(token_file, first.config)
    for number, other in enumerate(others):
        check_same_model(first.config, other.config, "the first model", f"others[{number}]")


def kl_divergence(
    first: Float[mx.array, "*token vocab"], other: Float[mx.array, "*token vocab"]
) -> Float32[mx.array, "*token"]:
    """KL(first || other) of the distributions given by logits, in nats and float32."""
    first, other = first.astype(mx.float32), other.astype(mx.float32)
    first = first - mx.logsumexp(first, axis=-1, keepdims=True)
    other = other - mx.logsumexp(other, axis=-1, keepdims=True)
    divergence: mx.array = (mx.exp(first) * (first - other)).sum(axis=-1)
    return divergence


def experts_in_common(
    first: UInt32[mx.array, "*token top_k"], other: UInt32[mx.array, "*token top_k"]
) -> Int32[mx.array, "*token"]:
    """The number of experts in both choices, in any order."""
    common: mx.array = (first[..., :, None] == other[..., None, :]).astype(mx.int32).sum(axis=(-2, -1))
    return common


@compiled
def _score(
    params: Params,
    tokens: Int32[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[
    Float[mx.array, "batch time-1 {config.vocab_size}"],
    UInt32[mx.array, "layer batch time-1 top_k"],
    Float32[mx.array, ""],
    Int32[mx.array, "layer expert"],
]:
    """Logits, chosen experts, and `window_sums`."""
    logits, routing = score(params, tokens[:, :-1], config)
    nats = token_nats(logits, tokens[:, 1:])
    sums = window_sums(nats, routing.top_experts, mask, lengths, config=config)
    return logits, routing.top_experts, *sums


@compiled
def _compare(
    params: Params,
    first_logits: Float[mx.array, "batch time {config.vocab_size}"],
    first_experts: UInt32[mx.array, "layer batch time top_k"],
    tokens: Int32[mx.array, "batch time+1"],
    mask: Bool[mx.array, "batch time+1"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[
    Float32[mx.array, ""],
    Int32[mx.array, "layer expert"],
    Float32[mx.array, ""],
    Int32[mx.array, ""],
    Int32[mx.array, " layer"],
]:
    """`window_sums` of another model; then the sums of its divergence, its targets and its choices in common."""
    logits, routing = score(params, tokens[:, :-1], config)
    nats = token_nats(logits, tokens[:, 1:])
    sums = window_sums(nats, routing.top_experts, mask, lengths, config=config)
    targets = mask[:, 1:]
    divergence = mx.where(targets, kl_divergence(first_logits, logits), 0).sum()
    same_token = (logits.argmax(axis=-1) == first_logits.argmax(axis=-1)) & targets
    common = experts_in_common(first_experts, routing.top_experts)
    same_experts = mx.where(read_tokens(lengths, targets.shape[1]), common, 0).sum(axis=(1, 2))
    return *sums, divergence, same_token.astype(mx.int32).sum(), same_experts


def _added(sums: _Sums, *parts: mx.array) -> _Sums:
    """The sums with more parts added, in float64."""
    new = [np.array(part, np.float64) for part in parts]
    return [one + other for one, other in zip(sums, new, strict=True)] if sums else new


def _fields(config: Config) -> dict[str, object]:
    """The fields that logits depend on, by their names in config.json, without the dtype."""
    attn, ffn = config.attn, config.ffn
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "attn_config.kv_n_heads": attn.kv_n_heads,
        "attn_config.clip_qkv": attn.clip_qkv,
        "attn_config.rope_theta": attn.rope_theta,
        "ffn_config.moe_num_experts": ffn.moe_num_experts,
        "ffn_config.moe_top_k": ffn.moe_top_k,
        "ffn_config.ffn_hidden_size": ffn.ffn_hidden_size,
        "ffn_config.moe_normalize_expert_weights": ffn.moe_normalize_expert_weights,
        "ffn_config.ffn_act_fn": ffn.ffn_act_fn,
    }
