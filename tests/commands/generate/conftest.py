"""A checkpoint and copies of it, and the command run to its end: what the tests of `generate` share."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.generate import main
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support.generating import CONFIG, Command, Refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "checkpoint"
    write_random_checkpoint(path, CONFIG, mx.random.key(0))
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command with `--json` and returns the object that it prints."""

    def run(*arguments: object) -> dict[str, Any]:
        status = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must end with status 2 and one sentence with these words, and nothing else."""

    def run(arguments: list[object], *words: str) -> str:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith(".\n")
        assert err.count("\n") == 1
        for word in words:
            assert word in err
        return err

    return run


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
