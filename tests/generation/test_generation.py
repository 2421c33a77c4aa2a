"""The loop from prompt to text: which tokens, when each is computed, and what of their text is given out when."""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import dbrx_fn.generation.stream
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.errors import GenerationError, InputError
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.stream import Piece, stream_text, stream_tokens, token_budget, warm_up
from dbrx_fn.generation.structured import Structure, TokenTrie
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import Backend, as_if
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support import oracle, trees

T = TypeVar("T")
CONTEXT = 600
RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": CONTEXT,
    "vocab_size": 64,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}
CASE = trees.case_of(RAW, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def made(prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    return list(stream_tokens(PARAMS, CONFIG, prompt, **{"key": mx.random.key(0), **options}))


def whole(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits `[time vocab]` of all tokens at once, without a cache."""
    return np.array(forward(PARAMS, mx.array([tokens]), init_cache(CONFIG, 1, 0))[0][0])


def assert_greedy(prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Each token must be the likeliest after those before it, or as good as that in float32."""
    logits = whole([*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(tokens)[:, None], axis=1)[:, 0]
    assert (logits.max(axis=1) - chosen < 1e-4).all()


# Which tokens


def test_greedy_tokens_are_the_oracles() -> None:
    assert made(max_tokens=64) == oracle.greedy(RAW, CASE.tensors, PROMPT, 64)


def test_cache_grows_on_the_way() -> None:
    """The cache begins with room for 512 tokens, and 530 pass through it."""
    prompt = [(7 * n + n // 5) % 64 for n in range(230)]
    tokens = made(prompt, max_tokens=300)
    assert len(tokens) == 300
    assert_greedy(prompt, tokens)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100, 2048])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    prompt = PROMPT * 9
    assert made(prompt, max_tokens=20, chunk_size=chunk_size) == made(prompt, max_tokens=20)


def test_stop_token_is_the_last() -> None:
    tokens = made(max_tokens=30)
    stop = tokens[10]
    assert made(max_tokens=30, stop_tokens=frozenset({stop, 63})) == tokens[: tokens.index(stop) + 1]
    assert made(max_tokens=1, stop_tokens=frozenset({tokens[0]})) == tokens[:1]
    unused = frozenset(range(64)) - frozenset(tokens)
    assert made(max_tokens=30, stop_tokens=unused) == tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 50])
def test_max_tokens(max_tokens: int) -> None:
    assert made(max_tokens=max_tokens) == made(max_tokens=50)[:max_tokens]


def test_context_ends_the_text() -> None:
    """The last token made needs no position of its own, so a context of n leaves room for n + 1 tokens."""
    prompt = (PROMPT * 75)[: CONTEXT - 10]
    tokens = made(prompt, max_tokens=50)
    assert len(tokens) == 11
    assert_greedy(prompt, tokens)
    prompt = PROMPT * 75
    assert len(prompt) == CONTEXT
    [token] = made(prompt, max_tokens=50)
    assert_greedy(prompt, [token])


def test_same_key_same_text() -> None:
    drawn = Sampling(temperature=1.5, top_k=30, repetition_penalty=1.2, presence_penalty=0.1)
    first = made(max_tokens=40, sampling=drawn, key=mx.random.key(5))
    assert made(max_tokens=40, sampling=drawn, key=mx.random.key(5)) == first
    assert made(max_tokens=40, sampling=drawn, key=mx.random.key(6)) != first
    mx.random.seed(7)
    assert made(max_tokens=40, sampling=drawn, key=mx.random.key(5)) == first


def test_drawing_without_a_key_is_refused(scratch: Path) -> None:
    """Or else each text would be the same one, or no text could be made again."""
    warm = Sampling(temperature=0.7)
    for attempt in (
        lambda: list(stream_tokens(PARAMS, CONFIG, PROMPT, sampling=warm)),
        lambda: list(stream_text(COUNTING, CONFIG, saying([b"a"], scratch), [0], sampling=warm)),
    ):
        with pytest.raises(InputError, match=r"temperature is 0\.7, and drawing needs a key.*mx\.random\.key"):
            attempt()


def test_penalties_see_prompt_and_text() -> None:
    """A penalty past all logits leaves no token to be said twice."""
    presence = Sampling(presence_penalty=1e6)
    tokens = made(max_tokens=64, sampling=presence)
    assert sorted(tokens) == list(range(64))
    assert set(tokens[: 64 - len(set(PROMPT))]) & set(PROMPT), "the prompt's tokens are no part of the text"
    # Dividing can't take a token with a positive logit below the others', but being most negative can.
    below = tuple((token, -100.0) for token in range(64))
    repetition = Sampling(repetition_penalty=1e4, logit_bias=below)
    tokens = made(max_tokens=64 - len(set(PROMPT)), sampling=repetition)
    assert sorted([*tokens, *set(PROMPT)]) == list(range(64))


def test_any_sequence_of_ints_is_a_prompt() -> None:
    assert made(range(3, 8), max_tokens=5) == made([3, 4, 5, 6, 7], max_tokens=5) == made((3, 4, 5, 6, 7), max_tokens=5)


# When each is computed


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that hands work to the device without waiting ("start"), or waits for it ("wait"), as it happens."""
    log: list[str] = []

    def spied(function: Callable[..., Any], event: str) -> Callable[..., Any]:
        def spy(*arguments: Any, **more: Any) -> Any:
            log.append(event)
            return function(*arguments, **more)

        return spy

    monkeypatch.setattr(mx, "async_eval", spied(mx.async_eval, "start"))
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, spied(getattr(mx, name), "wait"))
    # Whatever turns an array into something of Python's waits for it.
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__array__", "__index__"):
        if hasattr(mx.array, name):
            monkeypatch.setattr(mx.array, name, spied(getattr(mx.array, name), "wait"))
    return log


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=9, frequency_penalty=0.1)])
def test_next_token_is_under_way_before_one_is_waited_for(sampling: Sampling, events: list[str]) -> None:
    stream = stream_tokens(PARAMS, CONFIG, PROMPT, max_tokens=5, sampling=sampling, key=mx.random.key(0))
    assert events == []
    for _ in stream:
        events.append("yield")
    assert events == ["start"] + ["start", "wait", "yield"] * 4 + ["wait", "yield"]


def test_with_a_structure_the_logits_are_under_way_while_its_tokens_are_found(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = TokenTrie(read_tokenizer(SMALL), CONFIG.vocab_size, {0}).matcher(Structure.regex("[A-Z]{9}"))
    allowed = matcher.allowed

    def spy() -> NDArray[np.uint32]:
        events.append("find")
        return allowed()

    monkeypatch.setattr(matcher, "allowed", spy)
    for _ in stream_tokens(PARAMS, CONFIG, PROMPT, max_tokens=3, matcher=matcher):
        events.append("yield")
    assert events == ["start", "find", "start"] + ["start", "wait", "find", "start", "yield"] * 2 + ["wait", "yield"]


def test_waiting_is_noticed(events: list[str]) -> None:
    """Or else the test above would prove nothing."""
    array = mx.array(1)
    assert [array.item(), int(array), array.tolist()] == [1, 1, 1]
    mx.eval(array)
    assert events == ["wait"] * 4


def test_nothing_is_computed_past_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def spy(params: Params, tokens: mx.array, *arguments: Any, **more: Any) -> Any:
        widths.append(tokens.shape[1])
        return forward(params, tokens, *arguments, **more)

    monkeypatch.setattr(dbrx_fn.generation.stream, "forward", spy)
    for count, _ in enumerate(stream_tokens(PARAMS, CONFIG, PROMPT, max_tokens=6), start=1):
        assert len(widths) == min(count + 1, 6)
    assert widths == [len(PROMPT), 1, 1, 1, 1, 1]


@pytest.mark.parametrize("machine", ["cpu", "cuda", "metal"])
def test_warm_up_leaves_no_trace_to_be_made(machine: Backend, caplog: pytest.LogCaptureFixture) -> None:
    sampling = Sampling(temperature=0.5, top_k=11, top_p=0.8)
    # Each of a GPU's chunks looks at twice as much of the cache as the one before.
    with as_if(backend=machine):
        warm_up(PARAMS, CONFIG, 40, max_tokens=3, sampling=sampling, chunk_size=16)
        with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
            made([1] * 40, max_tokens=3, sampling=sampling, chunk_size=16)
    assert not caplog.records


def test_other_numbers_are_no_traces(caplog: pytest.LogCaptureFixture) -> None:
    """A temperature, penalty or bias of its own for each request must not cost a compilation."""
    first = Sampling(temperature=0.5, top_p=0.8, min_p=0.1, repetition_penalty=1.1, logit_bias=((3, 1.0),))
    other = Sampling(temperature=0.7, top_p=0.9, min_p=0.2, repetition_penalty=1.2, logit_bias=((4, 2.0),))
    made(max_tokens=3, sampling=first)
    with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
        made(max_tokens=3, sampling=other)
    assert not caplog.records


@pytest.mark.parametrize(("length", "max_tokens", "capacity"), [(200, 57, 256), (200, 58, 512), (250, 100, 256)])
def test_the_cache_is_no_larger_than_needed(
    length: int, max_tokens: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token made is never fed back, and the context of 256 ends the third one."""
    capacities: list[int] = []

    def spy(params: Params, tokens: mx.array, cache: Cache, **more: Any) -> Any:
        capacities.append(cache.capacity)
        return forward(params, tokens, cache, **more)

    monkeypatch.setattr(dbrx_fn.generation.stream, "forward", spy)
    list(
        stream_tokens(
            PARAMS, replace(CONFIG, max_seq_len=256 if length == 250 else 300), [1] * length, max_tokens=max_tokens
        )
    )
    assert set(capacities) == {capacity}


# What can't be continued


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "The prompt is empty"),
        ([1] * (CONTEXT + 1), 5, f"The prompt has {CONTEXT + 1} tokens and the model's context holds {CONTEXT}"),
        ([1, 64], 5, "The prompt holds token 64, past the model's vocabulary of 64"),
        ([1, -1], 5, "The prompt holds token -1"),
        ([1], 0, "max_tokens is 0 where it must be at least 1"),
        ([1], -3, "max_tokens is -3"),
    ],
)
def test_what_cannot_be_continued(prompt: list[int], max_tokens: int, words: str, scratch: Path) -> None:
    tokenizer = saying([b"a", b"b"], scratch)
    for attempt in (
        lambda: made(prompt, max_tokens=max_tokens),
        lambda: token_budget(prompt, CONFIG, max_tokens),
        lambda: list(stream_text(PARAMS, CONFIG, tokenizer, prompt, max_tokens=max_tokens)),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        text = str(caught.value)
        assert text.startswith(words)
        assert text.endswith(".")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "To be"}, "prompt is 'To be' where it must be a sequence of whole numbers"),
        ({"prompt": 7}, "prompt is 7 where it must be a sequence of whole numbers"),
        ({"prompt": [1.5]}, r"The prompt is \[1\.5\] where a sequence of token ids"),
        ({"prompt": ["a"]}, r"The prompt is \['a'\] where a sequence"),
        ({"prompt": [[1, 2]]}, r"The prompt is \[\[1, 2\]\] where a sequence"),
        ({"prompt": mx.array([1.0])}, r"where a sequence of token ids"),
        ({"prompt": [1, 2**70]}, "The prompt holds token 1180591620717411303424, past"),
        ({"stop_tokens": {64}}, "stop_tokens holds token 64, past the model's vocabulary of 64"),
        ({"stop_tokens": "x"}, "stop_tokens is 'x' where it must be a sequence of whole numbers"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5 where it must be a whole number"),
        ({"sampling": 0.7}, r"sampling is 0\.7 where it must be a Sampling"),
        ({"sampling": Sampling(temperature=1.0), "key": 7}, r"key is 7 where it must be uint32 \[2\] or None"),
        ({"params": CONFIG, "config": PARAMS}, "params is a Config where it must be a dict"),
        ({"config": RAW}, "config is a dict where it must be a Config"),
    ],
)
def test_arguments_of_the_wrong_kind(options: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"params": PARAMS, "config": CONFIG, "prompt": PROMPT, "max_tokens": 2}
    with pytest.raises(InputError, match=words) as caught:
        list(stream_tokens(**arguments | options))
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("sequence", [tuple, np.array, mx.array, lambda tokens: np.array(tokens, np.uint8)])
def test_arrays_of_integers_are_prompts_too(sequence: Callable[[list[int]], Any]) -> None:
    assert made(sequence(PROMPT), max_tokens=3) == made(PROMPT, max_tokens=3)


