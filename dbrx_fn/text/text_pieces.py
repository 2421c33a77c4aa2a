"""Cuts long texts where tokens end anyway, so that they are made into tokens in little memory."""

import re
from collections.abc import Collection, Iterator
from unicodedata import ucd_3_2_0

from dbrx_fn.text.literal_text import any_of

PIECE = 2**16
"""Characters. The tokenizers library took 2.9 GiB for 20 MB of text at once, and some MiB for pieces of this size."""

LONGEST_PIECE = 2**17
"""Characters after which a text is cut anywhere."""

# Where a cut can be, the likeliest first: before a space, behind a line feed, behind a letter or a digit.
_PLACES = (re.compile(r"(?<=\S)(?= )"), re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=[^\W_])(?=[\s\S])"))
_APOSTROPHES = "'\u2019"


def text_pieces(
    text: str, size: int = PIECE, longest: int = LONGEST_PIECE, whole: Collection[str] = ()
) -> Iterator[str]:
    """Cuts a text into pieces of `size` characters or some more, whose tokens together are those of the whole.

    Byte-level tokenizers cut a text into words by a pattern, and make tokens within words only. So a cut is safe where
    the pattern ends a word whatever comes before and after. The patterns of GPT-2, cl100k and o200k look at nothing
    before a word, and beyond its end only where the word is white space. For them these cuts are safe:

    - before a space, behind anything but white space: no word has a space elsewhere than in front or among white space;
    - behind a line feed between two characters that aren't white space: a line feed goes with what is before it (and
      with a slash behind it, where no cut is);
    - between a letter and what is no letter, or a digit and what is none: letters make words with letters only, and
      digits with digits. Here white space, punctuation and symbols count as neither; apostrophes, which are parts of
      contractions, and marks are left alone. Categories are those of Unicode 3.2, which all tokenizers know.

    Where `longest` characters have no such place, as in a run of one letter, the text is cut after them. Tokens beside
    such a cut can be others than the whole's.

    Args:
        text: any text.
        size: characters of a piece, if it isn't the last.
        longest: the most characters of a piece, not less than `size`.
        whole: texts of added tokens: none is cut, or parted from the white space beside it, which it can take.
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
    """Whether a text that must stay whole covers the place or the white space there, or begins or ends beside it."""
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
