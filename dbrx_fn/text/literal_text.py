"""Encodes text with literal ranges, which must not become control tokens, such as a user's words in a conversation."""

import bisect
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import tokenizers

from dbrx_fn.errors import InputError

Ranges = Sequence[tuple[int, int]]
"""Ranges of a text's characters as (start, end), without the end."""

_WORD = re.compile(r"\w")
_MOST_ROUNDS = 8
"""The most rounds. Each round leaves fewer wrong tokens, unless a normalizer removes the stand-in characters."""

_LONG = 4096
"""Characters from which on other threads can go on meanwhile: the library lets them in `encode_batch` alone."""

_Match = tuple[str, int, int]
"""A control token's text, its start and its end."""


def checked_ranges(text: str, literal: Ranges) -> list[tuple[int, int]]:
    """Returns the non-empty ranges, in order. Touching ranges are joined.

    Raises:
        InputError: if a range isn't within the text.
    """
    for start, end in literal:
        if not 0 <= start <= end <= len(text):
            raise InputError(
                f"The literal range {(start, end)} isn't inside of the text, which has {len(text)} characters: give a "
                "start and an end that are."
            )
    joined: list[tuple[int, int]] = []
    for start, end in sorted(literal):
        if start == end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def overlaps(start: int, end: int, ranges: Ranges) -> bool:
    """Returns whether the range (`start`, `end`) overlaps one of the ranges, which are in order."""
    place = bisect.bisect_left(ranges, (end, end))
    return place > 0 and ranges[place - 1][1] > start


