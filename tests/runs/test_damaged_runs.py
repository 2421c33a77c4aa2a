"""Damaged run folders and token files, by the hundred: refused in one sentence, or trained to the right model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage_runs import WAYS

COUNT = 54
"""Cases of each way, over all bases."""


def complaints(case: dict[str, Any]) -> list[str]:
    """What is wrong with how a case ended."""
    found = [] if case["kept"] else ["it changed what isn't the run's"]
    last = (case["said"].splitlines() or [""])[-1]
    if case["status"] == 2:
        if not last.startswith("error: ") or not last.endswith(".") or not last.isprintable() or len(last) > 2000:
            found.append(f"not one short, printable sentence: {last[:300]!r}")
    elif case["status"] != 0:
        found.append(f"neither done nor refused: {case['said'][-1500:]}")
    # More steps, or other ones before the first was saved, may be asked for in run.json.
    elif not case["same"] and "steps in place of" not in case["said"] and not asks_for_another(case):
        found.append(f"another model: {case['said'][-600:]}")
    return found


def asks_for_another(case: dict[str, Any]) -> bool:
    """Whether settings were changed before anything was made with them."""
    return case["base"] == "fresh" and "run.json" in case["what"]


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_refused_or_ends_in_the_right_model(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.resume_damaged_runs", way, str(COUNT), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2])
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert ended.returncode == 0, f"{ended.returncode} in or after {lines[-1:]}\n{ended.stderr[-3000:]}"
    cases = [line for line in lines if "status" in line]
    assert len(cases) == COUNT
    wrong = [
        f"{way} {case['number']} ({case['base']}: {case['what']}): {said}"
        for case in cases
        for said in complaints(case)
    ]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong[:20])


def test_there_are_hundreds() -> None:
    assert len(WAYS) * COUNT >= 700
