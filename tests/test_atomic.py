"""Folders and files that appear whole, and the names of what isn't."""

import os
from pathlib import Path

import pytest

from dbrx_fn.atomic import hidden_beside, is_leftover, new_folder
from dbrx_fn.errors import InputError


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
