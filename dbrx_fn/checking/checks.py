"""A check, and running many of them: each to an outcome, within a time."""

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
    """Something to compute and compare.

    `group`: the report's row that it belongs to.
    `case`: what is computed there, so that a developer can do it again.
    `limit`: of the error.
    `compared`: computes it.
    `backend`, `compiles`, `kernels`: as for `as_if`.
    """

    group: str
    case: str
    limit: float
    compared: Callable[[], Comparison]
    backend: Backend | None = None
    compiles: bool | None = None
    kernels: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a check: a comparison, or why there is none. Seconds."""

    check: Check
    seconds: float = 0.0
    compared: Comparison | None = None
    problem: str | None = None

    @property
    def left_out(self) -> bool:
        """Whether there was no time for it."""
        return self.compared is None and self.problem is None

    @property
    def wrong(self) -> bool:
        """Whether it was computed, and not right."""
        if self.compared is None:
            return self.problem is not None
        # NaN is not below anything.
        return not self.compared.error <= self.check.limit


def run_checks(checks: Sequence[Check], until: float) -> list[Outcome]:
    """Runs checks in their order; those that would begin after `until` (`time.monotonic`) are left out."""
    shown: Iterable[Check] = tqdm(checks, desc="checking", unit="check", disable=None, leave=False)
    return [_outcome(check) if time.monotonic() < until else Outcome(check) for check in shown]


def _outcome(check: Check) -> Outcome:
    start = time.monotonic()
    compared, problem = None, None
    try:
        with as_if(backend=check.backend, compiles=check.compiles, kernels=check.kernels):
            compared = check.compared()
    # Whatever goes wrong in one is what the report is for.
    except Exception as error:
        problem = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
        mx.clear_cache()
    return Outcome(check, time.monotonic() - start, compared, problem)
