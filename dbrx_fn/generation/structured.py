"""Structured output: texts that must be JSON, fit a JSON schema, match a regular expression, or be one of some strings.

A `Structure` describes the text. A `Matcher` follows one text and gives the tokens that may come next. `sample` and
`sample_rows` choose among these. A matcher needs a `TokenTrie`, which is made once per tokenizer.

llguidance (https://github.com/guidance-ai/llguidance) does the matching. The rest of the package works without it.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.errors import GenerationError, InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.generation.json_schema import Schema, described, enforceable
from dbrx_fn.generation.schema_refusal import refused_keyword
from dbrx_fn.text.library_errors import library_errors, one_line
from dbrx_fn.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_LARGEST = 128 * 2**10
"""The most characters of a structure. `json_schema` bounds other causes of costly compilation."""

_LONGEST_REGEX = 10_000
"""The most characters of a regular expression. The time to compile it grows with their square."""

_MOST_CHOICES = 1000
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""A grammar's limits: work to compile it, work for one token, and states in memory, of 1 to 2 KB each."""

_JSON_OPTIONS: dict[str, Any] = {
    # If white space may continue without end, a weak model may generate nothing else.
    "whitespace_pattern": r" |\r?\n[ \t]{0,32}",
    # A key with a \u escape could spell another property's name, whose schema its value need not fit.
    "json_allowed_escapes": 'nrbtf\\"',
}


_PLAINER = {
    "NoExtensionBias": "no text fits it",
    "coerce_one_of": "it isn't certain that its branches exclude each other, as different types or constants do",
}
"""The reason to give if llguidance's error contains these words."""


@dataclass(frozen=True)
class Structure:
    """The form of an entire text. Its static methods make one.

    `grammar`: the form as llguidance reads it.
    """

    grammar: str

    @staticmethod
    def json_object() -> "Structure":
        """Any JSON object.

        Raises:
            InputError: if llguidance isn't installed.
        """
        return Structure.json_schema({"type": "object"})

    @staticmethod
    def json_schema(schema: Schema) -> "Structure":
        """JSON that is valid under a schema, with properties in the schema's order.

        Args:
            schema: as parsed from JSON, of a draft from 4 to 2020-12.

        Raises:
            InputError: if the schema isn't valid, too costly, or holds what can't be enforced: the message names the
                keyword. If llguidance isn't installed.
        """
        if not isinstance(schema, dict):
            raise InputError(f"The JSON schema is {shown(schema)} where an object is expected.")
        try:
            _check_size("JSON schema", json.dumps(schema, allow_nan=False))
            written = enforceable(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The JSON schema can't be written as JSON ({one_line(str(error))}).") from None
        refusal = _schema_refusal(written)
        if refusal is not None:
            path = refused_keyword(written, _schema_refusal)
            keyword = "" if path is None else f"'s {described(path)}"
            raise InputError(f"The JSON schema{keyword} can't be enforced ({refusal}).")
        return Structure(_json_grammar(written))

    @staticmethod
    def regex(pattern: str) -> "Structure":
        """A text that a regular expression matches completely.

        Args:
            pattern: in the syntax of Rust's crate regex (https://docs.rs/regex/latest/regex/#syntax), without
                look-around and word boundaries.

        Raises:
            InputError: if the pattern isn't valid, too costly, or holds what can't be enforced. If llguidance isn't
                installed.
        """
        _check_text("regular expression", pattern, _LONGEST_REGEX)
        grammar = _library().LLMatcher.grammar_from_regex(pattern)
        refusal = _refusal(grammar)
        if refusal is not None:
            raise InputError(f"The regular expression {shown(pattern)} can't be enforced ({refusal}).")
        return Structure(grammar)

    @staticmethod
    def choice(strings: Sequence[str]) -> "Structure":
        """One of the strings.

        Raises:
            InputError: if there are none, or too many. If llguidance isn't installed.
        """
        if isinstance(strings, str) or not 1 <= len(strings) <= _MOST_CHOICES:
            raise InputError(f"The choices are {shown(strings)} where 1 to {_MOST_CHOICES} strings are expected.")
        for string in strings:
            _check_text("choice", string)
        _check_size("choices", "".join(strings))
        grammar = _library().LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, strings))}")
        refusal = _refusal(grammar)
        if refusal is not None:
            raise InputError(f"The choices {shown(list(strings))} can't be enforced ({refusal}).")
        return Structure(grammar)


