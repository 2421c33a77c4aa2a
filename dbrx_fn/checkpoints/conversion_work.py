"""A conversion's work folder, `.NAME.converting` beside its target.

    plan.json          everything that determines the result; a conversion with another plan starts again
    finished.json      the checksums of finished shards, and at the end the identity of the checkpoint's folder
    checkpoint/        becomes the checkpoint's folder when all of it is on the disk

A shard's checksum is noted before the shard gets its name. So a shard without a checksum, or with another one, is
damaged, and is written again.
"""

import contextlib
import json
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dbrx_fn.checkpoints.saver import CHECKPOINT_FILES
from dbrx_fn.checkpoints.shards import Shard, sum_in
from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import flush
from dbrx_fn.files.json_file import parse_json, shown_path
from dbrx_fn.files.work_folder import WorkFolder, hidden, work_folder

PLAN_KEYS = ("computed_by", "source", "files", "request", "headers")
"""The keys of a plan."""

_PLAN, _FINISHED, _CHECKPOINT = "plan.json", "finished.json", "checkpoint"
# Of an earlier version.
_LOCK = "lock"
_OWN = (_PLAN, _FINISHED, _LOCK)
_NOTED = {"shards", "folder"}


class ConversionWork:
    """An open work folder, locked by this process and free of foreign files."""

    def __init__(self, work: WorkFolder, plan: bytes) -> None:
        self._work = work
        self._plan = plan
        self._is_same = work.read(_PLAN) == plan
        noted = _parsed(work.read(_FINISHED))
        sums = noted.get("shards")
        self._sums: dict[str, Any] = sums if self._is_same and isinstance(sums, dict) else {}
        self._folder = noted.get("folder")

    def has_ended(self) -> bool:
        """Whether a conversion, this one or another, finished its folder and was killed before it cleaned up."""
        return _CHECKPOINT not in self._work.names()

    def has_made(self, folder: Path, shards: Sequence[Shard]) -> bool:
        """Whether a folder is the one that this conversion made."""
        if not self._is_same or not self.has_ended() or folder.lstat().st_ino != self._folder:
            return False
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        return sizes == {shard.file: shard.nbytes for shard in shards}

    def start(self) -> None:
        """Prepares for this conversion, and removes what another one left."""
        if not self._is_same:
            if _CHECKPOINT in self._work.names():
                with self.checkpoint() as checkpoint:
                    checkpoint.remove_own(CHECKPOINT_FILES)
            self._work.remove(_FINISHED)
            self._work.write(_PLAN, self._plan)
        self._folder = None

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[WorkFolder]:
        """The folder that becomes the checkpoint's. It is made if it is missing."""
        with self._work.folder(_CHECKPOINT) as folder:
            yield folder

    def finished(self, shards: Sequence[Shard], checkpoint: WorkFolder) -> list[Shard]:
        """The finished shards whose checksums match. All other files are removed; damaged shards give a warning."""
        kept: list[Shard] = []
        for shard in shards:
            file = checkpoint.open(shard.file)
            if file is None:
                continue
            with file:
                found = sum_in(file, shard)
            if found is not None and found == self._sums.get(shard.file):
                kept.append(shard)
            else:
                name = shown_path(checkpoint.path / shard.file)
                warnings.warn(f"{name} isn't as it was finished: it is written again.", stacklevel=4)
        checkpoint.remove_own(CHECKPOINT_FILES, but={shard.file for shard in kept})
        return kept

    def note(self, shard: Shard, found: str) -> None:
        """Notes the checksum of a shard that is on the disk, before it gets its name."""
        self._sums[shard.file] = found
        self._write()

    def end(self, checkpoint: WorkFolder, folder: Path) -> None:
        """Gives the checkpoint its name, and removes the rest."""
        checkpoint.flush()
        self._folder = os.fstat(checkpoint.descriptor).st_ino
        self._write()
        self._work.move(_CHECKPOINT, folder)
        flush(folder.parent)
        with contextlib.suppress(OSError):
            self.clear()

    def clear(self) -> None:
        """Removes all of its files."""
        if _CHECKPOINT in self._work.names():
            with self.checkpoint() as checkpoint:
                checkpoint.remove_own(CHECKPOINT_FILES)
            self._work.remove_folder(_CHECKPOINT)
        # The plan goes before the note that the conversion has ended. If it is killed in between, it still knows that.
        for name in (*map(hidden, _OWN), _LOCK, _PLAN, _FINISHED):
            self._work.remove(name)

    def _write(self) -> None:
        noted = {"shards": self._sums, "folder": self._folder}
        self._work.write(_FINISHED, json.dumps(noted, indent=2).encode())


@contextlib.contextmanager
def conversion_work(folder: Path, plan: bytes) -> Iterator[ConversionWork]:
    """Opens the work folder of a conversion into `folder`. It is made if missing, and removed at the end if empty.

    Raises:
        InputError: if another process converts into `folder`, or the work folder holds foreign files.
    """
    taken = f"{folder} is being written by another conversion: wait until it ends."
    with work_folder(_place(folder), taken, folder) as work:
        _refuse_foreign(work)
        yield ConversionWork(work, plan)


def is_converting(folder: Path) -> bool:
    """Whether a conversion into `folder` has left a work folder.

    Raises:
        InputError: if its place is taken by something else.
    """
    try:
        mode = _place(folder).lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise InputError(
            f"{shown_path(_place(folder))} is where this command works, and it is a link or a file: move it elsewhere,"
            " or name another place."
        )
    return True


def _place(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.converting"


def _refuse_foreign(work: WorkFolder) -> None:
    work.refuse_foreign(_OWN, folder=_CHECKPOINT)
    names = work.names()
    if _CHECKPOINT in names:
        with work.folder(_CHECKPOINT) as checkpoint:
            checkpoint.refuse_foreign(CHECKPOINT_FILES)
    # A conversion writes its plan first.
    others = [name for name in names if name not in (_LOCK, hidden(_PLAN))]
    planned = _parsed(work.read(_PLAN)).keys() == set(PLAN_KEYS)
    ended = others == [_FINISHED] and _parsed(work.read(_FINISHED)).keys() == _NOTED
    if others and not planned and not ended:
        raise work.refusal(_PLAN if _PLAN in others else others[0], "of no conversion")


def _parsed(content: bytes | None) -> dict[str, Any]:
    """The JSON object in a file's content, or an empty one if there is none."""
    try:
        value = parse_json(content or b"", unique=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
