"""The least work that a model's steps take, counted from its config: operations, and bytes read from memory.

Over what a machine computes and reads in a second, these are bounds on the time of a step, whoever computes it
(`docs/bench.md`). Nothing is counted that an implementation could do without: activations, padding, a cache's free
positions, sorting, turning integers back into floats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import param_count, param_spec, quantized_spec
from dbrx_fn.ops.formats import Format

Formats = Mapping[str, Format]
"""Of the quantized matrices, by their paths; none, for a dense model."""


@dataclass(frozen=True)
class Work:
    """`operations`: floating-point, a multiplication and an addition being two. `bytes`: read or written once."""

    operations: int
    bytes: int

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine that computes and reads at once."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)

    def bound_by(self, operations_per_second: float, bytes_per_second: float) -> Literal["operations", "bytes"]:
        """Which of the two takes longer."""
        computing, reading = self.operations / operations_per_second, self.bytes / bytes_per_second
        return "operations" if computing > reading else "bytes"


def expected_experts(config: Config, tokens: int) -> float:
    """How many of a layer's experts `tokens` tokens need, if each expert is as likely as any other.

    A token goes past a given expert with probability 1 - k/E, and all of them do with (1 - k/E)^tokens.
    """
    experts, chosen = config.ffn.moe_num_experts, config.ffn.moe_top_k
    return experts * (1.0 - (1.0 - chosen / experts) ** tokens)


def weight_bytes(config: Config, formats: Formats) -> int:
    """Bytes of all weights: quantized matrices as they are stored, all else in the config's dtype."""
    return sum(leaf.nbytes(config.dtype) for leaf in quantized_spec(param_spec(config), formats).values())


def read_weight_bytes(config: Config, formats: Formats, tokens: int) -> int:
    """Bytes of the weights that a pass of `tokens` tokens needs: their experts, their rows of the embedding, the rest.

    Tokens are different ones, as long as the vocabulary has as many.
    """
    total = 0.0
    for path, leaf in quantized_spec(param_spec(config), formats).items():
        size = leaf.nbytes(config.dtype)
        if leaf.is_expert:
            total += size * expected_experts(config, tokens) / config.ffn.moe_num_experts
        elif ".wte." in path:
            total += size * min(tokens, config.vocab_size) / config.vocab_size
        else:
            total += size
    return round(total)


def cache_bytes(config: Config, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, in the config's dtype."""
    width = 2 * config.attn.kv_n_heads * config.head_dim
    return config.n_layers * tokens * width * int(getattr(mx, config.dtype).size)


def prefill_work(config: Config, formats: Formats, tokens: int) -> Work:
    """One prompt of `tokens` tokens, from an empty cache to the logits after its last token.

    Operations: 2 for each token and weight that it passes through, where the head's weights are for the last token
    only and the embedding's, which are looked up, for none; and 4 for each query, each key that it sees and each entry
    of d_model. Bytes: the weights once, and the keys and values that are written.
    """
    seen = tokens * (tokens + 1) // 2
    head = config.vocab_size * config.d_model
    operations = 2 * (tokens * _inner_weights(config) + head) + _attention_operations(config, seen)
    return Work(operations, read_weight_bytes(config, formats, tokens) + cache_bytes(config, tokens))


def decode_work(config: Config, formats: Formats, context: float, batch_size: int) -> Work:
    """One more token for each of `batch_size` sequences of `context` tokens.

    Operations: as in prefill, but that every token has its logits. Bytes: the weights that `batch_size` tokens need,
    and the keys and values of each sequence, the new one's included.
    """
    seen = batch_size * (context + 1)
    weights = _inner_weights(config) + config.vocab_size * config.d_model
    operations = 2 * batch_size * weights + _attention_operations(config, seen)
    cache = seen * cache_bytes(config, 1)
    return Work(round(operations), round(read_weight_bytes(config, formats, batch_size) + cache))


def training_operations(config: Config, sequence_length: int) -> int:
    """Floating-point operations that training takes per token: forward, and twice that backward.

    Each active parameter but the embedding's, which is looked up, is multiplied and added once: 2 operations forward.
    Attention multiplies each query with the keys before it, half of `sequence_length` on average, and sums as many
    values: 4 operations an entry of d_model and key.
    """
    matrices = param_count(config, active=True) - config.vocab_size * config.d_model
    attention = config.n_layers * 4 * config.d_model * sequence_length // 2
    return 3 * (2 * matrices + attention)


def _inner_weights(config: Config) -> int:
    """Weights of the layers that one token passes through."""
    return param_count(config, active=True) - 2 * config.vocab_size * config.d_model


def _attention_operations(config: Config, seen: float) -> int:
    """Of scores and of the values' sums, for `seen` pairs of a query and a key, in each layer."""
    return round(config.n_layers * 4 * config.d_model * seen)
