"""Ways of damaging the work folder of an interrupted conversion, each drawn from a generator, and what may come of it.

A way gets the place where a folder `dbrx` is to be made, with the work folder beside it, and a folder `victim` of
somebody else's, which nothing may touch.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Outcome = Literal["done", "refused"]
WORK, CHECKPOINT, PLAN, FINISHED = ".dbrx.converting", "checkpoint", "plan.json", "finished.json"
_SMALL_FILES = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Damage:
    """What was done.

    `what`: in words, for whoever reads of a failure.
    `outcome`: what must come of it; either may, if `None`.
    `foreign`: what must be there afterwards as it is, whatever comes of it.
    """

    what: str
    outcome: Outcome | None
    foreign: tuple[Path, ...] = ()


Way = Callable[[Path, np.random.Generator], Damage]


def _pick(rng: np.random.Generator, values: list[Any]) -> Any:
    return values[rng.integers(len(values))]


def _shards(place: Path) -> list[Path]:
    return sorted((place / WORK / CHECKPOINT).glob("model-*.safetensors"))


def _victim(place: Path, rng: np.random.Generator) -> Path:
    file: Path = _pick(rng, sorted(file for file in (place / "victim").rglob("*") if file.is_file()))
    return file


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(0, len(content), rng.integers(1, 4)):
        changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


def _something_else(path: Path, place: Path, rng: np.random.Generator) -> str:
    """Puts something in a file's place that isn't a regular file of the command's; says what."""
    content = path.read_bytes() if path.is_file() else b"{}"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds = ["link to a file", "link to a folder", "link to nothing", "loop", "pipe", "folder", "device", "moved"]
    kind: str = _pick(rng, kinds)
    if kind == "link to a file":
        path.symlink_to(_victim(place, rng))
    elif kind == "link to a folder":
        path.symlink_to(place / "victim")
    elif kind == "link to nothing":
        path.symlink_to(place / "victim" / "new")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        # Its own content, but elsewhere.
        (place / "elsewhere").write_bytes(content)
        path.symlink_to(place / "elsewhere")
    return kind


# Shards


def damaged_shards(place: Path, rng: np.random.Generator) -> Damage:
    """A finished shard is cut short, has other bytes or more, or is another's."""
    shards = _shards(place)
    if not shards:
        return Damage("nothing", "done")
    shard = _pick(rng, shards)
    content = shard.read_bytes()
    kind = _pick(rng, ["short", "empty", "flipped", "flipped", "flipped", "longer", "zeros", "other", "gone"])
    if kind == "gone":
        shard.unlink()
    else:
        shard.write_bytes(
            {
                "short": content[: rng.integers(len(content))],
                "empty": b"",
                "flipped": _flipped(content, rng),
                "longer": content + rng.bytes(int(rng.integers(1, 100))),
                "zeros": bytes(len(content)),
                "other": _pick(rng, shards).read_bytes(),
            }[kind]
        )
    return Damage(f"{shard.name} is {kind}", "done")


def shards_with_a_second_name(place: Path, rng: np.random.Generator) -> Damage:
    """Files of the command's names are other names of somebody's file, which would change with them."""
    victim = _victim(place, rng)
    names = [*(shard.name for shard in _shards(place)), ".model-00001-of-00019.safetensors.unfinished", *_SMALL_FILES]
    file = place / WORK / CHECKPOINT / _pick(rng, names)
    if not file.parent.is_dir():
        file = place / WORK / _pick(rng, [PLAN, FINISHED, f".{PLAN}.unfinished"])
    file.unlink(missing_ok=True)
    os.link(victim, file)
    # Without a plan nothing is a conversion's.
    planned = file.name != PLAN and (place / WORK / PLAN).exists()
    what = f"{file.name} is another name of {victim.name}"
    return Damage(what, "done" if planned or file.name.startswith(f".{PLAN}") else "refused")