def broken_after(token: int) -> Params:
    """The model that counts, one of whose logits after this token is infinite, and 0 after all others."""
    weight = np.array(COUNTING["lm_head"]["weight"])
    # Times what the last norm makes of the token, more than 1, this leaves float32.
    weight[40, token] = 3e38
    return {**COUNTING, "lm_head": {"weight": mx.array(weight)}}


def until_an_error(stream: Iterator[T]) -> tuple[list[T], str]:
    """What an iterator yields before its `GenerationError`, and what that says."""
    heard = []
    try:
        for each in stream:
            heard.append(each)
    except GenerationError as error:
        return heard, str(error)
    raise AssertionError(f"no error after {heard}")


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_numbers_that_are_not_finite_end_the_text_with_an_error(temperature: float, scratch: Path) -> None:
    """What was made before them is given out."""
    tokenizer, params = saying([b"a", b"b", b"c", b"d", b"e", b"f"], scratch), broken_after(4)
    drawn: dict[str, Any] = {"sampling": Sampling(temperature=temperature), "key": mx.random.key(0)}
    tokens, said = until_an_error(stream_tokens(params, CONFIG, [0], max_tokens=20, **drawn))
    assert tokens == [1, 2, 3, 4]
    assert said.startswith("After 5 tokens the model's numbers are no longer finite")
    assert said.endswith(".")
    pieces, _ = until_an_error(stream_text(params, CONFIG, tokenizer, [0], max_tokens=20, **drawn))
    assert "".join(texts(pieces)) == "abcd"


