"""Work folders of interrupted conversions, damaged in hundreds of ways: resumed to the same bytes, or refused."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage_work import WAYS

CASES, SEEDS = 264, (1, 2)
MOST_MEMORY = 64 * 2**20


def complaints(case: dict[str, Any]) -> list[str]:
    """What is wrong with how a case ended."""
    found = []
    if case["outcome"] not in ("done", "refused") or case["expected"] not in (None, case["outcome"]):
        found.append(f"{case['outcome'][-1500:]} where {case['expected']} is expected: {case['lines']}")
    if case["outcome"] == "refused":
        text = "\n".join(case["lines"])
        if not (text.startswith("error: ") and text.endswith(".") and text.isprintable() and len(text) < 500):
            found.append(f"not one short, printable sentence: {text[:700]!r}")
    if case["outcome"] == "done" and case["lines"]:
        found.append(f"said {case['lines']}")
    if case["left"]:
        found.append(f"left {case['left']}")
    if case["touched"]:
        found.append(f"touched {case['touched']}")
    if case["grown"] > MOST_MEMORY:
        found.append(f"took {case['grown'] / 2**20:.0f} MiB")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that has imported MLX may not be forked")
@pytest.mark.parametrize("seed", SEEDS)
def test_what_an_interrupted_conversion_left_is_used_made_anew_or_refused(seed: int, tmp_path: Path) -> None:
    """Whatever comes of it, nothing of somebody else's is changed, and no link followed."""
    command = [sys.executable, "-m", "tests.support.resume_damaged", str(CASES), str(seed), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"ended in or after {lines[-1] if lines else None}\n{ended.stderr[-3000:]}"
    cases = [line for line in lines if "outcome" in line]
    assert len(cases) == CASES
    wrong = [
        f"{case['number']} ({case['way']}, killed before {case['killed before']}: {case['what']}): {complaint}"
        for case in cases
        for complaint in complaints(case)
    ]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong[:20])
    outcomes = Counter((case["way"], case["outcome"]) for case in cases)
    assert {way for way, _ in outcomes} == WAYS.keys()
    # But where all was done, and that the folder is there is all that is said.
    assert outcomes["nothing", "done"] > 0.8 * CASES / len(WAYS)


def test_there_are_hundreds() -> None:
    assert CASES * len(SEEDS) >= 400