def planted_shards(place: Path, rng: np.random.Generator) -> Damage:
    """Files of the command's own names that it didn't write, which mustn't become part of the checkpoint."""
    folder = place / WORK / CHECKPOINT
    folder.mkdir(exist_ok=True)
    name = _pick(
        rng,
        [
            *("model.safetensors", "model-00099-of-00099.safetensors", "model-00001-of-00019.safetensors"),
            *("model-00019-of-00019.safetensors", ".model-00019-of-00019.safetensors.unfinished", "tokenizer.json"),
            *(".config.json.unfinished", "config.json", "chat_template.jinja", "merges.txt"),
        ],
    )
    (folder / name).write_bytes(rng.bytes(int(rng.integers(0, 300))))
    return Damage(f"{name} is planted", "done" if (place / WORK / PLAN).exists() else "refused")


def shards_that_are_something_else(place: Path, rng: np.random.Generator) -> Damage:
    """A link, a pipe, a device or a folder where the command has files."""
    folder = place / WORK / CHECKPOINT
    folder.mkdir(exist_ok=True)
    names = [*(shard.name for shard in _shards(place)), ".model-00001-of-00019.safetensors.unfinished", *_SMALL_FILES]
    name = _pick(rng, names)
    kind = _something_else(folder / name, place, rng)
    return Damage(f"{name} is a {kind}", "refused")


# The folder itself, and what it notes


def notes_that_are_something_else(place: Path, rng: np.random.Generator) -> Damage:
    """The same of what lies beside the shards."""
    name = _pick(rng, [PLAN, FINISHED, CHECKPOINT, "lock", f".{PLAN}.unfinished", f".{FINISHED}.unfinished"])
    path = place / WORK / name
    kind = _something_else(path, place, rng)
    return Damage(f"{name} is a {kind}", "refused")


_ODD_NOTES: list[bytes] = [
    *(b"", b"{", b"null", b"[]", b"3", b"{}", b"[" * 10**5, b'{"shards":' * 10**5, b"\xff\xfe", b"\0" * 100),
    *(b'{"shards": 3, "folder": 4}', b'{"shards": {}, "folder": null}', b'{"shards": [], "folder": []}'),
    *(b'{"shards": {"model-00001-of-00019.safetensors": {"a": 1}}, "folder": "x"}', b'{"shards": null}'),
    *(b'{"shards": {"a": "b", "a": "c"}, "folder": 1}', b'{"folder": 1e400, "shards": {}}', b"9" * 10_000),
]


def damaged_notes(place: Path, rng: np.random.Generator) -> Damage:
    """What is known of finished shards is damaged, or lies."""
    path = place / WORK / FINISHED
    content = path.read_bytes() if path.exists() else b'{"shards": {}, "folder": null}'
    kind = _pick(rng, ["flipped", "short", "odd", "odd", "lies", "lies", "huge", "gone"])
    if kind == "gone":
        path.unlink(missing_ok=True)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "lies":
        noted = json.loads(content)
        for shard in _shards(place):
            noted["shards"][shard.name] = _pick(rng, ["0" * 64, "", None, 3, [], noted["shards"].get(shard.name)])
        noted["folder"] = _pick(rng, [None, 1, place.stat().st_ino, (place / WORK).stat().st_ino, -1, 2**64, "x"])
        path.write_text(json.dumps(noted))
    else:
        odd = {"flipped": _flipped(content, rng), "short": content[: rng.integers(len(content))]}
        path.write_bytes(odd.get(kind) or _pick(rng, _ODD_NOTES))
    return Damage(f"{FINISHED} is {kind}", "done" if (place / WORK / PLAN).exists() else None)


