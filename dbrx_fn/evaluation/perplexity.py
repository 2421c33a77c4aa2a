"""How well a model predicts a text: nats per token, bits per byte, and where its experts' work went."""

import math
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32
from numpy.typing import NDArray

from dbrx_fn.data.batches import eval_windows
from dbrx_fn.data.token_file import TokenFile, check_ids
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import score
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.compile import compiled
from dbrx_fn.runtime.memory import wired
from dbrx_fn.training.losses import bits_per_byte, busiest_expert, chosen_experts, token_nats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model made of a text.

    `nats_per_token`: mean over target tokens.
    `bits_per_byte`: all of the target tokens' bits over the bytes that they spell, so tokenizers can be compared.
    `tokens`: how many targets there were.
    `expert_share`: float64 `[layer expert]`, the share of (token, choice) pairs that each expert got; rows add up to 1.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    expert_share: NDArray[np.float64]

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model might as well have guessed; infinite past float's range."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def busiest_expert(self) -> float:
        """How many times its fair share the busiest expert of any layer got: 1 at perfect balance."""
        return busiest_expert(self.expert_share)


def evaluate(
    params: Params, config: Config, token_file: TokenFile, *, batch_size: int, sequence_length: int
) -> Evaluation:
    """Predicts every token of a file from those before it in its window; windows don't overlap.

    Args:
        params: the tree, dense or quantized.
        config: the model's.
        token_file: the text, in the model's own tokens.
        batch_size: windows at a time.
        sequence_length: tokens of a window. A longer one gives more to predict from, so compare at the same length.

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
    """The evaluation that sums over a file's windows make.

    Args:
        nats: of all targets together.
        pairs: `[layer expert]`, how many (token, choice) pairs went to each expert.
        targets: how many tokens were predicted.
        token_file: the text.
    """
    return Evaluation(
        nats_per_token=nats / targets,
        bits_per_byte=bits_per_byte(nats / targets, targets, token_file.bytes),
        tokens=targets,
        expert_share=pairs / pairs.sum(axis=1, keepdims=True),
    )


def check_targets(token_file: TokenFile) -> None:
    """Raises `InputError` if a text is only read, since all that was to be predicted of it is empty."""
    if not token_file.bytes:
        raise InputError("The text has nothing to predict, only empty completions: give some that aren't.")


def window_sums(
    logits: Float[mx.array, "batch time vocab"],
    top_experts: UInt32[mx.array, "layer batch time top_k"],
    tokens: Int32[mx.array, "batch time+1"],
    mask: Bool[mx.array, "batch time+1"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[Float32[mx.array, ""], Int32[mx.array, "layer expert"]]:
    """The sum of the targets' nats, and how many (token, choice) pairs each expert got; padding counts in neither.

    Args:
        logits: what `score` made of all tokens of a row but its last.
        top_experts: the experts that it chose for them.
        tokens: as of `dbrx_fn.data.batches.eval_windows`, as are `mask` and `lengths`.
        mask: which tokens are targets.
        lengths: how many of a row's inputs are read.
        config: the model's.
    """
    nats = mx.where(mask[:, 1:], token_nats(logits, tokens[:, 1:]), 0).sum()
    chosen = chosen_experts(top_experts, config.ffn.moe_num_experts)
    chosen = chosen & read_tokens(lengths, tokens.shape[1] - 1)[:, :, None, None]
    return nats, chosen.astype(mx.int32).sum(axis=(1, 2, 3))


def read_tokens(lengths: Int32[mx.array, " batch"], time: int) -> Bool[mx.array, "batch time"]:
    """Which of a row's `time` inputs are read: all but padding."""
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
    logits, routing = score(params, tokens[:, :-1], config)
    return window_sums(logits, routing.top_experts, tokens, mask, lengths, config=config)