class TokenTrie:
    """A tokenizer's vocabulary as llguidance needs it. It is made once, which takes a second for 100,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Iterable[int] | None = None) -> None:
        """
        Args:
            tokenizer: the checkpoint's.
            vocab_size: the model's. Ids that the tokenizer doesn't have are never allowed.
            stop_tokens: ids that are allowed only at the end of a text. The default is the tokenizer's.

        Raises:
            InputError: if there is no stop token, or llguidance isn't installed.
        """
        known = min(vocab_size, tokenizer.vocab_size)
        stops = tokenizer.stop_tokens if stop_tokens is None else stop_tokens
        self.stop_tokens = frozenset(token for token in stops if token < known)
        if not self.stop_tokens:
            raise InputError("A structure needs a token that ends the text: give a stop token of the vocabulary.")
        self._words = -(-vocab_size // 32)
        self._tokens = _Encoder(tokenizer, known, self.stop_tokens).trie

    def matcher(self, structure: Structure) -> "Matcher":
        """A matcher for a new text.

        Raises:
            InputError: if the structure is too complex for this vocabulary.
        """
        matcher = _new_matcher(self._tokens, structure.grammar)
        if matcher.is_error():
            raise InputError(f"The structure is too complex for this vocabulary ({_reason(matcher)}).")
        return Matcher(matcher, self._words, self._tokens.vocab_size, self.stop_tokens)


@functools.lru_cache(maxsize=4)
def token_trie(tokenizer: Tokenizer, vocab_size: int, stop_tokens: frozenset[int] | None = None) -> TokenTrie:
    """The `TokenTrie` of these, made once.

    Raises:
        InputError: as `TokenTrie`.
    """
    return TokenTrie(tokenizer, vocab_size, stop_tokens)


class Matcher:
    """Follows one text as it is generated. It isn't thread-safe."""

    def __init__(self, matcher: "llguidance.LLMatcher", words: int, known: int, stop_tokens: frozenset[int]) -> None:
        self.stop_tokens = stop_tokens
        self._matcher = matcher
        self._words = words
        self._known = known

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and only a stop token can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> NDArray[np.uint32]:
        """The tokens that may come next, uint32 `[words]`: one bit per token, 32 per word, the lowest bit first.

        Stop tokens are allowed where the text may end, and nowhere else.

        Raises:
            GenerationError: if no token fits, or the search exceeds its limit of work.
        """
        words = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, -(-self._known // 32) * words.itemsize)
        # After an error llguidance allows a stop token, so the error must be checked.
        self._check()
        return words

    def advance(self, token: int) -> None:
        """Advances past a token.

        Raises:
            GenerationError: if the token isn't allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def rewind(self, count: int) -> None:
        """Takes back the last `count` tokens.

        Raises:
            GenerationError: if there are fewer.
        """
        self._matcher.rollback(count)
        self._check()

    def copy(self) -> "Matcher":
        """A second matcher at the same place of the text."""
        return Matcher(self._matcher.deep_copy(), self._words, self._known, self.stop_tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(
                f"The text can't go on as its structure asks ({_reason(self._matcher)}): change the structure."
            )


class _Encoder:
    """The tokenizer's interface for llguidance: its tokens, and the encoding of text that the structure prescribes."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, known: int, stop_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)]
        control = {token for token in tokenizer.control_tokens.values() if token < known}
        self.special_token_ids = sorted(stop_tokens | control)
        self.eos_token_id = self.special_token_ids[0]
        library = _library()
        self.trie: llguidance.LLTokenizer = library.LLTokenizer(
            library.TokenizerWrapper(self), eos_token=sorted(stop_tokens)
        )

    def __call__(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=False, literal=[(0, len(text))])
        if b"".join(self.tokens[token] for token in tokens if token < len(self.tokens)) == text.encode():
            return tokens
        # A normalizer has changed the text.
        return self.trie.greedy_tokenize(text)


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            f"A structure needs llguidance, which can't be imported ({error}): pip install 'dbrx-fn[serve]'."
        ) from None
    return llguidance


def _new_matcher(tokens: "llguidance.LLTokenizer", grammar: str) -> "llguidance.LLMatcher":
    """A matcher. It holds an error if it can't be made, or can't find its first tokens."""
    library = _library()
    matcher: llguidance.LLMatcher = library.LLMatcher(
        tokens, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS)
    )
    matcher.compute_bitmask()
    return matcher


def _reason(matcher: "llguidance.LLMatcher") -> str:
    error = matcher.get_error()
    return next((ours for theirs, ours in _PLAINER.items() if theirs in error), None) or one_line(
        error.removesuffix("<non-verbose/>")
    )


@functools.cache
def _bytes() -> "llguidance.LLTokenizer":
    """The smallest vocabulary, for trying structures."""
    tokens: llguidance.LLTokenizer = _library().LLTokenizer("byte")
    return tokens


def _json_grammar(schema: Schema) -> str:
    with library_errors("The JSON schema can't be read", "change it", InputError):
        grammar: str = _library().LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        return grammar


def _schema_refusal(schema: Schema) -> str | None:
    return _refusal(_json_grammar(schema))


def _refusal(grammar: str) -> str | None:
    """Why llguidance refuses this grammar, or can't enforce all of it; `None` if it can."""
    with library_errors("The structure can't be enforced", "change it", InputError):
        matcher = _new_matcher(_bytes(), grammar)
        warnings = matcher.get_grammar_warnings()
        if matcher.is_error():
            return _reason(matcher)
        return one_line(warnings[0]) if warnings else None


def _check_text(name: str, text: str, most: int = _LARGEST) -> None:
    if not isinstance(text, str):
        raise InputError(f"The {name} is {shown(text)} where a text is expected.")
    if text.encode(errors="replace").decode() != text:
        raise InputError(f"The {name} {shown(text)} holds a lone surrogate, half of a character: change it.")
    _check_size(name, text, most)


def _check_size(name: str, text: str, most: int = _LARGEST) -> None:
    if len(text) > most:
        raise InputError(f"The {name} has {len(text)} characters where {most} are the most: shorten it.")