def damaged_plans(place: Path, rng: np.random.Generator) -> Damage:
    """The plan is damaged, another conversion's, or none at all."""
    path = place / WORK / PLAN
    if not path.exists():
        return Damage("nothing", "done")
    content = path.read_bytes()
    kind = _pick(rng, ["flipped", "short", "odd", "other", "huge", "gone"])
    if kind == "gone":
        path.unlink()
    elif kind == "huge":
        os.truncate(path, 2**40)
    elif kind == "other":
        plan = json.loads(content)
        plan[_pick(rng, sorted(plan))] = _pick(rng, [None, [], "x", {"a": 1}, 10**30])
        path.write_text(json.dumps(plan))
    else:
        path.write_bytes({"flipped": _flipped(content, rng), "short": content[:-1]}.get(kind) or _pick(rng, _ODD_NOTES))
    outcomes: dict[str, Outcome] = {"other": "done", "huge": "refused", "short": "refused", "odd": "refused"}
    # Of a plan that is gone, it matters what else is there.
    return Damage(f"{PLAN} is {kind}", outcomes.get(kind))


def foreign_files(place: Path, rng: np.random.Generator) -> Damage:
    """Somebody's files and folders among the command's."""
    folder = place / WORK / CHECKPOINT if (place / WORK / CHECKPOINT).is_dir() and rng.random() < 0.5 else place / WORK
    name = _pick(
        rng,
        [
            *("notes.txt", ".hidden", "model-1.safetensors", "model.safetensors.bak", "config.json~", "README.md"),
            *("plan.json.old", ".plan.json-01234567.unfinished", "a\nb", "\x1b[2J", "é" * 100, "n" * 255, "Lock"),
            *("model-x.safetensors.unfinished", "checkpoint2", "my folder"),
        ],
    )
    path = folder / name
    if name in ("checkpoint2", "my folder"):
        path.mkdir()
        (path / "notes.txt").write_text("mine")
        return Damage(f"{folder.name} holds the folder {name}", "refused", (path / "notes.txt",))
    path.write_text("mine")
    return Damage(f"{folder.name} holds {name!r}", "refused", (path,))


def work_folders_that_are_something_else(place: Path, rng: np.random.Generator) -> Damage:
    """The whole of it is a link, a pipe or a file; what was there lies where a link leads."""
    work = place / WORK
    kind = _pick(rng, ["link to itself moved", "link to a folder", "link to nothing", "loop", "pipe", "file"])
    if kind == "link to itself moved":
        work.rename(place / "victim" / "moved")
        work.symlink_to(place / "victim" / "moved")
        return Damage(f"the work folder is a {kind}", "refused")
    shutil.rmtree(work)
    if kind == "link to a folder":
        work.symlink_to(place / "victim")
    elif kind == "link to nothing":
        work.symlink_to(place / "victim" / "new")
    elif kind == "loop":
        work.symlink_to(work.name)
    elif kind == "pipe":
        os.mkfifo(work)
    else:
        work.write_text("mine")
    return Damage(f"the work folder is a {kind}", "refused", (work,) if kind == "file" else ())


def places_that_are_taken(place: Path, rng: np.random.Generator) -> Damage:
    """Something has come where the checkpoint is to be."""
    path = place / "dbrx"
    if path.exists():
        return Damage("nothing", None)
    kind = _pick(rng, ["empty folder", "folder", "file", "link to a folder", "link to nothing"])
    if kind == "empty folder":
        path.mkdir()
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
        return Damage(f"a {kind} is there", "refused", (path / "notes.txt",))
    elif kind == "file":
        path.write_text("mine")
        return Damage(f"a {kind} is there", "refused", (path,))
    else:
        path.symlink_to(place / "victim" / ("" if kind == "link to a folder" else "new"))
    return Damage(f"a {kind} is there", "refused")


def nothing(place: Path, rng: np.random.Generator) -> Damage:
    """No damage at all."""
    return Damage("nothing", "done")


WAYS: Mapping[str, Way] = {
    way.__name__: way
    for way in (
        damaged_shards,
        shards_with_a_second_name,
        planted_shards,
        shards_that_are_something_else,
        notes_that_are_something_else,
        damaged_notes,
        damaged_plans,
        foreign_files,
        work_folders_that_are_something_else,
        places_that_are_taken,
        nothing,
    )
}
