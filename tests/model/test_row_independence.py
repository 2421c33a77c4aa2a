"""Rows of one batch: with `whole_cache`, a row's logits are the same bits whoever its neighbours are."""

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.cache_rows import put_rows
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cpu.library import has_kernels
from dbrx_fn.runtime.device import as_if

CAPACITY, ROWS, STEPS = 1024, 8, 6
CONFIG = Config(
    d_model=256,
    n_heads=4,
    n_layers=2,
    vocab_size=90,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=96, moe_num_experts=8, moe_top_k=2),
    dtype="float32",
)
PARAMS = init_params(CONFIG, mx.random.key(0))


def prompt(seed: int, length: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 90, (1, length)), mx.int32)


def decoded(params: Params, place: int, neighbours: dict[int, int]) -> list[bytes]:
    """The logits of one request's steps, standing at `place`; `neighbours` are lengths by place."""
    batch = init_cache(CONFIG, ROWS, CAPACITY)
    for row, length in (neighbours | {place: 500}).items():
        own: Cache = init_cache(CONFIG, 1, CAPACITY)
        _, own = forward(params, prompt(0 if row == place else row + 1, length), own, last_only=True, chunk_size=64)
        batch = put_rows(batch, [row], own)
    steps = []
    for step in range(STEPS):
        tokens = np.array(prompt(99 + step, ROWS))[0]
        tokens[place] = 7 + step
        logits, batch = forward(params, mx.array(tokens)[:, None], batch, whole_cache=True)
        steps.append(np.array(logits[place]).tobytes())
    return steps


@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_is_the_same_bits_whoever_is_beside_it(quantized: bool) -> None:
    params = quantize(PARAMS, CONFIG, Quantization(*[Format(4, 32)] * 4)) if quantized else PARAMS
    alone = decoded(params, 0, {})
    assert decoded(params, 0, {1: 30, 2: 50}) == alone
    assert decoded(params, 5, {1: 900, 6: 300, 7: 9}) == alone
    assert decoded(params, 7, dict.fromkeys(range(7), 700)) == alone


@pytest.mark.skipif(not has_kernels(), reason="stock operations add in another order for each number of rows")
@pytest.mark.parametrize("quantized", [False, True])
def test_a_prompt_has_the_same_bits_in_any_chunks(quantized: bool) -> None:
    params = quantize(PARAMS, CONFIG, Quantization(*[Format(4, 32)] * 4)) if quantized else PARAMS
    tokens, found = prompt(3, 150), []
    for widths in ([150], [100, 50], [2, 61, 87]):
        cache, logits = init_cache(CONFIG, 1, 512), []
        for start, width in zip(np.cumsum([0, *widths]), widths, strict=False):
            made, cache = forward(params, tokens[:, start : start + width], cache)
            logits.append(np.array(made))
        found.append(np.concatenate(logits, axis=1).tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("held", [16, 17, 20, 21])
def test_a_row_is_the_same_bits_beside_one_without_room_for_its_padding(held: int) -> None:
    def beside(length: int) -> tuple[bytes, np.ndarray, np.ndarray]:
        cache = init_cache(CONFIG, 2, 24)
        tokens = mx.concatenate([prompt(1, 24), prompt(2, 24)])
        _, cache = forward(PARAMS, tokens[:, :4], cache, whole_cache=True)
        for n in range(4, length):
            _, cache = forward(PARAMS, tokens[:, n : n + 1], cache, lengths=[0, 1])
        logits, cache = forward(PARAMS, tokens[:, 21:], cache, whole_cache=True)
        both, _ = forward(PARAMS, tokens[:, :1], cache, lengths=[1, int(length < 21)])
        return np.array(logits[0]).tobytes(), np.array(logits), np.array(both[0])

    alone, *_ = beside(4)
    own, *found = beside(held)
    assert own == alone
    with as_if(kernels=False):
        _, *expected = beside(held)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
