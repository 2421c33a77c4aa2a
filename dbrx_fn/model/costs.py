"""The least work that a model's steps need, counted from its config: operations, and bytes read from memory.

Divided by a machine's rates, these give lower bounds on a step's time for any implementation (`docs/bench.md`). They
leave out what an implementation could avoid: activations, padding, a cache's free positions, sorting, dequantizing. If
several processes share a model, they count one process's part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import param_count, param_spec, quantized_spec
from dbrx_fn.ops.formats import Format

Formats = Mapping[str, Format]
"""Formats of the quantized matrices, by their paths. A dense model has none."""


@dataclass(frozen=True)
class Work:
    """The work of one step.

    `operations`: floating-point operations. A multiplication and an addition are two.
    `bytes`: bytes that are read or written, each once.
    """

    operations: int
    bytes: int

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine that computes and reads at the same time."""
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)

    def bound_by(self, operations_per_second: float, bytes_per_second: float) -> Literal["operations", "bytes"]:
        """Which of the two takes longer."""
        computing, reading = self.operations / operations_per_second, self.bytes / bytes_per_second
        return "operations" if computing > reading else "bytes"


def expected_experts(config: Config, tokens: int) -> float:
    """Expected number of a layer's experts that `tokens` tokens use, if all experts are equally likely.

    With k of E experts chosen, one token misses a given expert with probability 1 - k/E. All tokens miss it with
    probability (1 - k/E)^tokens.
    """
    experts, chosen = config.ffn.moe_num_experts, config.ffn.moe_top_k
    return experts * (1.0 - (1.0 - chosen / experts) ** tokens)


def weight_bytes(config: Config, formats: Formats) -> int:
    """Bytes of all weights: quantized matrices as stored, everything else in the config's dtype."""
    return sum(leaf.nbytes(config.dtype) for leaf in quantized_spec(param_spec(config), formats).values())


def read_weight_bytes(config: Config, formats: Formats, tokens: int, *, last_only: bool = False) -> int:
    """Bytes of the weights that a pass of `tokens` tokens reads.

    That is their experts, their rows of the embedding, and all other weights. The tokens are taken to be distinct, as
    far as the vocabulary allows. With `last_only` the last layer's experts are those of one token.
    """
    total, last_layer = 0.0, f"transformer.blocks.{config.n_layers - 1}."
    for path, leaf in quantized_spec(param_spec(config), formats).items():
        size = leaf.nbytes(config.dtype)
        if leaf.is_expert:
            mixed = 1 if last_only and path.startswith(last_layer) else tokens
            total += size * expected_experts(config, mixed) / config.ffn.moe_num_experts
        elif ".wte." in path:
            total += size * min(tokens, config.vocab_size) / config.vocab_size
        else:
            total += size
    return round(total)


def cache_bytes(config: Config, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, in the config's dtype."""
    width = 2 * config.layer.local_kv_heads * config.head_dim
    return config.n_layers * tokens * width * int(getattr(mx, config.dtype).size)


def prefill_work(config: Config, formats: Formats, tokens: int) -> Work:
    """One prompt of `tokens` tokens, from an empty cache to the logits after its last token.

    Operations: 2 for each token and each weight that multiplies it. The head's weights multiply the last token only,
    and so do the last layer's, but for those of keys and values; the embedding's are looked up and count nothing.
    Attention adds 4 for each pair of a query and a key that it sees, times d_model. Bytes: the weights once, and the
    keys and values that are written.
    """
    inner, head, norm = _inner_weights(config), _head_weights(config), config.d_model
    keys_and_values = norm + 2 * config.layer.local_kv_heads * config.head_dim * config.d_model
    of_last_token = (inner - norm) // config.n_layers - keys_and_values + norm + head
    seen = (config.n_layers - 1) * (tokens * (tokens + 1) // 2) + tokens
    weights = tokens * (inner + head - of_last_token) + of_last_token
    operations = 2 * weights + _attention_operations(config, seen)
    read = read_weight_bytes(config, formats, tokens, last_only=True)
    return Work(operations, read + cache_bytes(config, tokens))


def decode_work(config: Config, formats: Formats, context: float, batch_size: int, together: int = 1) -> Work:
    """`together` more tokens for each of `batch_size` sequences of `context` tokens, in one step.

    Operations: as in prefill, except that every token has logits. Bytes: the weights that all new tokens need, and
    each sequence's keys and values once, including the new tokens'.
    """
    tokens = batch_size * together
    # The new tokens see those before the step, themselves, and the new ones before them.
    seen = tokens * (context + (together + 1) / 2)
    weights = _inner_weights(config) + _head_weights(config)
    operations = 2 * tokens * weights + _attention_operations(config, config.n_layers * seen)
    cache = batch_size * (context + together) * cache_bytes(config, 1)
    return Work(round(operations), round(read_weight_bytes(config, formats, tokens) + cache))


def training_operations(config: Config, sequence_length: int) -> int:
    """Floating-point operations of training per token: the forward pass, and twice that for the backward pass.

    Forward, each active parameter takes 2 operations, except for the embedding's, which are looked up. Attention
    multiplies each query with the keys before it (half of `sequence_length` on average) and sums as many values: 4
    operations per key and entry of d_model.
    """
    matrices = param_count(config, active=True) - _head_weights(config)
    attention = config.n_layers * 4 * config.layer.sizes["heads"] * sequence_length // 2
    return 3 * (2 * matrices + attention)


def _inner_weights(config: Config) -> int:
    """Number of weights in the layers that one token passes through, without the embedding and the head."""
    return param_count(config, active=True) - 2 * _head_weights(config)


def _head_weights(config: Config) -> int:
    """Number of the head's weights, which is that of the embedding's too."""
    return config.layer.sizes["vocab"] * config.d_model


def _attention_operations(config: Config, seen: float) -> int:
    """Operations of scores and weighted sums of values, for `seen` pairs of a query and a key in all layers."""
    return round(4 * config.layer.sizes["heads"] * seen)
