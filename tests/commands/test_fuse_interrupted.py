"""`fuse` that is killed or interrupted anywhere: the new folder is absent or complete, and the same command goes on."""

import json
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.fuse import main
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.ops.formats import Format
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.tiny_runs import contents, names
from tests.support.trees import case_of

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG, FORM = CASE.config, Format(4, 32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model in 4 bits and adapters for it, and what merging them gives if nobody disturbs it."""
    params = quantize(CASE.params, CONFIG, Quantization(FORM, FORM, FORM, FORM))
    save(tmp_path / "model", params, CONFIG)
    adapted = with_random_adapters(params, CONFIG, ("attention", "experts", "head"))
    save_adapters(tmp_path / "adapters", adapted, CONFIG)
    assert main(["--out", str(tmp_path / "undisturbed"), *inputs(tmp_path)]) == 0
    (tmp_path / "disturbed").mkdir()
    return tmp_path


def inputs(place: Path) -> list[str]:
    return ["--model", str(place / "model"), "--adapter-path", str(place / "adapters")]


def fused(server: "subprocess.Popen[str]", place: Path, **killed: Any) -> dict[str, Any]:
    """What `tests.support.convert_and_kill` says of it. The folder is absent or complete, whatever happened."""
    arguments = ["--out", str(place / "disturbed" / "out"), *inputs(place)]
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps({"command": "fuse", "arguments": arguments, **killed}) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    if (place / "disturbed" / "out").exists():
        assert contents(place / "disturbed" / "out") == contents(place / "undisturbed")
    return answer


def goes_on(server: "subprocess.Popen[str]", place: Path) -> None:
    """The same command again makes the folder, or says that it is there, and leaves nothing else."""
    answer = fused(server, place)
    assert answer["status"] == 0 or "exists already" in answer["error"], answer["error"]
    assert contents(place / "disturbed" / "out") == contents(place / "undisturbed")
    assert names(place / "disturbed") == ["out"]
    for file in (place / "disturbed" / "out").iterdir():
        file.unlink()
    (place / "disturbed" / "out").rmdir()


def test_killed_before_each_of_its_file_operations(server: "subprocess.Popen[str]", place: Path) -> None:
    before = [contents(place / name) for name in ("model", "adapters")]
    operations = fused(server, place)["operations"]
    assert operations > 15
    goes_on(server, place)
    for operation in range(1, operations + 1):
        assert fused(server, place, operation=operation)["status"] == -signal.SIGKILL
        goes_on(server, place)
    assert [contents(place / name) for name in ("model", "adapters")] == before


@pytest.mark.parametrize("interrupted", [True, False], ids=["Ctrl-C", "killed"])
def test_stopped_at_random_moments(interrupted: bool, server: "subprocess.Popen[str]", place: Path) -> None:
    before = [contents(place / name) for name in ("model", "adapters")]
    took, moments, stopped = 1.0, random.Random(0), 0
    while stopped < 15:
        answer = fused(server, place, seconds=moments.random() * took, interrupted=interrupted)
        if "interrupted" in answer["error"]:
            assert answer["error"].endswith("the same command goes on where it was.\n")
        ended = answer["status"] == 0
        stopped += not ended
        # Whatever else the machine has to do, some get far.
        took = answer["took"] if ended else 1.1 * took
        assert answer["status"] in (0, 130 if interrupted else -signal.SIGKILL)
        assert "Traceback" not in answer["error"]
        goes_on(server, place)
    assert stopped > 5
    assert [contents(place / name) for name in ("model", "adapters")] == before


def test_finished_files_are_kept_unless_the_adapters_are_others(place: Path) -> None:
    """A large model has several files. An interruption comes after a part of them."""
    request = Request(shard_bytes=1, adapters=str(place / "adapters"))
    conversion = plan_conversion(open_checkpoint(place / "model"), request)
    convert(conversion, place / "whole")
    kept: list[int] = []

    def stop(done: int, whole: int) -> None:
        if done > whole / 2:
            raise KeyboardInterrupt

    for resumes in (False, True):
        with pytest.raises(KeyboardInterrupt):
            convert(conversion, place / "out", progress=stop, resumed=kept.append)
        assert bool(kept) == resumes
    convert(conversion, place / "out", resumed=kept.append)
    assert len(conversion.shards) > kept[-1] > 3
    assert contents(place / "out") == contents(place / "whole")

    with pytest.raises(KeyboardInterrupt):
        convert(conversion, place / "other", progress=stop)
    other = with_random_adapters(CASE.params, CONFIG, ("attention", "experts", "head"), seed=1)
    (place / "adapters").rename(place / "first-adapters")
    save_adapters(place / "adapters", other, CONFIG)
    kept.clear()
    convert(plan_conversion(open_checkpoint(place / "model"), request), place / "other", resumed=kept.append)
    assert not kept
    assert contents(place / "other") != contents(place / "whole")
