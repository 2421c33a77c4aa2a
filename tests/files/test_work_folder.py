"""Work folders: no link in them is followed, nothing of somebody else's is touched, and one process works at a time."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn.convert import main
from dbrx_fn.errors import InputError
from dbrx_fn.files.work_folder import WorkFolder, hidden, work_folder
from dbrx_fn.random_checkpoint import main as random_checkpoint

# A file for each linear.
ALONE = ["--shard-size", "1e-9"]
OWN = [
    *("plan.json", "finished.json", "lock", ".plan.json.unfinished", "checkpoint"),
    *("checkpoint/model-00001-of-00019.safetensors", "checkpoint/.model-00001-of-00019.safetensors.unfinished"),
    *("checkpoint/config.json", "checkpoint/tokenizer.json", "checkpoint/model.safetensors.index.json"),
]
"""Names that a conversion writes, in its work folder."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "dbrx"
    sizes = ["--d-model", "32", "--n-heads", "2", "--ffn-hidden-size", "32", "--experts", "2", "--top-k", "1"]
    assert random_checkpoint([str(folder), *sizes, "--n-layers", "2", "--kv-n-heads", "1"]) == 0
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's folder, with files of the names that a conversion has."""
    folder = tmp_path / "victim"
    for name in OWN:
        if name != "checkpoint":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"mine: {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def left(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a conversion that was killed when some of its shards were finished."""
    place = tmp_path_factory.mktemp("left") / "new"
    code = f"""
import os, signal
from dbrx_fn.checkpoints.shards import ShardSum
from dbrx_fn.convert import main
made = ShardSum.hexdigest
def kill_at_the_fifth(self, count=[]):
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(self)
ShardSum.hexdigest = kill_at_the_fifth
main({[str(source), str(place), *ALONE]!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=100)
    assert ended.returncode == -signal.SIGKILL
    return place.with_name(".new.converting")


@pytest.fixture
def work(left: Path, tmp_path: Path) -> Path:
    """A copy of that, of a conversion into `new`."""
    return Path(shutil.copytree(left, tmp_path / ".new.converting"))


Refused = Callable[[], str]


@pytest.fixture
def refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Converts into `new`, which must be refused in one sentence."""

    def run() -> str:
        assert main([str(source), str(tmp_path / "new"), *ALONE]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith(("move that elsewhere, or name another place.\n", "elsewhere, or name another place.\n"))
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
        return err

    return run


# Links and foreign files


def test_a_work_folder_that_is_a_link_is_refused(victim: Path, tmp_path: Path, refused: Refused) -> None:
    before = contents(victim)
    (tmp_path / ".new.converting").symlink_to(victim)
    assert ".new.converting is where this command works, and it is a link or a file" in refused()
    assert contents(victim) == before


@pytest.mark.parametrize("name", OWN)
def test_a_link_in_a_work_folder_is_refused_and_leads_nowhere(
    name: str, work: Path, victim: Path, tmp_path: Path, refused: Refused
) -> None:
    before = contents(victim)
    path = work / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    path.symlink_to(victim / name)
    assert repr(path.name) in refused()
    assert contents(victim) == before
    assert path.is_symlink()


@pytest.mark.parametrize("name", OWN)
def test_a_pipe_in_a_work_folder_is_refused_and_not_waited_for(
    name: str, work: Path, tmp_path: Path, refused: Refused
) -> None:
    if (work / name).is_dir():
        (work / name).rename(tmp_path / "moved")
    (work / name).unlink(missing_ok=True)
    os.mkfifo(work / name)
    assert repr((work / name).name) in refused()


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint/notes.txt", "plan.json~", "checkpoint/model-1.safetensors"])
def test_somebodys_file_in_a_work_folder_is_refused_and_stays(
    name: str, work: Path, tmp_path: Path, refused: Refused
) -> None:
    (work / name).write_text("mine")
    before = contents(work)
    assert f"{Path(name).name!r} in it is none of its own files" in refused()
    assert contents(work) == before


@pytest.mark.parametrize("name", ["notes.txt", "plan.json", "finished.json", "checkpoint/config.json"])
def test_somebodys_folder_of_that_name_is_refused_and_stays(name: str, tmp_path: Path, refused: Refused) -> None:
    work = tmp_path / ".new.converting"
    (work / name).parent.mkdir(parents=True)
    (work / name).write_text('{"mine": true}')
    refused()
    assert contents(work) == {name: b'{"mine": true}'}


def test_another_name_of_somebodys_file_is_not_written_through(
    source: Path, work: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(victim)
    for name in OWN:
        if name not in ("plan.json", "lock", "checkpoint"):
            (work / name).unlink(missing_ok=True)
            os.link(victim / name, work / name)
    assert main([str(source), str(tmp_path / "new"), *ALONE]) == 0, capsys.readouterr().err
    assert main([str(source), str(tmp_path / "other"), *ALONE]) == 0
    assert contents(victim) == before
    assert contents(tmp_path / "new") == contents(tmp_path / "other")


def test_a_link_that_is_put_there_meanwhile_leads_nowhere(victim: Path, tmp_path: Path) -> None:
    """Between every look at a name and its use: names are used within the open folder, and files made anew."""
    before = contents(victim)
    with work_folder(tmp_path / "work", "taken") as work:
        work.write("plan.json", b"ours")
        (tmp_path / "work").rename(tmp_path / "moved")
        (tmp_path / "work").symlink_to(victim)
        work.write("plan.json", b"ours again")
        with work.folder("checkpoint") as inner:
            inner.write("config.json", b"ours")
        (tmp_path / "moved" / "finished.json").symlink_to(victim / "finished.json")
        (tmp_path / "moved" / hidden("finished.json")).symlink_to(victim / "finished.json")
        work.write("finished.json", b"ours")
        (tmp_path / "moved" / "lock").symlink_to(victim / "lock")
        with pytest.raises(InputError, match="'lock' in it is not a regular file"):
            work.read("lock")
        work.remove("lock")
        with pytest.raises(InputError, match=r"'plan\.json' in it is not a folder"), work.folder("plan.json"):
            pass
    assert contents(victim) == before
    assert (tmp_path / "moved" / "plan.json").read_bytes() == b"ours again"
    assert not (tmp_path / "moved" / "finished.json").is_symlink()


def test_only_its_own_names_are_removed(tmp_path: Path) -> None:
    with work_folder(tmp_path / "work", "taken") as work:
        for name in ("model-1-of-2.safetensors", hidden("config.json"), "config.json", "notes.txt", "config.json.bak"):
            (tmp_path / "work" / name).touch()
        work.remove_own(["config.json", "model-*-of-*.safetensors"], but={"config.json"})
        assert work.names() == ["config.json", "config.json.bak", "notes.txt"]
    assert (tmp_path / "work").exists()


# One process at a time


def test_a_second_process_is_refused_before_anything_is_read_or_removed(
    source: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(work)
    with work_folder(work, "taken"):
        for options in (ALONE, ["--quantize", "8:32"], []):
            assert main([str(source), str(tmp_path / "new"), *options]) == 2
            assert "is being written by another conversion: wait until it ends." in capsys.readouterr().err
    assert contents(work) == before


def test_an_empty_work_folder_is_removed_and_another_may_come_at_any_moment(tmp_path: Path) -> None:
    """Whoever is within is alone there, though the folder comes and goes."""
    within: list[WorkFolder] = []
    problems: list[object] = []
    entered = 0

    def work() -> None:
        nonlocal entered
        for _ in range(200):
            try:
                with work_folder(tmp_path / "work", "taken") as mine:
                    within.append(mine)
                    if len(within) != 1 or not os.path.samestat((tmp_path / "work").stat(), os.fstat(mine.descriptor)):
                        problems.append(within)
                    entered += 1
                    within.remove(mine)
            except InputError as error:
                if str(error) != "taken":
                    problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert entered > 0
    assert list(tmp_path.iterdir()) == []


# Finished shards


@pytest.mark.parametrize("damage", ["flipped", "short", "longer", "another's", "no note"])
def test_a_finished_shard_that_changed_is_made_anew_and_told(
    damage: str, source: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *rest = sorted((work / "checkpoint").glob("model-*.safetensors"))
    content = first.read_bytes()
    if damage == "no note":
        (work / "finished.json").unlink()
    else:
        changed = {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "short": content[:-1],
            "longer": content + b"x",
            "another's": second.read_bytes(),
        }
        first.write_bytes(changed[damage])
    assert main([str(source), str(tmp_path / "new"), *ALONE]) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    if damage == "no note":
        assert len(warned) == len(rest) + 2
    else:
        assert warned == [f"warning: {first} isn't as it was finished: it is written again."]
        assert lines[-1] == f"going on after {len(rest) + 1} of 19 shards"
    assert main([str(source), str(tmp_path / "other"), *ALONE]) == 0
    assert contents(tmp_path / "new") == contents(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]
