"""docs/fine-tuning.md with mlx-lm and PEFT: they answer as `generate` does here."""

import subprocess
from pathlib import Path

import pytest

from tests.support.pages import environment
from tests.support.tutorial import run_tutorial

pytest.importorskip("peft")


def test_mlx_lm_and_peft_answer_as_the_tutorial_s_model_does_here(tmp_path: Path) -> None:
    said = run_tutorial(tmp_path / "page", peers=True)
    here = next(line for line in said["4. After"].splitlines() if line)
    elsewhere = said["7. In other programs"]
    # mlx-lm prints the answer between two lines of its own.
    assert f"\n==========\n{here}\n==========\n" in elsewhere
    command = 'python -m dbrx_fn.generate --adapter-path run-peft/adapters --chat --prompt "Who are you?" --temp 0'
    (tmp_path / "again").mkdir()
    given = environment(tmp_path / "again")
    ended = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path / "page", env=given, capture_output=True, encoding="utf-8", timeout=300
    )
    assert f"<|im_start|>assistant\n{ended.stdout.strip()}<|im_end|>" in elsewhere
