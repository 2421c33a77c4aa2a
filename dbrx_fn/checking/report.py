"""The report: a page for people, and JSON for scripts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dbrx_fn.benchmarks.inference import Figure
from dbrx_fn.checking.checks import Outcome
from dbrx_fn.checking.machine import Machine
from dbrx_fn.checking.speed import Speed

_MOST_FAULTS = 10
"""The most wrong checks that the page lists."""
_FIGURES = {
    "prefill": "a prompt of {} tokens",
    "first token": "the same to its first token",
    "decode": "decoding after {} tokens",
}


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks.

    `speed`: the measurement, or the reason why there is none.
    `seconds`: the time of everything.
    """

    machine: Machine
    outcomes: Sequence[Outcome]
    speed: Speed | str
    seconds: float

    @property
    def wrong(self) -> list[Outcome]:
        """The wrong checks."""
        return [outcome for outcome in self.outcomes if outcome.wrong]

    @property
    def left_out(self) -> int:
        """The number of checks left out for lack of time."""
        return sum(outcome.left_out for outcome in self.outcomes)


def described(report: Report) -> dict[str, Any]:
    """The report as an object for JSON: every check and figure. Errors that aren't finite are texts."""
    speed: Any = {"missing": report.speed} if isinstance(report.speed, str) else asdict(report.speed)
    return {
        "right": not report.wrong,
        "seconds": round(report.seconds, 1),
        "machine": asdict(report.machine),
        "checks": [_described(outcome) for outcome in report.outcomes],
        "speed": speed,
    }


def report_text(report: Report, again: str) -> str:
    """The page. `again` is the command without options."""
    wrong = report.wrong
    lines = [*_machine_lines(report.machine), "", *_table(report.outcomes)]
    if wrong:
        lines += ["", *map(_fault_text, _one_of_each_row_first(wrong)[:_MOST_FAULTS])]
        if len(wrong) > _MOST_FAULTS:
            lines.append(f"and {len(wrong) - _MOST_FAULTS} more, which --json lists")
    lines += ["", *_speed_lines(report.speed), "", *_verdict(report, again)]
    return "\n".join(lines)


def _machine_lines(machine: Machine) -> list[str]:
    commit = f", commit {machine.commit}" if machine.commit else ""
    blas = f", matrix products by {machine.blas}" if machine.blas else ""
    return [
        f"dbrx_fn   {machine.dbrx_fn}{commit}",
        f"machine   {machine.device} ({machine.architecture}), {machine.cores} cores, {machine.memory / 2**30:.1f} GiB",
        f"system    {machine.system}, Python {machine.python}, NumPy {machine.numpy}",
        f"MLX       {machine.mlx} on {machine.backend}{blas}",
        f"settings  {', '.join(machine.settings) or 'none'}",
    ]


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.check.group, []).append(outcome)
    cells = [("what", "checks", "largest error", "limit", "")]
    cells += [(group, *_row(members)) for group, members in groups.items()]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        f"{group:{first}}  "
        + "  ".join(cell.rjust(width) for cell, width in zip(rest[:-1], widths, strict=False))
        + f"  {rest[-1]}".rstrip()
        for group, *rest in cells
    ]


def _one_of_each_row_first(wrong: Sequence[Outcome]) -> list[Outcome]:
    before: Counter[str] = Counter()
    places = []
    for outcome in wrong:
        places.append(before[outcome.check.group])
        before[outcome.check.group] += 1
    return [outcome for _, outcome in sorted(zip(places, wrong, strict=True), key=lambda pair: pair[0])]


def _row(members: Sequence[Outcome]) -> tuple[str, str, str, str]:
    """The number of checks, the error and limit of the worst check in relation to its limit, and the verdict."""
    left_out = sum(outcome.left_out for outcome in members)
    wrong = sum(outcome.wrong for outcome in members)
    done = len(members) - left_out
    verdict = f"WRONG: {wrong} of {done}" if wrong else "right" if done else ""
    if left_out:
        verdict += f"{', ' if verdict else ''}{left_out} left out"
    compared = [outcome for outcome in members if outcome.compared is not None]
    if not compared:
        return str(done), "", "", verdict
    worst = max(compared, key=_share_of_limit)
    assert worst.compared is not None
    return str(done), f"{worst.compared.error:.1e}", f"{worst.check.limit:.1e}", verdict


def _share_of_limit(outcome: Outcome) -> float:
    assert outcome.compared is not None
    error, limit = outcome.compared.error, outcome.check.limit
    if math.isnan(error):
        return math.inf
    return error / limit if limit else error


def _fault_text(outcome: Outcome) -> str:
    check, compared = outcome.check, outcome.compared
    where = f"WRONG {check.group}: {check.case}: "
    if compared is None:
        return where + str(outcome.problem)
    return (
        f"{where}error {compared.error:.2g}, limit {check.limit:.2g}; at {list(compared.place)} found"
        f" {compared.found:.6g}, right is {compared.expected:.6g}"
    )


def _speed_lines(speed: Speed | str) -> list[str]:
    if isinstance(speed, str):
        return [f"speed     {speed}"]
    limits = speed.limits
    reads, multiplies = limits.bandwidth(speed.size) / 1e9, limits.matmul_rate / 1e12
    return [
        f"speed     {speed.model}, {speed.size / 2**20:,.0f} MiB of random weights",
        f"          the machine reads {reads:,.0f} GB/s and multiplies {multiplies:,.2f} TFLOP/s in {limits.dtype}",
        *map(_figure_text, speed.figures),
    ]


def _figure_text(figure: Figure) -> str:
    what = f"          {_FIGURES[figure.what].format(figure.tokens)}: "
    if figure.tokens_per_second is None or figure.fraction_of_bound is None:
        return f"{what}{figure.missing}"
    return (
        f"{what}{figure.tokens_per_second:,.1f} tokens/s, {100 * figure.fraction_of_bound:.0f}% of the machine's limit"
    )


def _verdict(report: Report, again: str) -> list[str]:
    done = len(report.outcomes) - report.left_out
    took = f"in {report.seconds:.0f} s"
    lines = [
        f"WRONG: {len(report.wrong)} of {done} checks, {took}. Don't trust this machine's results."
        if report.wrong
        else f"All {done} checks that were made are right, {took}."
    ]
    if report.left_out:
        lines.append(
            f"There was no time for {report.left_out} checks: run it again, since compiled kernels are kept, or give"
            " --seconds 600."
        )
    lines.append(f"Send this page, and what `{again} --json` prints, to the project's issue tracker.")
    return lines


def _described(outcome: Outcome) -> dict[str, Any]:
    check, compared = outcome.check, outcome.compared
    verdict = "wrong" if outcome.wrong else "left out" if outcome.left_out else "right"
    made: dict[str, Any] = {"group": check.group, "case": check.case, "verdict": verdict, "limit": check.limit}
    if compared is not None:
        numbers = {"error": compared.error, "found": compared.found, "expected": compared.expected}
        made |= {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        made["place"] = list(compared.place)
    if outcome.problem is not None:
        made["problem"] = outcome.problem
    return made | {"seconds": round(outcome.seconds, 3)}
