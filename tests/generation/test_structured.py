"""Structured output: which tokens may come next, and which structures are refused."""

from collections.abc import Iterator

import numpy as np
import pytest

from dbrx_fn import SMALL, GenerationError, InputError, Tokenizer, load_tokenizer
from dbrx_fn.generation.structured import Matcher, Structure, TokenTrie, token_trie

VOCAB = 4100
"""More than the tokenizer has."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SMALL)


@pytest.fixture(scope="module")
def trie(tokenizer: Tokenizer) -> TokenTrie:
    return token_trie(tokenizer, VOCAB)


def tokens_allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def followed(matcher: Matcher, seed: int, most: int) -> Iterator[tuple[int, list[int]]]:
    """Tokens chosen at random, and those that were allowed with each."""
    random = np.random.default_rng(seed)
    for _ in range(most):
        if matcher.finished:
            return
        allowed = tokens_allowed(matcher)
        token = int(random.choice(allowed))
        yield token, allowed
        matcher.advance(token)


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