@pytest.mark.parametrize("token", [64, 2**40])
def test_bias_past_the_vocabulary(token: int) -> None:
    """MLX would write there without a word."""
    with pytest.raises(InputError, match=rf"logit_bias.*{token}.*vocabulary of 64"):
        made(max_tokens=2, sampling=Sampling(logit_bias=((3, 1.0), (token, 5.0))))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_that_cannot_work(chunk_size: int) -> None:
    with pytest.raises(InputError, match=f"chunk_size is {chunk_size} where it must be at least 1"):
        made(max_tokens=2, chunk_size=chunk_size)


def test_empty_stop_string(scratch: Path) -> None:
    tokenizer = saying([b"a", b"b"], scratch)
    with pytest.raises(InputError, match="stop string is empty"):
        list(stream_text(PARAMS, CONFIG, tokenizer, PROMPT, stop_strings=["a", ""]))


# Text: a model that counts, and tokenizers that make any text of that


def counting() -> Params:
    """After token n it always says n + 1, up to 31: each embedding is an axis, and attention and experts are 0."""
    params: Params = tree_map(mx.zeros_like, PARAMS)
    params["transformer"]["norm_f"]["weight"] = mx.ones((32,))
    params["transformer"]["wte"]["weight"] = mx.eye(64, 32)
    params["lm_head"]["weight"] = mx.eye(64, 32, k=-1)
    return params


