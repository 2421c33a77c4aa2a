"""Refuses untrusted regular expressions that can take much more than linear time.

The tokenizers library matches with Oniguruma, which backtracks and can't be interrupted. Accepted expressions take
linear time on ordinary text, whose words are short, and at most quadratic time on any text. A choice is called open if
something must follow it, since only then can it be tried again. The rules are:

- An alternative has at most one open part that repeats without limit. It doesn't match both letters and spaces, so it
  ends with the word.
- An alternative's other open choices have few combinations.
- A group of choices isn't repeated, unless nothing must follow it.
"""

import re
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers

from dbrx_fn.files.json_file import shown

_LONGEST = 4096
_DEEPEST = 8
_MOST_ALTERNATIVES = 256
_MOST_CHOICES, _MOST_BESIDE_UNLIMITED = 64, 8
_MOST_TIMES = 100
"""The largest count in braces."""

_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9a-fA-F]{1,8}\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|(?P<place>[AbBGzZ])|[dDwWsShHtnrfvae0]|[^\w\s])"
)
_OPENING = re.compile(r"\((?:\?(?P<kind>[=!>]|<[=!]|[im]*(?:-[im]+)?:)|(?!\?))")
_QUANTIFIER = re.compile(r"(?:(?P<sign>[*+?])|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})")


class RegexCostError(ValueError):
    """An expression that may take too long, or isn't understood. The text is a clause with the reason."""


@dataclass(frozen=True)
class _Part:
    """One part of a sequence: a character, a class, an anchor such as `$`, or a group, with its repetitions."""

    text: str
    least: int = 1
    most: int | None = 1
    possessive: bool = False
    place: bool = False
    kind: str = ""
    group: "tuple[tuple[_Part, ...], ...] | None" = None

    @property
    def required(self) -> bool:
        return self.place or self.least > 0


def check_regex(expression: str) -> bool:
    """Checks that the time of an expression for Oniguruma is bounded.

    Returns:
        Whether it can match the empty text, between two characters.

    Raises:
        RegexCostError: if its time isn't bounded, or it uses unsupported syntax, such as back references.
    """
    if len(expression) > _LONGEST:
        raise RegexCostError(f"it has {len(expression)} characters, more than {_LONGEST}")
    parser = _Parser(re.sub(r"\A\(\?[im]+\)", "", expression))
    alternatives = parser.alternatives(0)
    if parser.place < len(parser.text):
        raise RegexCostError("a parenthesis closes nothing")
    for alternative in alternatives:
        _check_sequence(alternative, is_open=False, looking=False)
    return any(map(_can_be_empty, alternatives))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self._bars = 0

    def alternatives(self, depth: int) -> tuple[tuple[_Part, ...], ...]:
        if depth > _DEEPEST:
            raise RegexCostError(f"its groups are nested more than {_DEEPEST} deep")
        found: list[tuple[_Part, ...]] = []
        parts: list[_Part] = []
        while self.place < len(self.text) and self.text[self.place] != ")":
            if self.text[self.place] == "|":
                self.place += 1
                self._bars += 1
                found.append(tuple(parts))
                parts = []
            else:
                parts.append(self._quantified(self._atom(depth)))
        if self._bars >= _MOST_ALTERNATIVES:
            raise RegexCostError(f"it has more than {_MOST_ALTERNATIVES} alternatives")
        return (*found, tuple(parts))

    def _atom(self, depth: int) -> _Part:
        character = self.text[self.place]
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._taken(self._class_end(self.place))
        if character == "\\":
            escape = _ESCAPE.match(self.text, self.place)
            if escape is None:
                raise RegexCostError(f"what {shown(self.text[self.place : self.place + 2])} does isn't known here")
            return self._taken(escape.end(), place=escape["place"] is not None)
        return self._taken(self.place + 1, place=character in "^$")

    def _taken(self, end: int, *, place: bool = False) -> _Part:
        start, self.place = self.place, end
        return _Part(self.text[start:end], place=place)

    def _group(self, depth: int) -> _Part:
        start = self.place
        opening = _OPENING.match(self.text, start)
        if opening is None:
            raise RegexCostError(f"the group {shown(self.text[start : start + 4])} isn't known here")
        self.place = opening.end()
        group = self.alternatives(depth + 1)
        if self.place == len(self.text):
            raise RegexCostError("a parenthesis isn't closed")
        self.place += 1
        kind = opening["kind"] or ""
        around = kind in ("=", "!", "<=", "<!")
        return _Part(self.text[start : self.place], place=around, kind=kind.rstrip(":"), group=group)

    def _class_end(self, start: int) -> int:
        place, depth = start, 0
        while place < len(self.text):
            character = self.text[place]
            if character == "\\":
                place += 1
            elif character == "[":
                depth += 1
                # A bracket in first place is a character of the class.
                place += len(re.match(r"\^?\]?", self.text[place + 1 :])[0])  # type: ignore[index]
            elif character == "]":
                depth -= 1
                if depth == 0:
                    return place + 1
            place += 1
        raise RegexCostError("a bracket isn't closed")

    def _quantified(self, part: _Part) -> _Part:
        bare = not part.place
        while found := _QUANTIFIER.match(self.text, self.place):
            if found["sign"] is None and not found["least"] and not found["most"]:
                break
            self.place = found.end()
            least, most = _times(found)
            suffix = self.text[self.place : self.place + 1]
            # As in Ruby, a plus after braces is another repetition.
            possessive = suffix == "+" and found["sign"] is not None
            if possessive or suffix == "?":
                self.place += 1
            repeated = part if bare else _Part(part.text, group=((part,),))
            part = replace(repeated, least=least, most=most, possessive=possessive)
            bare = False
        return part


