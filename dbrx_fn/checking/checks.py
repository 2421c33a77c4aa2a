"""Checks, and running them within a time limit. Each check gets an outcome."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import shorten

import mlx.core as mx
from tqdm import tqdm

from dbrx_fn.checking.comparison import Comparison
from dbrx_fn.runtime.device import Backend, as_if


@dataclass(frozen=True)
class Check:
    """A computation to compare with the reference.

    `group`: its row of the report.
    `case`: a description with which a developer can repeat it.
    `limit`: the largest error that counts as right.
    `compared`: computes the comparison.
    `backend`, `compiles`, `kernels`: as in `as_if`.
    `family`: a name that checks share if they need the same kernels; the group's if empty. One process makes them.
    """

    group: str
    case: str
    limit: float
    compared: Callable[[], Comparison]
    backend: Backend | None = None
    compiles: bool | None = None
    kernels: bool | None = None
    family: str = ""


@dataclass(frozen=True)
class Outcome:
    """A check's outcome: a comparison, or the reason why there is none; and its time in seconds."""

    check: Check
    seconds: float = 0.0
    compared: Comparison | None = None
    problem: str | None = None

    @property
    def left_out(self) -> bool:
        """Whether the check didn't run to its end, for lack of time."""
        return self.compared is None and self.problem is None

    @property
    def wrong(self) -> bool:
        """Whether the check ran, and its result isn't right."""
        if self.compared is None:
            return self.problem is not None
        # A comparison with NaN is false, so NaN counts as wrong.
        return not self.compared.error <= self.check.limit


def run_checks(checks: Sequence[Check], until: float) -> list[Outcome]:
    """Runs checks in order. Those that would start after `until` (`time.monotonic`) are left out."""
    shown: Iterable[Check] = tqdm(checks, desc="checking", unit="check", disable=None, leave=False)
    return [outcome_of(check) if time.monotonic() < until else Outcome(check) for check in shown]


def outcome_of(check: Check) -> Outcome:
    """Runs a check in this process."""
    start = time.monotonic()
    compared, problem = None, None
    try:
        with as_if(backend=check.backend, compiles=check.compiles, kernels=check.kernels):
            compared = check.compared()
    # The report shows every error.
    except Exception as error:
        problem = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
        mx.clear_cache()
    return Outcome(check, time.monotonic() - start, compared, problem)