COUNTING = counting()
LONGEST = 30


def saying(pieces: Sequence[bytes], folder: Path) -> Tokenizer:
    """A tokenizer whose tokens from 1 on are these pieces, in this order, and then the stop token.

    It's read from a file, because that is how users get theirs.
    """
    characters = {byte: character for character, byte in byte_alphabet().items()}
    # Token 0 begins the text; what it says is in no one's.
    vocabulary = {"\u0120prompt": 0} | {
        "".join(characters[byte] for byte in piece): number for number, piece in enumerate(pieces, start=1)
    }
    assert len(vocabulary) == len(pieces) + 1 <= LONGEST + 1
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.stop_tokens == {len(pieces) + 1}
    assert tokenizer.decode(range(1, len(pieces) + 1)) == b"".join(pieces).decode(errors="replace")
    return tokenizer


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as the tokenizers library has it."""
    decoder = decoders.ByteLevel()
    visible = {
        character: ord(character) for character in map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)])
    }
    hidden = [byte for byte in range(256) if byte not in visible.values()]
    alphabet = visible | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert decoder.decode([character for character in alphabet if alphabet[character] < 128]).isascii()
    return alphabet


def say(pieces: Sequence[bytes], folder: Path, stop_strings: Sequence[str] = (), max_tokens: int = 99) -> list[Piece]:
    tokenizer = saying(pieces, folder)
    return list(stream_text(COUNTING, CONFIG, tokenizer, [0], max_tokens=max_tokens, stop_strings=stop_strings))


def texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def test_pieces_and_the_stop_token(scratch: Path) -> None:
    assert say([b"Hello", b", ", b"world"], scratch) == [
        Piece(1, "Hello", None),
        Piece(2, ", ", None),
        Piece(3, "world", None),
        Piece(4, "", "stop"),
    ]


def test_length_as_a_reason(scratch: Path) -> None:
    pieces = say([b"Hello", b", ", b"world"], scratch, max_tokens=2)
    assert pieces == [Piece(1, "Hello", None), Piece(2, ", ", "length")]
    pieces = say([b"Hello", b", ", b"world"], scratch, max_tokens=4)
    assert pieces[-1] == Piece(4, "", "stop")


def test_characters_stay_whole(scratch: Path) -> None:
    smile = "😀".encode()
    assert texts(say([smile[:1], smile[1:3], smile[3:] + b"!"], scratch)) == ["", "", "😀!", ""]
    assert texts(say([b"a" + smile[:2], smile[2:]], scratch)) == ["a", "😀", ""]


def test_half_a_character_at_the_end(scratch: Path) -> None:
    smile = "😀".encode()
    assert texts(say([b"a", smile[:3]], scratch)) == ["a", "", "\ufffd"]
    assert texts(say([b"a", smile[:3], smile[3:]], scratch, max_tokens=2)) == ["a", "\ufffd"]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "tokens"),
    [
        pytest.param([b"one ", b"two ", b"three"], ["two"], ["one ", ""], 2, id="in one token"),
        pytest.param([b"one two three", b"four"], ["two"], ["one "], 1, id="in the first token"),
        pytest.param([b"one t", b"w", b"o three"], ["two"], ["one ", "", ""], 3, id="over three tokens"),
        pytest.param([b"a", b"ba", b"bc"], ["abc"], ["", "ab", ""], 3, id="begins again within itself"),
        pytest.param([b"one t", b"wig"], ["two"], ["one ", "twig", ""], None, id="begins and is another word"),
        pytest.param([b"one t", b"w"], ["two"], ["one ", "", "tw"], None, id="begins and ends with the text"),
        pytest.param([b"one", b"two"], ["two"], ["one", ""], 2, id="at the very end"),
        pytest.param([b"x1", b"23y"], ["123456", "23"], ["x", "1"], 2, id="the one that is there first"),
        pytest.param([b"xabc"], ["bc", "ab"], ["x"], 1, id="the leftmost of two"),
        pytest.param([b"a\n", b"\n", b"b"], ["\n\n"], ["a", ""], 2, id="line ends"),
        pytest.param(["日".encode()[:2], "日本".encode()[2:], b"!"], ["本"], ["", "日"], 2, id="many bytes"),
    ],
)
def test_stop_strings(
    pieces: list[bytes], stops: list[str], expected: list[str], tokens: int | None, scratch: Path
) -> None:
    said = say(pieces, scratch, stops)
    assert texts(said) == expected
    assert [piece.token for piece in said] == list(range(1, 1 + (tokens or len(pieces) + 1)))
    assert [piece.finish_reason for piece in said] == [None] * (len(said) - 1) + ["stop"]


def test_what_was_held_back_comes_out_at_the_last_token(scratch: Path) -> None:
    pieces = say([b"one t", b"w", b"o"], scratch, ["two"], max_tokens=2)
    assert pieces == [Piece(1, "one ", None), Piece(2, "tw", "length")]


def cut(text: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The text in pieces of these sizes, made longer where there is such a piece already, and the rest left out."""
    pieces: list[bytes] = []
    rest = text
    for size in sizes:
        while rest[:size] in pieces and size < len(rest):
            size += 1
        if not rest[:size] or rest[:size] in pieces:
            break
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces


