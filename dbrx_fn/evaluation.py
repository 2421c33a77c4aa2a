"""How well a model predicts a text: nats per token, bits per byte, and where its experts' work went."""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float32, Int32
from numpy.typing import NDArray

from dbrx_fn.batches import eval_windows
from dbrx_fn.compile import compiled
from dbrx_fn.config import Config
from dbrx_fn.errors import InputError
from dbrx_fn.losses import bits_per_byte, busiest_expert, chosen_experts, token_nats
from dbrx_fn.model import score
from dbrx_fn.params import Params
from dbrx_fn.token_file import TokenFile


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
        InputError: if a size isn't positive, or there is nothing to predict.
    """
    check_targets(token_file)
    nats, targets = 0.0, 0
    pairs = np.zeros((config.n_layers, config.ffn.moe_num_experts))
    for tokens, mask, lengths in eval_windows(token_file, batch_size, sequence_length):
        targets += int(mask.sum())
        window_nats, window_pairs = _score(params, mx.array(tokens), mx.array(mask), mx.array(lengths), config=config)
        nats += cast(float, window_nats.item())
        pairs += np.array(window_pairs)
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


@compiled
def _score(
    params: dict[str, Any],
    tokens: Int32[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"],
    lengths: Int32[mx.array, " batch"],
    *,
    config: Config,
) -> tuple[Float32[mx.array, ""], Int32[mx.array, "layer expert"]]:
    """The sum of the targets' nats, and how many (token, choice) pairs each expert got; padding counts in neither."""
    logits, routing = score(params, tokens[:, :-1], config)
    nats = mx.where(mask[:, 1:], token_nats(logits, tokens[:, 1:]), 0).sum()
    read = mx.arange(tokens.shape[1] - 1, dtype=mx.int32) < lengths[:, None]
    chosen = chosen_experts(routing.top_experts, config.ffn.moe_num_experts) & read[:, :, None, None]
    return nats, chosen.astype(mx.int32).sum(axis=(1, 2, 3))
