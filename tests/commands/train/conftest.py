"""A finished run, copies of it, and the command run to its end: what the tests of `train` share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn.train import main
from tests.support.tiny_runs import (
    arguments,
    write_config,
    write_text,
)

Trained = Callable[..., str]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "config.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.md")


@pytest.fixture(scope="module")
def finished(config: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to look at."""
    out = tmp_path_factory.mktemp("finished") / "run"
    given = arguments(out, config, [text], steps=12, save_every=4, eval_every=5, log_every=2, keep=2)
    assert main(given) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def trained(capsys: pytest.CaptureFixture[str]) -> Trained:
    """Runs the command, which must succeed, and returns what it printed on standard error."""

    def run(given: list[str]) -> str:
        status = main(given)
        err = capsys.readouterr().err
        assert status == 0, err
        return err

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must end with status 2 and one last sentence that has these words."""

    def run(given: list[str], *words: str) -> str:
        status = main(given)
        out, err = capsys.readouterr()
        return check_refused(status, out, err, *words)

    return run


def check_refused(status: int, out: str, err: str, *words: str) -> str:
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == err.splitlines()[-1:]
    assert errors[0].endswith(".")
    for word in words:
        assert word in errors[0]
    return errors[0]
