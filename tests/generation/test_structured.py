"""Structured output: which tokens may come next, texts of the small model, and which structures are refused."""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_fn import (
    SMALL,
    Config,
    GenerationError,
    InputError,
    Params,
    Sampling,
    Structure,
    Tokenizer,
    load,
    load_tokenizer,
    stream_text,
    stream_tokens,
)
from dbrx_fn.generation.structured import TokenTrie, token_trie
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.followed import followed, tokens_allowed

VOCAB = 4100
"""More than the tokenizer has."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SMALL)


@pytest.fixture(scope="module")
def trie(tokenizer: Tokenizer) -> TokenTrie:
    return token_trie(tokenizer, VOCAB)


def test_the_text_is_one_of_the_choices(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", 'a "quoted" one\n', "yes, but"]
    for seed in range(12):
        tokens = [token for token, _ in followed(trie.matcher(Structure.choice(choices)), seed, 100)]
        assert tokenizer.decode(tokens) in choices


def test_a_stop_token_is_allowed_exactly_where_the_text_may_end(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    text = ""
    for token, allowed in followed(trie.matcher(Structure.regex("(ab)*c?")), 1, 100):
        ends = text.endswith(("b", "c")) or not text
        assert trie.stop_tokens & set(allowed) == (trie.stop_tokens if ends else set())
        text += tokenizer.decode([token])


def test_a_text_that_can_only_end_is_finished(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    matcher = trie.matcher(Structure.choice(["a"]))
    assert not matcher.finished
    matcher.advance(tokenizer.encode("a")[0])
    assert matcher.finished
    assert set(tokens_allowed(matcher)) == trie.stop_tokens
    matcher.advance(min(trie.stop_tokens))
    assert matcher.finished


@pytest.mark.parametrize("structure", [Structure.json_object(), Structure.regex("(?s).*")])
def test_no_control_token_is_ever_allowed_inside_the_text(
    trie: TokenTrie, tokenizer: Tokenizer, structure: Structure
) -> None:
    control = set(tokenizer.control_tokens.values()) - trie.stop_tokens
    for seed in range(4):
        for _, allowed in followed(trie.matcher(structure), seed, 80):
            assert not control & set(allowed)
            assert max(allowed) < tokenizer.vocab_size


def test_a_matcher_can_be_copied_and_rewound(trie: TokenTrie) -> None:
    matcher = trie.matcher(Structure.json_object())
    masks = [allowed for _, allowed in followed(matcher, 0, 20)]
    after = tokens_allowed(matcher)
    twin = matcher.copy()
    for mask in reversed(masks):
        twin.rewind(1)
        assert tokens_allowed(twin) == mask
    assert tokens_allowed(matcher) == after


def test_a_token_that_is_not_allowed_is_an_error_from_then_on(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    matcher = trie.matcher(Structure.json_object())
    with pytest.raises(GenerationError, match="structure"):
        matcher.advance(tokenizer.encode("x")[0])
    with pytest.raises(GenerationError, match="structure"):
        matcher.allowed()
    assert not matcher.finished


def test_a_vocabulary_without_a_token_to_end_with_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop token"):
        TokenTrie(tokenizer, VOCAB, ())


# With a model


@pytest.fixture(scope="module")
def model() -> tuple[Params, Config]:
    return load(SMALL)


def generated(
    model: tuple[Params, Config], tokenizer: Tokenizer, structure: Structure | None, **options: Any
) -> tuple[str, str | None]:
    """The text, and its finish_reason."""
    pieces = list(stream_text(*model, tokenizer, "The answer is", structure=structure, **options))
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


PATTERNS = [
    r"\d{3}-\d{4}",
    "[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9})?",
    "(yes|no), because [^.]{1,30}\\.",
    "a{2,4}|b?",
    "(?i)hello",
    "é|ü+!",
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_text_is_what_the_regex_matches(
    model: tuple[Params, Config], tokenizer: Tokenizer, pattern: str, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature)
    text, reason = generated(
        model, tokenizer, Structure.regex(pattern), sampling=sampling, key=mx.random.key(1), max_tokens=60
    )
    assert reason == "stop"
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_one_of_the_choices_whatever_the_model_prefers(
    model: tuple[Params, Config], tokenizer: Tokenizer, temperature: float
) -> None:
    choices = ["Zürich", "Zürich-Nord", "Xanten"]
    sampling = Sampling(temperature=temperature, repetition_penalty=1.3)
    text, reason = generated(model, tokenizer, Structure.choice(choices), sampling=sampling, key=mx.random.key(2))
    assert text in choices
    assert reason == "stop"


def test_a_text_that_the_budget_cuts_says_so(model: tuple[Params, Config], tokenizer: Tokenizer) -> None:
    structure = Structure.regex("[a-z]{40}")
    assert generated(model, tokenizer, structure, max_tokens=3)[1] == "length"
    whole, reason = generated(model, tokenizer, structure, max_tokens=100)
    assert len(whole) == 40
    assert reason == "stop"


def test_a_text_that_is_whole_with_its_last_token_ends_with_stop(
    model: tuple[Params, Config], tokenizer: Tokenizer
) -> None:
    tokens = len(tokenizer.encode("A"))
    assert generated(model, tokenizer, Structure.choice(["A"]), max_tokens=tokens) == ("A", "stop")


def test_a_structure_that_allows_every_text_changes_nothing(model: tuple[Params, Config], tokenizer: Tokenizer) -> None:
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, frequency_penalty=0.2)):
        options: dict[str, Any] = {"sampling": sampling, "key": mx.random.key(5), "max_tokens": 40}
        free = generated(model, tokenizer, None, **options)
        assert generated(model, tokenizer, Structure.regex("(?s).*"), **options) == free


def test_a_token_that_stops_is_nowhere_inside_the_text(model: tuple[Params, Config], tokenizer: Tokenizer) -> None:
    """A user's own stop token too: where it could end the text early, another token is taken."""
    letter = tokenizer.encode("e")[0]
    matcher = TokenTrie(tokenizer, model[1].vocab_size, {letter}).matcher(Structure.regex("[a-z]{30}"))
    tokens = list(stream_tokens(*model, tokenizer.encode("The"), matcher=matcher, stop_tokens=[letter]))
    assert letter not in tokens
    assert re.fullmatch("[a-z]{30}", tokenizer.decode(tokens))