def clipped(ranges: Ranges, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Returns the parts of the ranges within (`start`, `end`), relative to `start`. The ranges are in order."""
    inside = ranges[max(bisect.bisect_right(ranges, (start, start)) - 1, 0) : bisect.bisect_left(ranges, (end, end))]
    return tuple((max(a, start) - start, min(b, end) - start) for a, b in inside if b > start)


def find_tokens(
    text: str, names: Collection[str], control: Collection[str], literal: Ranges
) -> Iterator[tuple[str, int, int]]:
    """Yields tokens' texts in a text from left to right, the longest at each place, with their starts and ends.

    Args:
        text: the text to search.
        names: the tokens' texts.
        control: the texts that may not overlap the literal ranges.
        literal: the ranges, in order.
    """
    pattern = any_of(names)
    if pattern is None:
        return
    longest_first = sorted(names, key=len, reverse=True)
    place = 0
    while found := pattern.search(text, place):
        start = found.start()
        for name in longest_first:
            end = start + len(name)
            if text.startswith(name, start) and not (name in control and overlaps(start, end, literal)):
                yield name, start, end
                place = end
                break
        else:
            place = start + 1


def any_of(names: Collection[str]) -> re.Pattern[str] | None:
    """Returns a pattern for any of these texts, with the longest first, or None if there are no texts."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


class LiteralEncoder:
    """Encodes literal ranges with a tokenizer of the tokenizers library.

    The library finds the control tokens outside of the ranges, in a copy of the text with stand-in characters in the
    ranges. A second tokenizer, for which control tokens are ordinary text, encodes the text between those tokens. Both
    are made when a range first holds a control token's text.

    Args:
        backend: the tokenizer.
        control: the control tokens' texts and ids. All must be added tokens of the backend.

    Raises:
        ValueError: if the added tokens use every possible stand-in character.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: Mapping[str, int]) -> None:
        self._backend = backend
        self._control = control
        self._added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        used = {character for content in self._added for character in content}
        # Normalizers don't change these characters or join them with their neighbours.
        self._letter = _unused(range(0xA000, 0xA48D), used)
        self._symbol = _unused(range(0xE000, 0xF8FF), used)
        self._numbers = frozenset(control.values())
        exact = not any(self._has_other_spellings(content) for content in control)
        self._pattern = any_of(control) if exact else re.compile("")

    def encode(self, text: str, literal: Ranges) -> list[int]:
        """Returns a text's tokens. Its literal ranges, which are in order, don't become control tokens."""
        if not self._can_match(text, literal):
            return _ids(self._backend, text)
        control_tokens = self._outside(text, literal)
        if control_tokens == self._find(text):
            tokens = _ids(self._backend, text)
            # The model makes further ones if its own vocabulary has their texts.
            if [number for number in tokens if number in self._numbers] == self._ids_of(control_tokens):
                return tokens
        return self._encode_between(text, control_tokens)

    def _has_other_spellings(self, content: str) -> bool:
        """Returns whether a text that doesn't hold this control token's text can become the token."""
        model = self._backend.model
        by_model = model.token_to_id(content) is not None
        # Byte-level models spell each byte with one character, which only for ASCII is the text's own.
        if by_model and (model.byte_fallback or not content.isascii()):
            return True
        return self._backend.normalizer is not None and (by_model or self._added[content].normalized)

    def _ids_of(self, control_tokens: list[_Match]) -> list[int]:
        return [self._control[content] for content, _, _ in control_tokens]

    def _can_match(self, text: str, literal: Ranges) -> bool:
        if self._pattern is None or not literal:
            return False
        place = 0
        while found := self._pattern.search(text, place):
            if overlaps(found.start(), max(found.end(), found.start() + 1), literal):
                return True
            place = found.start() + 1
        return False

    def _encode_between(self, text: str, control_tokens: list[_Match]) -> list[int]:
        tokens: list[int] = []
        place = 0
        for content, start, end in control_tokens:
            tokens += _ids(self._plain, text[place:start])
            tokens.append(self._control[content])
            place = end
        return tokens + _ids(self._plain, text[place:])

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return without_control_tokens(self._backend, self._control)

    @cached_property
    def _finder(self) -> tokenizers.Tokenizer:
        return finder(self._backend)

    @cached_property
    def _found_names(self) -> dict[int, str]:
        # `id_to_token` gives a normalized token's text as the normalizer leaves it.
        return {number: token.content for number, token in self._finder.get_added_tokens_decoder().items()}

    def _find(self, text: str) -> list[_Match]:
        """Returns the control tokens in a text, including the white space that they take."""
        encoding = _encoded(self._finder, text)
        named = zip(map(self._found_names.__getitem__, encoding.ids), encoding.offsets, strict=True)
        return [(content, *place) for content, place in named if content in self._control]

    def _outside(self, text: str, literal: Ranges) -> list[_Match]:
        """Returns the control tokens that don't overlap the ranges."""
        masked = list(text)
        for start, end in literal:
            masked[start:end] = [self._mask(character) for character in masked[start:end]]
        for _ in range(_MOST_ROUNDS):
            found = self._find("".join(masked))
            wrong = [match for match in found if overlaps(*self._core(text, *match), literal)]
            if not wrong:
                break
            # White space in the ranges is unchanged, and can be part of a control token's text.
            for _, start, end in wrong:
                for first, last in literal:
                    for place in range(max(start, first), min(end, last)):
                        masked[place] = self._symbol
        return [match for match in found if match not in wrong]

    def _mask(self, character: str) -> str:
        if character.isspace():
            return character
        return self._letter if _WORD.match(character) else self._symbol

    def _core(self, text: str, content: str, start: int, end: int) -> tuple[int, int]:
        """Returns a match's start and end without the surrounding white space that its flags include."""
        taken = text[start:end]
        if self._added[content].lstrip:
            start += len(taken) - len(taken.lstrip())
        if self._added[content].rstrip:
            end -= len(taken) - len(taken.rstrip())
        return start, max(start, end)


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(_encoded(tokenizer, text).ids)


def _encoded(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    if len(text) < _LONG:
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _unused(codes: range, used: Collection[str]) -> str:
    for code in codes:
        if chr(code) not in used:
            return chr(code)
    raise ValueError("the added tokens use all letters or symbols that stand for others")


def finder(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a tokenizer that finds the same added tokens, and nothing else."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    if backend.normalizer is not None:
        found.normalizer = backend.normalizer
    found.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return found


def without_control_tokens(backend: tokenizers.Tokenizer, control: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Returns a copy of a tokenizer for which control tokens' texts are ordinary text."""
    content = json.loads(backend.to_str())
    model = content["model"]
    # The model itself can make a control token if its vocabulary has that text.
    names = {name: f"{name}\ue000" for name in control if name in model["vocab"]}
    model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if not names.keys() & {*pair, "".join(pair)}]
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in control]
    # The library numbers added tokens by their order, except those in the model's vocabulary.
    model["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    return tokenizers.Tokenizer.from_str(json.dumps(content))
