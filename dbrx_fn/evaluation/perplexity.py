"""Evaluates a model on a text: nats per token, bits per byte, and the experts' load."""

import math
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32
from numpy.typing import NDArray

from dbrx_fn.data.batches import eval_windows
from dbrx_fn.data.token_file import TokenFile, check_ids
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import run_sequences
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.compile import compiled
from dbrx_fn.runtime.memory import wired
from dbrx_fn.training.losses import bits_per_byte, busiest_expert, chosen_experts
from dbrx_fn.training.target_nats import target_nats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's results on a text.

    `nats_per_token`: mean over target tokens.
    `bits_per_byte`: the targets' bits divided by their bytes. It is comparable across tokenizers.
    `tokens`: number of targets.
    `expert_share`: float64 `[layer expert]`, the share of (token, choice) pairs that each expert got. Rows add up to 1.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    expert_share: NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        """e to the nats per token. Infinite beyond float's range."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def busiest_expert(self) -> float:
        """The busiest expert's load, over all layers, as a multiple of its fair share. 1 at perfect balance."""
        return busiest_expert(self.expert_share)


def evaluate(
    params: Params, config: Config, token_file: TokenFile, *, batch_size: int, sequence_length: int
) -> Evaluation:
    """Predicts every token of a file from the tokens before it in its window. Windows don't overlap.

    Args:
        params: the tree, dense or quantized.
        config: the model's.
        token_file: the text, in the model's tokens.
        batch_size: number of windows at a time.
        sequence_length: tokens per window. Longer windows give more context, so compare at the same length.

    Raises:
        InputError: if a size isn't positive, there is nothing to predict, or a token isn't in the model's vocabulary.
    """
    check_targets(token_file)
    check_ids(token_file, config)
    nats, targets = 0.0, 0
    pairs = np.zeros((config.n_layers, config.ffn.moe_num_experts))
    with wired(params):
        for tokens, mask, lengths in eval_windows(token_file, batch_size, sequence_length):
            targets += int(mask.sum())
            batch = mx.array(tokens), mx.array(mask), mx.array(lengths)
            window_nats, window_pairs = _score(params, *batch, config=config)
            nats += cast(float, window_nats.item())
            pairs += np.array(window_pairs)
    return of_sums(nats, pairs, targets, token_file)


def of_sums(nats: float, pairs: NDArray[np.float64], targets: int, token_file: TokenFile) -> Evaluation:
    """The evaluation from sums over a file's windows.

    Args:
        nats: the sum over all targets.
        pairs: `[layer expert]`, the number of (token, choice) pairs of each expert.
        targets: number of predicted tokens.
        token_file: the text.
    """
    return Evaluation(
        nats_per_token=nats / targets,
        bits_per_byte=bits_per_byte(nats / targets, targets, token_file.bytes),
        tokens=targets,
        expert_share=pairs / pairs.sum(axis=1, keepdims=True),
    )


def check_targets(token_file: TokenFile) -> None:
    """Raises `InputError` if a text has no targets, since everything to predict is empty."""
    if not token_file.bytes:
        raise InputError("The text has nothing to predict, only empty completions: give some that aren't.")


def window_sums(
    nats: Float32[mx.array, "batch time"],
    top_experts: UInt32[mx.array, "layer batch time top_k"],
    mask: Bool[mx.array, "batch time+1"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[Float32[mx.array, ""], Int32[mx.array, "layer expert"]]:
    """The sum of the targets' nats, and the number of (token, choice) pairs of each expert. Padding doesn't count.

    Args:
        nats: each target's, for each row without its first token.
        top_experts: the experts chosen for these tokens.
        mask: true for targets, from `dbrx_fn.data.batches.eval_windows`, like `lengths`.
        lengths: the number of real inputs in each row.
        config: the model's.
    """
    total = mx.where(mask[:, 1:], nats, 0).sum()
    chosen = chosen_experts(top_experts, config.ffn.moe_num_experts)
    chosen = chosen & read_tokens(lengths, nats.shape[1])[:, :, None, None]
    return total, chosen.astype(mx.int32).sum(axis=(1, 2, 3))


def read_tokens(lengths: Int32[mx.array, " batch"], time: int) -> Bool[mx.array, "batch time"]:
    """True for a row's real inputs, false for padding."""
    read: mx.array = mx.arange(time, dtype=mx.int32) < lengths[:, None]
    return read


@compiled
def _score(
    params: Params,
    tokens: Int32[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[Float32[mx.array, ""], Int32[mx.array, "layer expert"]]:
    """`window_sums` of a batch of windows."""
    x, routing = run_sequences(params, tokens[:, :-1], config)
    nats = target_nats(params, x, tokens[:, 1:], config=config.layer)
    return window_sums(nats, routing.top_experts, mask, lengths, config=config)
