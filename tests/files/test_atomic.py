"""Folders and files that appear whole, and the names of what isn't."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import hidden_beside, is_leftover, new_folder, remove_leftovers, write_file


@pytest.mark.parametrize(
    "name", [".run-20251123", ".run-0123abcd", "run-0123abcd.unfinished", ".notes.unfinished", ".-0123abcd.unfinished"]
)
def test_only_names_of_its_own_are_leftovers(name: str, tmp_path: Path) -> None:
    assert not is_leftover(tmp_path / name)
    assert is_leftover(hidden_beside(tmp_path / name))


def test_every_new_name_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's names are flushed by themselves, those of the folders above too that were made for it."""
    flushed: set[Path] = set()
    flush = os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with new_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "file").touch()
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", folder, folder / "file"} == flushed
    flushed.clear()
    with new_folder(tmp_path / "d"):
        pass
    assert tmp_path in flushed
    assert tmp_path.parent not in flushed


def test_a_folder_is_replaced_only_where_all_of_it_may_be(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for content in ("one", "two"):
        with new_folder(place, replacing=["a"]) as folder:
            (folder / "a").write_text(content)
    assert (place / "a").read_text() == "two"
    for replacing in ([], ["b"]):
        with pytest.raises(InputError, match="exists already"), new_folder(place, replacing=replacing):
            pass
    with pytest.raises(KeyError), new_folder(place, replacing=["a"]):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (place / "a").read_text() == "two"


def test_what_was_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def put_there_meanwhile() -> None:
        with new_folder(place, replacing=["a"]):
            place.mkdir()
            (place / "mine").touch()

    with pytest.raises(InputError, match="exists already"):
        put_there_meanwhile()
    assert (place / "mine").exists()


# What killed processes leave

KILLED = """
import os, signal, sys
from pathlib import Path
from dbrx_fn.files.atomic import new_folder, write_file
place = Path(sys.argv[1])
if sys.argv[2] == "folder":
    with new_folder(place, files=["part*"]) as beside:
        (beside / "part").write_text("half")
        print(beside.name, flush=True)
        sys.stdin.read()
else:
    flush = os.fsync
    def wait(descriptor):
        print([path.name for path in place.parent.iterdir()][0], flush=True)
        sys.stdin.read()
        flush(descriptor)
    os.fsync = wait
    write_file(place, b"whole")
"""


@contextmanager
def writing(place: Path, kind: str) -> Iterator["tuple[subprocess.Popen[str], Path]"]:
    """A process in the middle of writing, and what it has hidden."""
    command = [sys.executable, "-c", KILLED, str(place), kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        yield process, place.parent / process.stdout.readline().strip()
        process.kill()


def write(place: Path, kind: str) -> None:
    if kind == "file":
        write_file(place, b"whole")
        return
    with new_folder(place, files=["part*"]) as beside:
        (beside / "part").write_text("whole")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(
    kind: str, tmp_path: Path
) -> None:
    place = tmp_path / "new"
    with writing(place, kind) as (process, hidden):
        assert is_leftover(hidden)
        write(tmp_path / "new", kind)
        assert hidden.exists()
        process.kill()
        process.wait()
        # Another place's leftovers are none of these.
        write(tmp_path / "new-0", kind)
        assert hidden.exists()
        if kind == "folder":
            shutil.rmtree(place)
        write(place, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new-0"]


def test_a_process_that_ends_well_beside_others_loses_nothing(tmp_path: Path) -> None:
    with writing(tmp_path / "new", "folder") as (process, _):
        remove_leftovers(tmp_path / "new", ["part*"])
        process.communicate("go on")
        assert process.returncode == 0
    assert (tmp_path / "new" / "part").read_text() == "half"
    remove_leftovers(tmp_path / "new", ["part*"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_leftover_with_somebodys_file_in_it_stays_and_is_named(tmp_path: Path) -> None:
    hidden = tmp_path / ".new-01234567.unfinished"
    hidden.mkdir()
    (hidden / "part").touch()
    (hidden / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"new-01234567\.unfinished was left by a killed process and holds 'notes"):
        write(tmp_path / "new", "folder")
    assert (hidden / "notes.txt").read_text() == "mine"
    assert (hidden / "part").exists()


@pytest.mark.parametrize("inside", ["part", "part-1"])
def test_a_leftover_that_leads_elsewhere_is_not_followed(inside: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "part").write_text("mine")
    (tmp_path / ".new-01234567.unfinished").symlink_to(victim)
    hidden = tmp_path / ".new-76543210.unfinished"
    hidden.mkdir()
    (hidden / inside).symlink_to(victim / "part")
    with pytest.warns(UserWarning, match=f"holds '{inside}'"):
        write(tmp_path / "new", "folder")
    assert (victim / "part").read_text() == "mine"
    assert (tmp_path / ".new-01234567.unfinished").is_symlink()


def test_a_pipe_of_such_a_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".new-01234567.unfinished")
    write(tmp_path / "new", "folder")


def test_a_folder_is_not_replaced_where_a_folder_has_a_files_name(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "a").mkdir(parents=True)
    (place / "a" / "mine").touch()
    with pytest.raises(InputError, match="exists already"), new_folder(place, replacing=["a"]):
        pass
    assert (place / "a" / "mine").exists()


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(InputError, match="can't be a file's name"):
            write_file(tmp_path / name, b"")
        with pytest.raises(InputError, match="can't be a file's name"), new_folder(tmp_path / name):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: new_folder(path).__enter__(), lambda path: write_file(path, b"")])
def test_ctrl_c_as_soon_as_the_hidden_name_is_there_leaves_nothing(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.open

    def interrupted(path: Path, *rest: int) -> int:
        monkeypatch.undo()
        os.close(found(path, *rest))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
