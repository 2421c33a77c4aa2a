"""A stream's cache, from which another text with the same beginning goes on: only what is new in it is computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import dbrx_fn.generation.stream
from dbrx_fn.errors import CacheError
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.stream import Stream, stream_tokens
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.cache_rows import rewind
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward

CONFIG = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    vocab_size=64,
    max_seq_len=600,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    initializer_range=0.3,
    dtype="float32",
)
PARAMS = init_params(CONFIG, mx.random.key(1))
FIRST = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that were handed to the model, call by call."""
    widths: list[int] = []

    def spy(params: Any, tokens: mx.array, *arguments: Any, **more: Any) -> Any:
        widths.append(tokens.size)
        return forward(params, tokens, *arguments, **more)

    monkeypatch.setattr(dbrx_fn.generation.stream, "forward", spy)
    return widths


def kept(stream: Stream[int], text: Sequence[int]) -> Cache:
    """The stream's cache, of the tokens that are in `text`."""
    return rewind(stream.cache, [min(stream.cache.lengths[0], len(text))])


@pytest.mark.parametrize("taken", [1, 2, 7, 30])
def test_what_a_stream_has_computed_is_not_computed_again(taken: int, computed: list[int]) -> None:
    stream = stream_tokens(PARAMS, CONFIG, FIRST, max_tokens=30)
    text = FIRST + [token for token, _ in zip(stream, range(taken), strict=False)][:taken]
    cache = kept(stream, text)
    assert cache.lengths[0] >= len(text) - 1
    text += [7, 8, 9, 10]
    computed.clear()
    made = list(stream_tokens(PARAMS, CONFIG, text, max_tokens=12, cache=cache))
    assert computed == [len(text) - cache.lengths[0]] + [1] * 11
    assert made == list(stream_tokens(PARAMS, CONFIG, text, max_tokens=12))


def test_the_cache_holds_the_text_as_forward_computes_it() -> None:
    stream = stream_tokens(PARAMS, CONFIG, FIRST, max_tokens=9)
    assert stream.cache.lengths == (0,)
    text = FIRST + list(stream)
    assert stream.cache.lengths == (len(text) - 1,)
    _, whole = forward(PARAMS, mx.array([text[:-1]]), init_cache(CONFIG, 1, stream.cache.capacity))
    for ours, expected in zip(stream.cache.keys + stream.cache.values, whole.keys + whole.values, strict=True):
        np.testing.assert_allclose(ours[:, :, : len(text) - 1], expected[:, :, : len(text) - 1], atol=2e-5)


def test_a_cache_serves_several_texts_and_stays_what_it_was() -> None:
    stream = stream_tokens(PARAMS, CONFIG, FIRST, max_tokens=3)
    text = FIRST + list(stream)
    cache = kept(stream, text)
    before = [np.array(array) for array in cache.keys]
    for more in ([1], [2, 3], [1]):
        made = list(stream_tokens(PARAMS, CONFIG, text + more, max_tokens=300, cache=cache))
        assert made == list(stream_tokens(PARAMS, CONFIG, text + more, max_tokens=300))
    assert all((np.array(array) == old).all() for array, old in zip(cache.keys, before, strict=True))


def test_penalties_see_the_tokens_that_were_not_computed_again() -> None:
    stream = stream_tokens(PARAMS, CONFIG, FIRST, max_tokens=1)
    list(stream)
    penalized = Sampling(repetition_penalty=1.5)
    made = list(stream_tokens(PARAMS, CONFIG, [*FIRST, 7], max_tokens=20, sampling=penalized, cache=stream.cache))
    assert made == list(stream_tokens(PARAMS, CONFIG, [*FIRST, 7], max_tokens=20, sampling=penalized))


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (init_cache(CONFIG, 2, 256), "isn't one row of this model's config"),
        (init_cache(replace(CONFIG, n_layers=1), 1, 256), "isn't one row of this model's config"),
        (replace(init_cache(CONFIG, 1, 256), lengths=(8,)), "holds 8 tokens and the prompt has 8"),
    ],
)
def test_a_cache_that_cannot_be_the_prompts_beginning_is_refused(cache: Cache, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        stream_tokens(PARAMS, CONFIG, FIRST, cache=cache)