def _times(found: re.Match[str]) -> tuple[int, int | None]:
    if found["sign"] is not None:
        return (0 if found["sign"] in "*?" else 1), (1 if found["sign"] == "?" else None)
    least = int(found["least"][:9] or 0)
    most = (int(found["most"][:9]) if found["most"] else None) if found["comma"] else least
    if max(least, most or 0) > _MOST_TIMES:
        raise RegexCostError(f"{found[0]} repeats more than {_MOST_TIMES} times")
    return least, most


def _check_sequence(parts: tuple[_Part, ...], *, is_open: bool, looking: bool) -> tuple[int, int]:
    """Checks a sequence from its end to its start.

    Args:
        parts: the sequence.
        is_open: whether something must follow it.
        looking: whether it only looks ahead or behind, so its text is matched again later.

    Returns:
        choices: number of its open choices, without unlimited repetitions.
        unlimited: number of its unlimited repetitions that may be matched again, without the last parts.
    """
    choices, unlimited = 1, 0
    for part in reversed(parts):
        more_choices, more_unlimited = _check_part(part, is_open=is_open, looking=looking)
        choices *= more_choices
        unlimited += more_unlimited
        if unlimited > 1:
            raise RegexCostError(f"{shown(part.text)} and a later part repeat without limit before something")
        most = _MOST_BESIDE_UNLIMITED if unlimited else _MOST_CHOICES
        if choices > most:
            raise RegexCostError(f"{shown(part.text)} and what follows leave more than {most} choices")
        is_open = is_open or part.required
    return choices, unlimited


def _check_part(part: _Part, *, is_open: bool, looking: bool) -> tuple[int, int]:
    if part.group is not None:
        return _check_group(part, part.group, is_open=is_open, looking=looking)
    if part.most is not None:
        return (part.most - part.least + 1 if is_open and not part.possessive else 1), 0
    if (is_open or looking) and _is_wide(part.text):
        raise RegexCostError(f"{shown(part.text)} repeats over whole lines before something")
    return 1, int(is_open or looking)


def _check_group(part: _Part, group: tuple[tuple[_Part, ...], ...], *, is_open: bool, looking: bool) -> tuple[int, int]:
    repeats = part.most is None or part.most > 1
    if repeats and (is_open or looking or part.least > 1) and (len(group) > 1 or not all(map(_is_fixed, group[0]))):
        raise RegexCostError(f"{shown(part.text)} repeats choices")
    if part.most is None and (is_open or looking):
        # The repeated part is fixed, so it is like a class of characters.
        for inner_part in group[0]:
            _check_part(replace(inner_part, most=None), is_open=is_open, looking=looking)
        return 1, 1
    alone = bool(part.kind and part.kind[0] in "=!<>") or repeats or part.possessive
    inner = [
        _check_sequence(alternative, is_open=is_open and not alone, looking=looking or part.place)
        for alternative in group
    ]
    unlimited = max(unlimited for _, unlimited in inner)
    if alone or not is_open:
        return (part.most - part.least + 1 if is_open and part.most is not None else 1), unlimited
    return sum(choices for choices, _ in inner) + (part.least == 0), unlimited


def _can_be_empty(parts: tuple[_Part, ...]) -> bool:
    return all(
        part.place or part.least == 0 or (part.group is not None and any(map(_can_be_empty, part.group)))
        for part in parts
    )


def _is_fixed(part: _Part) -> bool:
    """Whether the part can match in only one way."""
    inner = part.group is None or (len(part.group) == 1 and all(map(_is_fixed, part.group[0])))
    return part.least == part.most and inner


def _is_wide(text: str) -> bool:
    """Whether a class of characters contains both letters and spaces."""
    try:
        splitter = pre_tokenizers.Split(Regex(text), "removed")
        return not splitter.pre_tokenize_str("e ")
    except Exception as error:
        raise RegexCostError(f"{shown(text)} can't be read ({error})") from error
