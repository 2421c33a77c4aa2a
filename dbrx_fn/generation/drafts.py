"""Drafts of the next tokens, by n-gram lookup in the text so far, and when it pays to verify them.

`Ngrams` finds what followed the last time that the text's end occurred. `Pace` measures how often that is right and how
long passes take. `Drafter` is both of them for one generation.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence

from dbrx_fn.runtime.device import backend

_SIZES = (16, 4)
"""How many of the last tokens must occur again. The larger number is tried first."""
WIDTHS = (8, 16, 32)
"""Numbers of tokens in a verifying pass: the last token and its draft."""
_GUESSES_ON_CPU, _GUESSES = (6.0, 9.0, 13.0), (3.2, 3.8, 4.5)
"""Their times until these are measured, in passes of one token. A CPU has a kernel for single tokens only."""
_MARGIN = 1.1
"""A verifying pass must promise this many times the tokens per second of single ones, since it can't overlap them."""
_FADING = 0.95
"""What each drafted token leaves of the weight of those before it."""
_REMEMBERED = 9
"""Passes whose median is the time."""


class Ngrams:
    """A text, and the last place of each run of few tokens in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Adds the text's next token."""
        for size in _SIZES:
            if len(self._tokens) >= size:
                self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """The `count` tokens that followed the text's end when it last occurred; none if it is new.

        A draft that reaches the end of the text goes on with its own tokens, as in a text that repeats itself.
        """
        for size in _SIZES:
            start = self._behind.get(tuple(self._tokens[-size:]))
            if start is not None:
                drafted = self._tokens[start : start + count]
                period = len(self._tokens) - start
                while len(drafted) < count:
                    drafted.append(drafted[-period])
                return drafted
        return []


class Pace:
    """Which pass gives most tokens per second, by how often drafts were right lately and by each pass's time.

    Args:
        widths: numbers of tokens in the verifying passes, ascending.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = tuple(widths)
        # One miss at first: the first few drafts prove little.
        self._right, self._compared = 0.0, 1.0
        self._times = {width: deque[float](maxlen=_REMEMBERED) for width in (1, *widths)}
        self._guesses = dict(zip(WIDTHS, _GUESSES_ON_CPU if backend() == "cpu" else _GUESSES, strict=True))

    def compare(self, right: bool) -> None:
        """Notes whether a drafted token was the one that came."""
        self._right = self._right * _FADING + right
        self._compared = self._compared * _FADING + 1

    def note_time(self, width: int, seconds: float) -> None:
        """Notes the time of a pass over `width` tokens."""
        self._times[width].append(seconds)

    def width(self, left: int) -> int:
        """The width of the best pass. 1 if no verifying pass pays, and before single tokens have been timed twice.

        Args:
            left: how many tokens the generation may still make.
        """
        if len(self._times[1]) < 2:
            return 1
        single = statistics.median(self._times[1])
        best, rate = 1, _MARGIN / single
        for width in self._widths:
            times = self._times[width]
            time = statistics.median(times) if times else single * self._guess(width)
            found = self._expected(min(width, left)) / time
            if found > rate:
                best, rate = width, found
        return best

    def _expected(self, most: int) -> float:
        """The mean number of tokens that a pass gives, at most `most`, if drafts are right as often as lately."""
        right = self._right / self._compared
        return sum(right**drafted for drafted in range(most))

    def _guess(self, width: int) -> float:
        return next(guess for most, guess in self._guesses.items() if width <= most)


class Drafter:
    """The drafts of one generation.

    Drafts are always looked up and compared with the tokens that come, which costs next to nothing. So it is known how
    often they are right before a pass verifies any.

    Args:
        widths: numbers of tokens in the verifying passes, ascending.
        prompt: the text before the first token.
    """

    def __init__(self, widths: Sequence[int], prompt: Sequence[int]) -> None:
        self.pace = Pace(widths)
        self._longest = max(widths) - 1
        self._text = Ngrams(prompt)
        self._expected = deque(self._text.draft(self._longest))

    def push(self, token: int) -> None:
        """Adds the token that came to the text."""
        if self._expected:
            right = self._expected.popleft() == token
            self.pace.compare(right)
            if not right:
                self._expected.clear()
        self._text.push(token)
        if not self._expected:
            self._expected.extend(self._text.draft(self._longest))

    def width(self, left: int) -> int:
        """The number of tokens that the next pass should take. 1 means that there is no draft, or that none pays.

        Args:
            left: how many tokens the generation may still make.
        """
        return self.pace.width(left) if self._expected else 1

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens, of which at least one must be expected."""
        if len(self._expected) < count:
            self._expected = deque(self._text.draft(self._longest))
        return [self._expected[n] for n in range(count)]
