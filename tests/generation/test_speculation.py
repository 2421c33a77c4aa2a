"""Speculation changes how often the model runs, and nothing else."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.errors import GenerationError, InputError
from dbrx_fn.generation import speculation as module
from dbrx_fn.generation.drafts import Drafter
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.speculation import Speculation
from dbrx_fn.generation.stream import Stream, stream_text, stream_tokens, warm_up
from dbrx_fn.generation.structured import Structure, token_trie
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.cache_rows import rewind
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.shard import Shard
from dbrx_fn.model.transformer import forward
from dbrx_fn.runtime.device import Backend, as_if
from dbrx_fn.text.tokenizer import read_tokenizer

CONFIG = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    vocab_size=64,
    max_seq_len=300,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    initializer_range=0.3,
    dtype="float32",
)
PARAMS = init_params(CONFIG, mx.random.key(1))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    logit_bias=st.sampled_from([(), ((7, 2.0), (9, -3.0))]),
)


def stream(prompt: Sequence[int] = PROMPT, **options: Any) -> Stream[int]:
    return stream_tokens(PARAMS, CONFIG, prompt, **{"key": mx.random.key(0), **options})


def drafting(tokens: Sequence[int], widths: Callable[[], int], right: Callable[[], bool]) -> Callable[..., Any]:
    """A drafter that takes passes of any width, and drafts each of `tokens` rightly or wrongly."""

    class Scripted(Drafter):
        def __init__(self, given: Sequence[int], prompt: Sequence[int]) -> None:
            super().__init__(given, prompt)
            self._given, self._made = given, 0

        def push(self, token: int) -> None:
            super().push(token)
            self._made += 1

        def width(self, left: int) -> int:
            width = widths()
            return width if width in self._given else 1

        def draft(self, count: int) -> list[int]:
            coming = [*tokens[self._made :], *[0] * count][:count]
            return [token if right() else (token + 1) % CONFIG.vocab_size for token in coming]

    return Scripted


@settings(max_examples=25)
@given(
    sampling=SAMPLINGS,
    seed=st.integers(0, 2**32),
    length=st.integers(1, 40),
    max_tokens=st.integers(1, 40),
    stops=st.sets(st.integers(0, 63), max_size=2),
    chance=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_the_tokens_are_the_same_whatever_is_drafted_and_whenever_it_is_verified(
    sampling: Sampling, seed: int, length: int, max_tokens: int, stops: set[int], chance: float
) -> None:
    numbers = np.random.default_rng(seed)
    options: Any = {
        "prompt": numbers.integers(0, 64, length).tolist(),
        "max_tokens": max_tokens,
        "sampling": sampling,
        "key": mx.random.key(seed),
        "stop_tokens": stops,
    }
    plain = stream(**options)
    tokens = list(plain)
    drafter = drafting(tokens, lambda: int(numbers.choice([1, 8, 16, 32])), lambda: bool(numbers.random() < chance))
    with patch.object(module, "Drafter", drafter):
        speculated = stream(**options, speculation=Speculation())
        assert list(speculated) == tokens
    assert speculated.passes <= plain.passes + 1
    assert speculated.cache.lengths[0] - length - len(tokens) in (-1, 0)
    assert_holds(speculated, [*options["prompt"], *tokens])


def assert_holds(made: Stream[int], text: Sequence[int]) -> None:
    """The stream's cache holds the keys and values of the text."""
    length = made.cache.lengths[0]
    if length == 0:
        return
    _, whole = forward(PARAMS, mx.array([text[:length]]), init_cache(CONFIG, 1, made.cache.capacity))
    for ours, expected in zip(made.cache.keys + made.cache.values, whole.keys + whole.values, strict=True):
        np.testing.assert_allclose(ours[:, :, :length], expected[:, :, :length], atol=3e-5)


@pytest.fixture
def _even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it a second later, so a verifying pass takes two seconds, and a single one one."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the passes behind the prompt, pass by pass."""
    widths: list[int] = []

    def spy(params: Any, tokens: mx.array, *arguments: Any, **more: Any) -> Any:
        if not more.get("last_only"):
            widths.append(tokens.shape[1])
        return forward(params, tokens, *arguments, **more)

    monkeypatch.setattr(module, "forward", spy)
    return widths


