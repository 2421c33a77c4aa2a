"""Distinguishes control tokens that a chat template writes from those that a message only spells.

Before rendering, a control token's text in a message gets a mark, and so does the beginning of one at a text's end. A
mark is a character that occurs nowhere else. After rendering, the marks are removed. Texts that held a mark are
literal: `Tokenizer.encode` makes no control token from them.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dbrx_fn.errors import InputError


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: the entire text.
        literal: ranges of characters, in order, that must not become control tokens (`Tokenizer.encode`).
    """

    text: str
    literal: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Texts:
    """Control tokens' texts, compiled for searching."""

    pattern: re.Pattern[str]
    starts: re.Pattern[str]
    beginnings: frozenset[str]
    longest: int


@lru_cache(maxsize=16)
def _texts(control_tokens: tuple[str, ...]) -> _Texts:
    longest_first = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)"
    beginnings = {text[:length] for text in control_tokens for length in range(1, len(text))}
    longest = max(map(len, control_tokens), default=0)
    return _Texts(re.compile(longest_first), re.compile(f"(?={longest_first})"), frozenset(beginnings), longest)


class Marks:
    """The marks of one conversation.

    Args:
        control_tokens: texts that must not become tokens in messages.
        values: all contents of messages, tools and template, as JSON's types. A mark must not occur there.

    Raises:
        InputError: if they use every character that could be a mark.
    """

    def __init__(self, control_tokens: Sequence[str], values: object) -> None:
        self._texts = _texts(tuple(control_tokens))
        strings = list(_strings(values))
        self._mark = ""
        if any(map(self._places, strings)):
            self._mark = _unused(strings)

    def __bool__(self) -> bool:
        """Whether any text gets a mark."""
        return bool(self._mark)

    def put_in(self, value: Any) -> Any:
        """The value with marks in its texts, at any depth. The keys of the outermost object are unchanged."""
        if not self._mark:
            return value
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        return self._marked(value)

    def take_out(self, text: str, places: Iterable[int] = ()) -> tuple[RenderedChat, list[int]]:
        """The text without marks, and the new positions of `places`.

        Args:
            text: the text rendered from marked values.
            places: positions in the text, in order.
        """
        if not self._mark:
            return RenderedChat(text), list(places)
        parts: list[str] = []
        marks: list[int] = []
        moved: list[int] = []
        wanted = list(places)
        start = length = 0
        for found in re.finditer(f"{self._mark}|{re.escape(_escaped(self._mark))}|\\Z", text):
            while len(moved) < len(wanted) and wanted[len(moved)] <= found.start():
                moved.append(length + wanted[len(moved)] - start)
            parts.append(text[start : found.start()])
            length += found.start() - start
            start = found.end()
            marks.append(length)
        plain = "".join(parts)
        return RenderedChat(plain, self._literal(plain, marks[:-1])), moved

    def _places(self, string: str) -> list[int]:
        places = [found.start() + 1 for found in self._texts.starts.finditer(string)]
        for length in range(min(self._texts.longest - 1, len(string)), 0, -1):
            if string[-length:] in self._texts.beginnings:
                places.append(len(string) - length + 1)
        return sorted(set(places))

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            places = [0, *self._places(value), len(value)]
            return self._mark.join(value[start:end] for start, end in itertools.pairwise(places))
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        return value

    def _literal(self, text: str, marks: list[int]) -> tuple[tuple[int, int], ...]:
        found = set()
        for mark in marks:
            for start in range(max(mark - self._texts.longest, 0), mark):
                match = self._texts.pattern.match(text, start)
                # A mark is put inside a text, or behind a text of a single character.
                if match is not None and (match.end() > mark or match.end() == mark == start + 1):
                    found.add(match.span())
        return tuple(sorted(found))


def _unused(strings: list[str]) -> str:
    used = set().union(*strings)
    # A mark may also appear as an escape in JSON.
    escapes = {found for string in strings for found in re.findall(r"\\u[ef][0-9a-f]{3}", string)}
    for mark in map(chr, range(0xE000, 0xF8FF)):
        if mark not in used and _escaped(mark) not in escapes:
            return mark
    raise InputError("The conversation uses all of Unicode's private characters: take some out.")


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
