"""`python -m dbrx_fn.check`: checks whether this machine computes correctly, and how fast. Prints a one-page report.

`docs/check.md` describes the comparisons.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial

import dbrx_fn
from dbrx_fn.checking.checks import run_checks
from dbrx_fn.checking.machine import this_machine
from dbrx_fn.checking.plan import planned
from dbrx_fn.checking.report import Report, described, report_text
from dbrx_fn.checking.speed import Speed, measure_speed
from dbrx_fn.checking.workers import run_in_workers, worker_count
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import print_result
from dbrx_fn.errors import InputError

WRONG = 1
"""The exit status if a check is wrong."""
_SECONDS = 95.0
_FOR_SPEED = 25.0
"""Seconds reserved for measuring speed, and for a last check that takes longer,"""
_FOR_SPEED_ALONE = 15.0
"""or without such a check, since workers are ended in time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns 0, 1 if something is wrong, 2 for bad options, 130 or 143 if stopped."""
    return run(_run, parser(), arguments, takes_sigterm=True)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("check"),
        description="Compare this machine's results with correct ones, and measure its speed, in two minutes.",
    )
    options.add_argument("--json", action="store_true", help="print JSON instead of a page")
    options.add_argument(
        "--only", metavar="TEXT", help="run only the checks with this text in their row of the report, without speed"
    )
    options.add_argument(
        "--seconds", type=float, default=_SECONDS, help="about how long it may take (default: %(default)g)"
    )
    return options


def _run(chosen: argparse.Namespace) -> int:
    start = time.monotonic()
    if not (chosen.seconds > 0 and math.isfinite(chosen.seconds)):
        raise InputError(f"--seconds is {chosen.seconds:g} where a positive number is expected.")
    plan = partial(planned, chosen.only)
    checks = plan()
    if not checks:
        raise InputError(f"--only is {chosen.only!r}, which no row of the report holds: take a part of one's name.")
    machine = this_machine(dbrx_fn.__version__)
    # With TF32 a GPU may round float32 to 10 bits in products. MLX reads the setting at the first product.
    os.environ["MLX_ENABLE_TF32"] = "0"
    workers = worker_count()
    kept = 0.0 if chosen.only is not None else min(_FOR_SPEED if workers == 1 else _FOR_SPEED_ALONE, chosen.seconds / 2)
    until = start + chosen.seconds - kept
    outcomes = run_checks(checks, until) if workers == 1 else run_in_workers(checks, plan, until, workers)
    if all(outcome.left_out for outcome in outcomes):
        raise InputError(f"--seconds is {chosen.seconds:g}, in which no check can be made: give more.")
    speed = "not measured, because of --only" if chosen.only is not None else _speed(start + chosen.seconds - kept / 2)
    report = Report(machine, outcomes, speed, time.monotonic() - start)
    print_result(json.dumps(described(report), indent=2) if chosen.json else report_text(report, program("check")))
    return WRONG if report.wrong else 0


def _speed(until: float) -> Speed | str:
    if time.monotonic() > until:
        return "not measured, for lack of time"
    try:
        return measure_speed()
    # Speed doesn't affect the verdict, so a failure is only a line of the report.
    except Exception as error:
        return f"not measured, {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