@pytest.mark.usefixtures("_even_clock")
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_text_that_repeats_itself_needs_few_passes(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    params = repeating([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    options: Any = {
        "max_tokens": 200,
        "sampling": Sampling(temperature=temperature),
        "key": mx.random.key(3),
    }
    tokens = list(stream_tokens(params, CONFIG, [0], **options))
    assert tokens == [(place + 1) % 10 for place in range(200)]
    widths = spied(monkeypatch)
    speculated = stream_tokens(params, CONFIG, [0], **options, speculation=Speculation())
    assert list(speculated) == tokens
    assert speculated.passes == len(widths) < 40
    assert max(widths) >= 16


def repeating(successor: Sequence[int]) -> Any:
    """A model whose blocks add nothing, and whose head makes the successor of the last token likeliest by far."""
    params: Any = tree_map(mx.zeros_like, PARAMS)
    count = len(successor)
    embedding = np.zeros((CONFIG.vocab_size, CONFIG.d_model), np.float32)
    head = np.zeros((CONFIG.vocab_size, CONFIG.d_model), np.float32)
    embedding[np.arange(count), np.arange(count)] = 1
    head[list(successor), np.arange(count)] = 30
    params["transformer"]["wte"]["weight"] = mx.array(embedding)
    params["transformer"]["norm_f"]["weight"] = mx.ones(CONFIG.d_model)
    params["lm_head"]["weight"] = mx.array(head)
    return params


@pytest.mark.usefixtures("_even_clock")
def test_a_text_that_repeats_nothing_is_never_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = spied(monkeypatch)
    speculated = stream(
        [*PROMPT, *range(64)], max_tokens=150, sampling=Sampling(temperature=5.0), speculation=Speculation()
    )
    assert len(list(speculated)) == 150
    assert widths == [1] * 149
    assert speculated.passes == 149


@pytest.mark.usefixtures("_even_clock")
@pytest.mark.parametrize("most", [1, 4, 7, 20, 31])
def test_no_more_is_drafted_than_asked_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = spied(monkeypatch)
    with patch("dbrx_fn.generation.drafts._GUESSES_ON_CPU", (1.0, 1.0, 1.0)):
        made = stream_tokens(repeating([1, 2, 0]), CONFIG, [0], max_tokens=150, speculation=Speculation(most))
        assert list(made) == [1, 2, 0] * 50
    assert max(widths) == most + 1


def test_a_draft_ends_with_the_text() -> None:
    """At a stop token, at the last token, and where the context ends, though more is drafted and right."""
    params = repeating([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    always = drafting([(place + 1) % 10 for place in range(400)], lambda: 32, lambda: True)
    with patch.object(module, "Drafter", always):
        for max_tokens, stops, count in ((50, (), 50), (1, (), 1), (2, (), 2), (33, (), 33), (50, (7,), 7)):
            options: Any = {"max_tokens": max_tokens, "stop_tokens": stops, "speculation": Speculation()}
            made = stream_tokens(params, CONFIG, [0], **options)
            assert list(made) == [(place + 1) % 10 for place in range(count)]
            assert made.cache.lengths[0] in (count, count + 1)
        prompt = [place % 10 for place in range(CONFIG.max_seq_len - 4)]
        made = stream_tokens(params, CONFIG, prompt, max_tokens=50, speculation=Speculation())
        assert list(made) == [6, 7, 8, 9, 0]


@pytest.mark.parametrize("taken", [1, 2, 5, 20, 40])
def test_a_stream_that_is_left_early_shows_only_what_was_yielded(taken: int) -> None:
    """Or the next turn of a chat would go on behind tokens that nobody saw."""
    params = repeating([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    coming = [(place + 1) % 10 for place in range(400)]
    with patch.object(module, "Drafter", drafting(coming, lambda: 32, lambda: True)):
        made = stream_tokens(params, CONFIG, [0], max_tokens=100, speculation=Speculation())
        text = [0, *itertools.islice(made, taken)]
        made.close()
    assert text == [0, *coming[:taken]]
    assert len(text) - 1 <= made.cache.lengths[0] <= len(text)
    cache = rewind(made.cache, [min(made.cache.lengths[0], len(text))])
    more = [*text, 7, 3]
    assert list(stream_tokens(params, CONFIG, more, max_tokens=9, cache=cache)) == list(
        stream_tokens(params, CONFIG, more, max_tokens=9)
    )


def test_numbers_that_are_not_finite_end_the_text() -> None:
    params = repeating([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    embedding = np.array(params["transformer"]["wte"]["weight"])
    embedding[6] = np.nan
    params["transformer"]["wte"]["weight"] = mx.array(embedding)
    always = drafting([(place + 1) % 10 for place in range(400)], lambda: 8, lambda: True)
    with patch.object(module, "Drafter", always), pytest.raises(GenerationError, match="no longer finite"):
        list(stream_tokens(params, CONFIG, [0], max_tokens=50, speculation=Speculation()))


@pytest.mark.parametrize("machine", ["cpu", "cuda", "metal"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_p=0.8)], ids=["greedy", "drawn"])
def test_warm_up_leaves_no_trace_to_be_made(
    sampling: Sampling, machine: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_loss_weight=0.5))
    widths = itertools.cycle([1, 8, 1, 1, 16, 32])
    drafter = drafting([1, 2, 3] * 40, lambda: next(widths), lambda: False)
    with as_if(backend=machine), patch.object(module, "Drafter", drafter):
        warm_up(PARAMS, config, 9, max_tokens=40, sampling=sampling, speculation=Speculation())
        with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
            list(
                stream_tokens(
                    PARAMS,
                    config,
                    [1] * 9,
                    max_tokens=40,
                    sampling=sampling,
                    key=mx.random.key(0),
                    speculation=Speculation(),
                )
            )
    assert not caplog.records


def test_pieces_and_stop_strings_are_the_same() -> None:
    params, config = load(SMALL, dtype=computing_dtype(SMALL))
    tokenizer = read_tokenizer(SMALL)
    for prompt, stops in (("In the beginning of the reign of", ()), ("The king", (" his", "\n\n"))):
        options: Any = {"max_tokens": 60, "stop_strings": stops}
        plain = list(stream_text(params, config, tokenizer, prompt, **options))
        assert list(stream_text(params, config, tokenizer, prompt, **options, speculation=Speculation())) == plain


@pytest.mark.parametrize("count", [0, 32, -1])
def test_an_impossible_number_of_drafted_tokens_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"num_draft_tokens is {count} where it must be from 1 to 31"):
        Speculation(count)


def test_what_cannot_be_speculated_is_refused() -> None:
    matcher = token_trie(read_tokenizer(SMALL), CONFIG.vocab_size, frozenset({2})).matcher(Structure.regex("a*"))
    with pytest.raises(InputError, match="Speculation and a structure can't be combined"):
        stream(matcher=matcher, speculation=Speculation())
    shared = replace(CONFIG, shard=Shard(0, 2))
    with pytest.raises(InputError, match="Speculation isn't for a model that several processes share"):
        stream_tokens(PARAMS, shared, PROMPT, speculation=Speculation())