def test_a_structure_is_refused_before_anything_is_computed(model: tuple[Params, Config], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop token"):
        next(stream_text(*model, tokenizer, "x", structure=Structure.json_object(), stop_tokens=()))


# Structures


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=6))
@example(["\x80-s"])
def test_any_texts_can_be_chosen_among(trie: TokenTrie, tokenizer: Tokenizer, strings: list[str]) -> None:
    structure = Structure.choice(strings)
    for string in strings:
        matcher = trie.matcher(structure)
        for token in tokenizer.encode(string, add_special_tokens=False, literal=[(0, len(string))]):
            allowed = tokens_allowed(matcher)
            if token not in allowed:
                # Bytes that can't differ have one cut, which isn't the tokenizer's if what stands before decides that.
                assert len(allowed) == 1
                break
            matcher.advance(token)
        else:
            assert trie.stop_tokens <= set(tokens_allowed(matcher))
    tokens = [token for token, _ in followed(trie.matcher(structure), 0, 100)]
    assert tokenizer.decode(tokens) in strings


def test_structures_are_values() -> None:
    assert Structure.regex("a") == Structure.regex("a") != Structure.regex("b")
    assert len({Structure.json_object(), Structure.json_schema({"type": "object"})}) == 1


@pytest.mark.parametrize(
    "pattern", ["(", "(?=a)b", r"\bword\b", r"(a)\1", "\ud800", "x" * 20_000, "(" * 5000 + ")" * 5000, 5]
)
def test_a_regex_that_cannot_be_enforced_is_refused(pattern: Any) -> None:
    with pytest.raises(InputError, match="regular expression"):
        Structure.regex(pattern)


@pytest.mark.parametrize("strings", ["yes", [], ["\udc00"], [1], ["a"] * 2000, ["x" * 200_000]])
def test_choices_that_are_none_are_refused(strings: Any) -> None:
    with pytest.raises(InputError, match="choice"):
        Structure.choice(strings)


def test_a_structure_that_becomes_too_complex_ends_in_one_sentence(trie: TokenTrie) -> None:
    matcher = trie.matcher(Structure.regex("a{4294967295}"))
    start = time.perf_counter()
    with pytest.raises(GenerationError, match="structure"):
        for _ in followed(matcher, 0, 1000):
            pass
    assert time.perf_counter() - start < 5


def test_without_llguidance_a_structure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'dbrx-fn\[serve\]'"):
        Structure.json_object()


# Tokenizers


def test_dbrxs_vocabulary_is_ready_in_seconds(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(tmp_path)
    start = time.perf_counter()
    trie = TokenTrie(tokenizer, 100_352)
    assert time.perf_counter() - start < 20
    matcher = trie.matcher(Structure.json_schema({"type": "string"}))
    matcher.advance(tokenizer.encode('"')[0])
    allowed = set(tokens_allowed(matcher))
    assert len(allowed) > 90_000
    assert not allowed & set(tokenizer.control_tokens.values())
    assert max(allowed) < tokenizer.vocab_size


def test_a_normalizer_does_not_change_what_a_structure_prescribes(tmp_path: Path) -> None:
    """The tokenizer would make one character of the two, which is another text."""
    file = json.loads((SMALL / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, "normalizer": {"type": "NFC"}}))
    shutil.copy(SMALL / "tokenizer_config.json", tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    text = "cafe\u0301 au lait"
    assert tokenizer.decode(tokenizer.encode(text)) != text
    tokens = [token for token, _ in followed(TokenTrie(tokenizer, VOCAB).matcher(Structure.choice([text])), 0, 50)]
    assert tokenizer.decode(tokens) == text
