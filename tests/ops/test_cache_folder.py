"""Compiled kernels are kept in the user's cache folder, and only what is whole and the user's own is taken from it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn.ops.kernels.cache_folder import cached

CODE = b"machine code"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dbrx_fn"


def times_made(count: int) -> int:
    """How often one file is made in `count` calls."""
    made = 0

    def make() -> bytes:
        nonlocal made
        made += 1
        return CODE

    assert all(cached("kernel-1", ".cubin", make) == CODE for _ in range(count))
    return made


def test_it_is_made_once(folder: Path) -> None:
    assert times_made(3) == 1
    assert times_made(1) == 0
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    assert cached("kernel-2", ".cubin", lambda: b"other") == b"other"


def truncate(file: Path) -> None:
    file.write_bytes(CODE[:-1])


def replace_with_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def open_to_others(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize("change", [truncate, replace_with_link, open_to_others])
def test_a_file_that_may_be_someone_else_s_work_is_made_again(folder: Path, change: Callable[[Path], None]) -> None:
    times_made(1)
    change(next(folder.iterdir()))
    assert times_made(1) == 1
    assert times_made(1) == 0


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert times_made(2) == 2


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    assert times_made(2) == 2
    assert not os.listdir(folder)
