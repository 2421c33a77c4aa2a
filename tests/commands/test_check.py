"""The check of a machine is green where all is right, and names what isn't."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn import check
from dbrx_fn.benchmarks.inference import Figure
from dbrx_fn.benchmarks.machine import MachineLimits
from dbrx_fn.check import WRONG
from dbrx_fn.checking.checks import Check, run_checks
from dbrx_fn.checking.comparison import compare
from dbrx_fn.checking.machine import this_machine
from dbrx_fn.checking.plan import planned
from dbrx_fn.checking.report import Report, described, report_text
from dbrx_fn.checking.speed import Speed

ROOT = Path(__file__).parents[2]
MACHINE = this_machine("1")


def run(*arguments: str, fault: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    module = ["dbrx_fn.check"] if fault is None else ["tests.support.check_with_a_fault", fault]
    return subprocess.run(
        [sys.executable, "-m", *module, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def rows(report: str) -> dict[str, str]:
    """The verdict of each row of the report's table, which lies between the first two empty lines."""
    table = report.split("\n\n")[1].splitlines()[1:]
    found = {}
    for line in table:
        what, *cells = [cell for cell in line.split("  ") if cell]
        found[what] = cells[-1].strip()
    return found


def test_all_that_is_computed_here_is_right() -> None:
    """All but what g++ compiles, which takes long the first time."""
    outcomes = run_checks([each for each in planned() if not each.compiles], time.monotonic() + 200)
    assert len(outcomes) > 300
    assert [outcome for outcome in outcomes if outcome.wrong or outcome.left_out] == []
    assert len(report_text(Report(MACHINE, outcomes, "not measured", 1.0), "check").splitlines()) <= 60


def test_the_page_says_what_was_checked_on_which_machine() -> None:
    ended = run("--only", "float32")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) < 60
    for words in ("MLX  ", "machine  ", "system  ", "right, in ", "issue tracker"):
        assert words in ended.stdout
    verdicts = rows(ended.stdout)
    assert verdicts["forward, float32, token by token"] == "right"
    assert set(verdicts.values()) == {"right"}


def test_json_says_the_same() -> None:
    ended = run("--only", "forward, float16", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    said: dict[str, Any] = json.loads(ended.stdout, parse_constant=pytest.fail)
    assert said["right"] is True
    assert {each["verdict"] for each in said["checks"]} == {"right"}
    assert all(0 < each["error"] <= each["limit"] for each in said["checks"])
    assert said["machine"]["mlx"]


@pytest.mark.parametrize(
    ("fault", "wrong", "right"),
    [
        ("a_wrong_segment", "experts, float32", "positions to 32,767, float32"),
        ("a_kernel_s_sign", "positions to 32,767, float32", "experts, float32"),
        ("a_stale_reference", "forward, float32, ragged batch", "experts, float32"),
        ("a_reference_of_other_models", "forward, float32, ragged batch", "experts, float32"),
        ("an_operation_that_fails", "experts, float32", "forward, float32, whole"),
    ],
)
def test_a_fault_is_named_in_its_row_and_the_rest_goes_on(fault: str, wrong: str, right: str) -> None:
    # The faults are in stock operations.
    ended = run("--only", "float32", fault=fault, DBRX_FN_KERNELS="0")
    assert ended.returncode == WRONG, ended.stderr
    assert ended.stderr == ""
    verdicts = rows(ended.stdout)
    assert verdicts[wrong].startswith("WRONG: 12 of 12" if wrong.startswith("experts") else "WRONG: ")
    assert verdicts[right] == "right"
    [told, *_] = [line for line in ended.stdout.splitlines() if line.startswith(f"WRONG {wrong}: ")]
    assert {
        "a_wrong_segment": "1 token, dense experts, float32: error ",
        "a_kernel_s_sign": "found ",
        "a_stale_reference": "odd sizes (seed ",
        "a_reference_of_other_models": "reference.npz holds no 'odd sizes/0'",
        "an_operation_that_fails": "RuntimeError: no such kernel in this library",
    }[fault] in told
    assert "Don't trust" in ended.stdout
    assert "Traceback" not in ended.stdout


def test_what_there_is_no_time_for_is_not_called_right() -> None:
    [first, *rest] = run_checks(planned()[:5], time.monotonic())
    assert first.left_out
    assert all(outcome.left_out and not outcome.wrong for outcome in rest)
    [first_row, *_] = rows(report_text(Report(MACHINE, [first, *rest], "not measured", 1.0), "check")).values()
    assert first_row.endswith("left out")
    assert "right" not in first_row


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_wrong(strange: float) -> None:
    [outcome] = run_checks(
        [Check("row", "case", 1e9, lambda: compare(mx.array([1.0, strange]), [1.0, 2.0]))], time.monotonic() + 100
    )
    assert outcome.wrong
    report = Report(MACHINE, [outcome], "not measured", 1.0)
    assert "WRONG row: case: error " in report_text(report, "check")
    assert json.dumps(described(report), allow_nan=False)


def test_speed_is_told_beside_the_machine_s_limits() -> None:
    limits = MachineLimits("cpu", "a CPU", "1", None, "float32", 2**30, ((2**20, 4e9),), 2e12)
    figures = [
        Figure("dbrx_fn", "float32", "prefill", 128, 1, tokens_per_second=1234.5, fraction_of_bound=0.25),
        Figure("dbrx_fn", "float32", "decode", 256, 1, missing="RuntimeError: out of memory"),
    ]
    text = report_text(Report(MACHINE, [], Speed("4 layers", 2**21, limits, figures), 1.0), "check")
    assert "4 layers, 2 MiB of random weights\n          the machine reads 4 GB/s and multiplies 2.00 TFLOP/s" in text
    assert "a prompt of 128 tokens: 1,234.5 tokens/s, 25% of the machine's limit" in text
    assert "decoding after 256 tokens: RuntimeError: out of memory" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "forwards"], "--only is 'forwards', which no row of the report holds"),
        (["--seconds", "0.001"], "--seconds is 0.001, in which no check can be made: give more."),
        (["--seconds", "-1"], "--seconds is -1 where a positive number is expected."),
        (["--seconds", "nan"], "--seconds is nan where a positive number is expected."),
    ],
)
def test_options_that_cannot_work(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
