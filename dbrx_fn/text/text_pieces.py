"""Cuts long texts at places where tokens end, so they can be tokenized in little memory."""

import re
from collections.abc import Collection, Iterator
from unicodedata import ucd_3_2_0

from dbrx_fn.text.literal_text import any_of

PIECE = 2**16
"""Characters per piece. The tokenizers library takes some MiB for a piece, and 2.9 GiB for 20 MB of text at once."""

LONGEST_PIECE = 2**17
"""The number of characters after which a text is cut at any place."""

# Places for a cut, the most common first: before a space, after a line feed, after a letter or a digit.
_PLACES = (re.compile(r"(?<=\S)(?= )"), re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=[^\W_])(?=[\s\S])"))
_APOSTROPHES = "'\u2019"


def text_pieces(
    text: str, size: int = PIECE, longest: int = LONGEST_PIECE, whole: Collection[str] = ()
) -> Iterator[str]:
    """Cuts a text into pieces of about `size` characters, whose tokens together are those of the whole text.

    Byte-level tokenizers split a text into words by a pattern, and make tokens only within words. So a cut is safe
    where the pattern always ends a word. The patterns of GPT-2, cl100k and o200k don't look at text before a word, and
    look beyond its end only if the word is white space. For them these cuts are safe:

    - before a space that follows a character other than white space: in a word, spaces are only in front or among white
      space;
    - after a line feed between two characters that aren't white space: a line feed joins the word before it (and a
      slash after it, so there is no cut before a slash);
    - between a letter and another kind of character, or a digit and another kind: letters form words with letters only,
      digits with digits. Here the other kinds are white space, punctuation and symbols. Apostrophes, which are parts of
      contractions, and marks are left out. Categories are those of Unicode 3.2, which all tokenizers know.

    If `longest` characters have no such place, as in a run of one letter, the text is cut after them. Tokens beside
    such a cut can differ from the whole text's.

    Args:
        text: any text.
        size: characters per piece, except for the last.
        longest: the most characters per piece, at least `size`.
        whole: texts of added tokens. They aren't cut, or separated from white space beside them, which they may take.
    """
    pattern = any_of(whole)
    reach = max(map(len, whole), default=0)
    start = 0
    while len(text) - start > size:
        end = start + size
        most = min(start + longest, len(text))
        while end < most:
            window = min(end + size, most)
            places = (match.start() for place in _PLACES for match in place.finditer(text, end, window))
            found = next((place for place in places if _is_safe(text, place, pattern, reach)), None)
            if found is not None:
                end = found
                break
            end = window
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _is_safe(text: str, place: int, whole: re.Pattern[str] | None, reach: int) -> bool:
    before, behind = text[place - 1], text[place]
    if behind == " ":
        safe = _is_visible(before)
    elif before == "\n":
        safe = place > 1 and _is_visible(text[place - 2]) and _is_visible(behind) and behind != "/"
    else:
        kind, next_kind = ucd_3_2_0.category(before), ucd_3_2_0.category(behind)
        ends = next_kind[0] in "PSZ" or behind in "\t\n\r"
        if kind[0] == "L":
            safe = (ends and behind not in _APOSTROPHES) or next_kind == "Nd"
        else:
            safe = kind == "Nd" and (ends or next_kind[0] == "L")
    return safe and (whole is None or not _touches(text, place, whole, reach))


def _is_visible(character: str) -> bool:
    return character.isprintable() and not character.isspace()


def _touches(text: str, place: int, whole: re.Pattern[str], reach: int) -> bool:
    """Whether a text of `whole` covers or touches the place, or the white space there."""
    left = place - (text[place - 1].isspace())
    right = place
    while right < len(text) and text[right].isspace():
        right += 1
    found = whole.search(text, max(left - reach, 0))
    while found is not None and found.start() <= right:
        if found.end() >= left:
            return True
        found = whole.search(text, found.start() + 1)
    return False
