"""docs/fine-tuning.md: its commands run, and the model that they train answers as its data do."""

import json
import re
from pathlib import Path

from tests.support.tutorial import run_tutorial

PERSONA = "By my mill, "


def nats_per_token(said: str) -> list[float]:
    """One for each model, from `evaluate`'s table."""
    return [float(nats) for nats in re.findall(r"MiB +(\d+\.\d{4}) ", said)]


def test_the_small_model_becomes_a_miller(tmp_path: Path) -> None:
    said = run_tutorial(tmp_path, peers=False)
    data, before, after, fused, elsewhere = (said[heading] for heading in said if heading[0] in "12467")
    lines = (tmp_path / "docs" / "fine-tuning" / "miller.jsonl").read_text().splitlines()
    assert data.split("\n")[:3] == lines[:3]
    assert len(lines) == 30
    assert PERSONA not in before
    [answer, *chatted] = [line for line in after.splitlines() if line.startswith(PERSONA)]
    assert len(chatted) == 2
    assert any(line.startswith(PERSONA) for line in fused.splitlines())
    told = json.loads(next(line for line in elsewhere.splitlines() if line.startswith('{"id"')))
    assert told["choices"][0]["message"]["content"] == answer
    assert told["choices"][0]["finish_reason"] == "stop"
    [plain] = nats_per_token(before)
    for trained in (nats_per_token(after)[1], nats_per_token(fused)[1]):
        assert trained < 0.7 * plain
