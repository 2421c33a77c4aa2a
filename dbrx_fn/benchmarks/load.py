"""The load of a serving benchmark: arrival times, lengths of prompts and answers, and the prompts' words.

Everything is drawn from a seed. Lengths are the same under every load, so loads can be compared. Texts differ, since a
server could have cached the prefix of an earlier prompt.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dbrx_fn.errors import InputError

_LONGEST = 4
"""Lengths are cut at this many times the median, so that a single one doesn't dominate a run."""

_WIDEST = 3

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system question work night point home water room mother area money story fact month lot right
study book eye job word business issue side kind head house service friend father power hour game line end member law
car city name team minute idea body back parent face level office door health person art war history party result
change morning reason research girl guy moment air teacher force education
"""


@dataclass(frozen=True)
class Load:
    """Either `rate`, of independent arrivals a second, or `clients`, each with one request at a time."""

    rate: float | None = None
    clients: int | None = None

    def __str__(self) -> str:
        if self.clients is None:
            return f"{self.rate:g}/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"


def loads_of(rates: Sequence[float] | None, clients: Sequence[int] | None) -> list[Load]:
    """The loads that are asked for.

    Raises:
        InputError: if a rate isn't positive.
    """
    if clients is not None:
        return [Load(clients=count) for count in clients]
    for rate in rates or ():
        if not 0 < rate < math.inf:
            raise InputError(f"--rate is {rate:g} where it must be a number above 0.")
    return [Load(rate=rate) for rate in rates or (1.0, 2.0, 4.0)]


@dataclass(frozen=True)
class Limits:
    """The limits of a good answer, in seconds: to its first text, and from each text to the next.

    Raises:
        InputError: if one of them isn't positive.
    """

    first: float
    between: float

    def __post_init__(self) -> None:
        for name, value in (("--ttft", self.first), ("--gap", self.between)):
            if not value > 0:
                raise InputError(f"{name} is {value:g} where it must be a number above 0.")


@dataclass(frozen=True)
class Workload:
    """The requests of each load.

    `prompt`, `answer`: medians of lengths, in tokens. `spread`: standard deviation of the lengths' logarithms; 0 gives
    all requests the medians.

    Raises:
        InputError: if the spread or the seed is out of range.
    """

    requests: int
    prompt: int
    answer: int
    spread: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= _WIDEST:
            raise InputError(f"--spread is {self.spread:g} where it must be from 0 to {_WIDEST}.")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed} where it must be at least 0.")

    def prompts(self) -> list[int]:
        """Number of tokens of each request's prompt."""
        return self._lengths(self.prompt, 0)

    def answers(self) -> list[int]:
        """Number of tokens of each request's answer."""
        return self._lengths(self.answer, 1)

    def arrivals(self, rate: float) -> list[float]:
        """Seconds at which requests arrive, as a Poisson process with `rate` of them a second."""
        return list(accumulate(np.random.default_rng([self.seed, 2]).exponential(1 / rate, self.requests).tolist()))

    def words(self, number: int) -> Iterator[str]:
        """An endless stream of words for the prompts of the load with this number."""
        drawn, words = np.random.default_rng([self.seed, 3, number]), _TEXT.split()
        while True:
            yield from (words[index] for index in drawn.integers(len(words), size=256))

    def _lengths(self, median: int, stream: int) -> list[int]:
        factors = np.random.default_rng([self.seed, stream]).lognormal(0, self.spread, self.requests)
        return [max(1, round(median * min(factor, _LONGEST))) for factor in factors.tolist()]
