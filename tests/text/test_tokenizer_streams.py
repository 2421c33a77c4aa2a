"""Text that is decoded token by token."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_fn.text.tokenizer import Tokenizer


def split(tokenizer: Tokenizer, tokens: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip_special_tokens)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["of_json", "of_gap", "of_tiktoken"])
def test_stream_equals_decode(name: str, skip: bool, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    # The first 256 ids of all three vocabularies hold the single bytes, so these make most of the broken sequences.
    ids = st.one_of(
        st.integers(0, 255),
        st.integers(0, tokenizer.vocab_size + 20),
        st.integers(max(0, tokenizer.vocab_size - 30), tokenizer.vocab_size),
    )
    texts = st.text(max_size=8).map(tokenizer.encode)
    sequences = st.lists(st.one_of(ids.map(lambda token: [token]), texts), max_size=20)

    @settings(max_examples=300, deadline=None, database=None)
    @example([tokenizer.encode("😀👩‍👩‍👧é日本")])
    @example([tokenizer.encode("😀")[:-1], tokenizer.encode("<|im_end|>a")])
    @given(sequences)
    def check(parts: list[list[int]]) -> None:
        tokens = [token for part in parts for token in part]
        whole = tokenizer.decode(tokens, skip_special_tokens=skip)
        assert "".join(split(tokenizer, tokens, skip)) == whole

    check()


@pytest.mark.parametrize("name", ["of_json", "of_tiktoken"])
def test_stream_gives_whole_characters_at_once(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "a🦜b"
    tokens = tokenizer.encode(text)
    assert len(tokens) > 3
    pieces = split(tokenizer, tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == ["a", "🦜", "b"]


def test_stream_holds_back_no_finished_text(of_tiktoken: Tokenizer) -> None:
    assert split(of_tiktoken, [9906, 1917, 100279]) == ["Hello", " world", "", ""]


def test_stream_gives_the_undecodable_rest_at_the_end(of_tiktoken: Tokenizer) -> None:
    parrot = of_tiktoken.encode("🦜")
    stream = of_tiktoken.stream()
    assert [stream.push(token) for token in parrot[:-1]] == [""] * (len(parrot) - 1)
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_passes_bytes_that_no_character_holds(of_tiktoken: Tokenizer) -> None:
    first = of_tiktoken.encode("🦜")[0]
    assert split(of_tiktoken, [first, 9906, 1917]) == ["", "\ufffdHello", " world", ""]
