"""Up to the context's end logits are as exact as torch's own float32, since positions turn by the same angles.

64 tokens at once: of fewer, torch's products are more exact than those of most BLASes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.layers.rotary import inverse_frequencies
from dbrx_fn.model.transformer import forward
from tests.peers import reference
from tests.support.checkpoints import random_config
from tests.support.trees import Case, as_float64, case_of

Measured = Callable[[str, float], float]
Floats = NDArray[np.float64]

CONTEXT = 32_768
NEW = 64
SEEDS = range(4)


class ExactAngles(torch.nn.Module):  # type: ignore[misc]
    """Stands in for `DbrxRotaryEmbedding`: its frequencies, and all else in float64."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = torch_frequencies(head_dim, theta).double()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` int64 [batch time] -> cos and sin, float64 [batch time head_dim]."""
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def torch_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))


def far_case(seed: int, head_dim: int, theta: float) -> tuple[Case, np.random.Generator]:
    """A model of a long context and few layers."""
    rng = np.random.default_rng(seed)
    raw = random_config(rng) | {"d_model": 2 * head_dim, "n_heads": 2, "n_layers": 2, "max_seq_len": CONTEXT}
    raw["attn_config"] = {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": theta}
    return case_of(raw, rng), rng


def held(case: Case, start: int, rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Keys and values of each layer, as after `start` tokens."""
    shape = (2, 1, case.config.attn.kv_n_heads, start, case.config.head_dim)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(case.config.n_layers)]


def our_logits(case: Case, tokens: list[int], layers: list[NDArray[np.float32]]) -> Floats:
    start = layers[0].shape[3]
    room = [(0, 0), (0, 0), (0, NEW), (0, 0)]
    keys, values = (tuple(mx.pad(mx.array(layer[n]), room) for layer in layers) for n in (0, 1))
    cache = replace(init_cache(case.config, 1, start + NEW), lengths=(start,), keys=keys, values=values)
    return as_float64(forward(case.params, mx.array([tokens]), cache)[0][0])


def their_logits(model: Any, tokens: list[int], layers: list[NDArray[np.float32]]) -> Floats:
    cache, dtype = DynamicCache(), model.lm_head.weight.dtype
    for n, layer in enumerate(layers):
        cache.update(*(torch.from_numpy(part).to(dtype) for part in layer), n)
    positions = torch.arange(layers[0].shape[3], layers[0].shape[3] + len(tokens))[None]
    with torch.no_grad():
        made = model(torch.tensor([tokens]), past_key_values=cache, position_ids=positions, use_cache=True)
    logits: Floats = made.logits[0].double().numpy()
    return logits


@pytest.mark.parametrize("start", [0, 12_000, CONTEXT - NEW])
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 5e5), (64, 1e4)])
def test_far_positions_are_as_exact_as_torchs(head_dim: int, theta: float, start: int, measured: Measured) -> None:
    ours, theirs = np.zeros(2), np.zeros(2)
    for seed in SEEDS:
        case, rng = far_case(seed, head_dim, theta)
        layers, tokens = held(case, start, rng), rng.integers(case.config.vocab_size, size=NEW).tolist()
        single = their_logits(reference.transformers_model(case.raw, case.tensors), tokens, layers)
        model: Any = reference.transformers_model(case.raw, case.tensors, "float64")
        with_float32_angles = their_logits(model, tokens, layers)
        model.transformer.rotary_emb = ExactAngles(head_dim, theta)
        found = our_logits(case, tokens, layers)
        for n, expected in enumerate((with_float32_angles, their_logits(model, tokens, layers))):
            largest = np.abs(expected).max()
            ours[n] = max(ours[n], np.abs(found - expected).max() / largest)
            theirs[n] = max(theirs[n], np.abs(single - expected).max() / largest)
    measured("float32 to transformers in float64, far positions", ours[0])
    assert measured("far positions, times torch's float32", max(ours / theirs)) <= 1.5


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 5e5), (128, 1e4), (64, 1e4), (64, 5e5), (32, 1e4), (12, 5e5)])
def test_frequencies_are_torchs(head_dim: int, theta: float) -> None:
    np.testing.assert_array_equal(np.array(inverse_frequencies(head_dim, theta)), torch_frequencies(head_dim, theta))


def test_frequencies_are_torchs_but_for_the_last_bit_of_some(measured: Measured) -> None:
    """torch's float32 power isn't always rounded correctly, and not alike by all instruction sets."""
    other = total = 0
    for head_dim in range(4, 257, 2):
        for theta in (1e4, 5e5, 1e6, 123456.7):
            ours, theirs = np.array(inverse_frequencies(head_dim, theta)), torch_frequencies(head_dim, theta).numpy()
            np.testing.assert_allclose(ours, theirs, rtol=2**-22)
            other, total = other + int(np.count_nonzero(ours != theirs)), total + len(ours)
    assert measured("share of frequencies that aren't torch's", other / total) <= 0.03