few = st.text("ab日😀", max_size=30).map(str.encode) | st.binary(max_size=20)


@settings(max_examples=150)
@given(
    text=few,
    sizes=st.lists(st.integers(1, 5), min_size=LONGEST, max_size=LONGEST),
    stops=st.lists(st.text("ab日😀\ufffd", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 40),
)
@example(text=b"aab", sizes=[1] * LONGEST, stops=["aab"], max_tokens=40)
def test_text_is_given_out_as_soon_as_it_is_certain(
    text: bytes, sizes: list[int], stops: list[str], max_tokens: int, scratch: Path
) -> None:
    pieces = cut(text, sizes)
    said = say(pieces, scratch, stops, max_tokens)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    known = given_out = ""
    for count, piece in enumerate(said, start=1):
        assert piece.token == count
        last = count in (max_tokens, len(pieces) + 1)
        known += decoder.decode(pieces[count - 1] if count <= len(pieces) else b"", final=last)
        given_out += piece.text
        found = [known.index(stop) for stop in stops if stop in known]
        if found:
            assert given_out == known[: min(found)]
            assert piece.finish_reason == "stop"
        elif last:
            assert given_out == known
            assert piece.finish_reason == ("stop" if count > len(pieces) else "length")
        else:
            held = next(n for n in range(len(known), -1, -1) if n == 0 or any(s.startswith(known[-n:]) for s in stops))
            assert given_out == known[: len(known) - held]
            assert piece.finish_reason is None
    assert said[-1].finish_reason is not None
    if not stops:
        tokens = [piece.token for piece in said]
        assert given_out == read_tokenizer(scratch).decode(tokens)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_text_of_random_bytes(temperature: float, scratch: Path) -> None:
    """A random model says bytes that make up no text; all pieces together are still what `decode` says."""
    pieces = [bytes([byte]) for byte in (*range(97, 105), 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x98, 0x80, 0xFF)]
    tokenizer = saying(pieces, scratch)
    said = list(
        stream_text(
            PARAMS,
            CONFIG,
            tokenizer,
            PROMPT,
            max_tokens=100,
            sampling=Sampling(temperature=temperature, logit_bias=tuple((n, -1e9) for n in range(20, 64))),
            key=mx.random.key(0),
            stop_tokens=frozenset(),
        )
    )
    assert len(said) == 100
    assert "".join(texts(said)) == tokenizer.decode(piece.token for piece in said)


def test_prompt_as_text_is_encoded(scratch: Path) -> None:
    tokenizer = saying([b"x", b"y", b"z"], scratch)
    [token] = tokenizer.encode("x")
    said = list(stream_text(COUNTING, CONFIG, tokenizer, "x"))
    assert [piece.token for piece in said] == [token + 1, token + 2, token + 3]
    assert texts(said) == ["y", "z", ""]


def test_stop_tokens_replace_the_tokenizers(scratch: Path) -> None:
    tokenizer = saying([b"x", b"y", b"z"], scratch)
    said = list(stream_text(COUNTING, CONFIG, tokenizer, [0], stop_tokens=frozenset({2})))
    assert said == [Piece(1, "x", None), Piece(2, "", "stop")]
    said = list(stream_text(COUNTING, CONFIG, tokenizer, [0], stop_tokens=frozenset(), max_tokens=6))
    assert "".join(texts(said)) == "xyz"
    assert said[-1].finish_reason == "length"
