"""Ways of damaging a run's folder, each drawn from a generator: what a crash, a disk or a stranger may leave there.

A way gets a whole run in a folder of its own, and beside it `other`, a run of another seed, and `victim`, which nothing
may change.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_fn.files.checksums import file_sum, folder_sums, sealed

Way = Callable[[Path, np.random.Generator], str]
SCRAPS: list[Any] = [
    None, True, 0, -1, 1, 3, 1.5, 1e308, 10**30, 2**31, 2**63, 2**64, float("nan"), float("inf"), "", "x", "\x1b[2J",
    "\ud800", "../../victim/file", "/etc/passwd", "y" * 10**5, [], {}, [1], [[[]]], {"a": 1},
    {"bytes": 1, "sha256": "x"},
]  # fmt: skip


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of some values."""
    values = list(values)
    return values[rng.integers(len(values))]


def _files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".png")


def _replaced(path: Path, content: bytes) -> None:
    # A new file, since others of the same content may be linked to the old one.
    path.unlink()
    path.write_bytes(content)


def flipped(run: Path, rng: np.random.Generator) -> str:
    """Bytes of a file are others."""
    path = pick(rng, _files(run))
    content = bytearray(path.read_bytes())
    for place in rng.integers(0, len(content), rng.integers(1, 4)):
        content[place] ^= int(rng.integers(1, 256))
    _replaced(path, bytes(content))
    return f"bytes of {path.relative_to(run)}"


def truncated(run: Path, rng: np.random.Generator) -> str:
    """A file ends early or goes on."""
    path = pick(rng, _files(run))
    content = path.read_bytes()
    _replaced(path, content[: rng.integers(len(content))] if rng.random() < 0.8 else content + rng.bytes(9))
    return f"the end of {path.relative_to(run)}"


def removed(run: Path, rng: np.random.Generator) -> str:
    """A file or folder is gone."""
    path = pick(rng, sorted(run.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"{path.relative_to(run)} is gone"


def special(run: Path, rng: np.random.Generator) -> str:
    """A pipe, a link, a device, a huge file or a folder stands in a file's or folder's place."""
    path = pick(rng, sorted(run.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = pick(rng, ["pipe", "folder", "huge", "file", "../../victim", "/dev/zero", path.name, "/nowhere"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("huge", "file"):
        path.touch()
        os.truncate(path, 2**40 if kind == "huge" else 5)
    else:
        path.symlink_to(run.parent / "victim" if "victim" in kind else kind)
    return f"{path.relative_to(run)} is {kind}"


def swapped(run: Path, rng: np.random.Generator) -> str:
    """A file or folder is another's: of the same run, or of another run."""
    path, other = pick(rng, sorted(run.rglob("*"))), run.parent / "other"
    same = other / path.relative_to(run)
    alike = [one for one in run.rglob(path.name) if one != path]
    source = pick(rng, [one for one in (same, *alike) if one.exists()] or [path])
    if source.is_dir():
        copy = shutil.copytree(source, run.parent / "copy")
        shutil.rmtree(path)
        copy.rename(path)
    else:
        _replaced(path, source.read_bytes())
    return f"{path.relative_to(run)} is {source.relative_to(run.parent)}"


def renamed(run: Path, rng: np.random.Generator) -> str:
    """A checkpoint has another step's name, or an odd one, or is there twice."""
    steps = sorted((run / "checkpoints").glob("step-*")) or [run / "data"]
    path = pick(rng, steps)
    name = pick(
        rng,
        ["step-00000001", "step-00000005", "step-00000009", "step-99999999", "step-000000004", "step--0000004",
         "step-٠٠٠٠٠٠٠٩", "step-00000000", ".step-00000009-0123abcd.unfinished", "step-00000009 ", "x"],
    )  # fmt: skip
    new = path.with_name(name)
    if new.exists():
        return "nothing"
    if rng.random() < 0.5:
        path.rename(new)
    else:
        shutil.copytree(path, new)
    return f"{path.name} is {name}"


def _set(value: Any, rng: np.random.Generator, scrap: Any) -> str:
    """Puts a scrap somewhere into a JSON value."""
    inner, names = value, []
    while True:
        name = pick(rng, inner) if isinstance(inner, dict) else int(rng.integers(len(inner)))
        names.append(str(name))
        if not isinstance(inner[name], dict | list) or not inner[name] or rng.random() < 0.2:
            break
        inner = inner[name]
    if isinstance(inner, dict) and rng.random() < 0.15:
        inner[pick(rng, ["x", "\x1b[2J"])] = inner.pop(name)
    else:
        inner[name] = scrap
    return ".".join(names)


def odd_settings(run: Path, rng: np.random.Generator) -> str:
    """A field of run.json is something else."""
    settings, scrap = json.loads((run / "run.json").read_bytes()), pick(rng, SCRAPS)
    where = _set(settings, rng, scrap)
    _replaced(run / "run.json", json.dumps(settings).encode())
    return f"run.json's {where} is {str(scrap)[:40]!r}"


def odd_notes(run: Path, rng: np.random.Generator) -> str:
    """A field of a checkpoint's note is something else, with a sum that fits or not."""
    notes = sorted(run.rglob("state.json"))
    if not notes:
        return odd_settings(run, rng)
    path = notes[-1]
    note, scrap = json.loads(path.read_bytes()), pick(rng, SCRAPS)
    where = _set(note, rng, scrap)
    if rng.random() < 0.7:
        note.pop("checksum", None)
        note = sealed(note)
    _replaced(path, json.dumps(note).encode())
    return f"state.json's {where} is {str(scrap)[:40]!r}"


def _resealed(folder: Path, changes: Mapping[str, Any]) -> None:
    meta = json.loads((folder / "meta.json").read_bytes()) | dict(changes)
    meta["files"] = {path.name: file_sum(path) for path in folder.glob("*.npy") if path.stat().st_size < 2**30}
    meta.pop("checksum", None)
    _replaced(folder / "meta.json", json.dumps(sealed(meta)).encode())


def odd_meta(run: Path, rng: np.random.Generator) -> str:
    """A field of a token file's note is something else, with sums that fit."""
    folder = pick(rng, sorted((run / "data").iterdir()))
    name = pick(rng, ["tokens", "target_count", "bytes", "documents", "masked", "fingerprint"])
    scrap = pick(rng, SCRAPS)
    _resealed(folder, {name: scrap})
    return f"{folder.name}'s {name} is {str(scrap)[:40]!r}"


def odd_tokens(run: Path, rng: np.random.Generator) -> str:
    """Other tokens, of a stranger who knows how sums are made."""
    folder = pick(rng, sorted((run / "data").iterdir()))
    tokens = np.load(folder / "tokens.npy")
    place = rng.integers(len(tokens))
    changed = tokens.astype(pick(rng, [np.uint16, np.uint32]))
    changed[place] = pick(rng, [300, 65_535, 5, np.iinfo(changed.dtype).max])
    (folder / "tokens.npy").unlink()
    np.save(folder / "tokens.npy", changed)
    _resealed(folder, {})
    return f"token {place} of {folder.name} is {changed[place]}, {changed.dtype}"


def odd_arrays(run: Path, rng: np.random.Generator) -> str:
    """A token file's header lies, asks for objects, or is no header."""
    folder = pick(rng, sorted((run / "data").iterdir()))
    path = folder / "tokens.npy"
    content = path.read_bytes()
    data = content[10 + int.from_bytes(content[8:10], "little") :]
    count = len(data) // 2
    header = pick(
        rng,
        [f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}"
         for kind in ("<u2", "|O", "<f8", ">u2", "<U9") for order in ("False", "True")
         for shape in (f"({count},)", f"(-{count},)", "()", f"({10**17},)", "(2, 10**9)", "(" + "9" * 5000 + ",)")]
        + ["[" * 9000, "(" * 200 + ")" * 200, "__import__('os')", "{'a':" + "-" * 9000 + "1}", "'x' * 10**10", "\\x00"],
    )  # fmt: skip
    text = header.encode() + b" " * 7 + b"\n"
    _replaced(path, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    _resealed(folder, {"tokens": pick(rng, [count, 10**17])})
    return f"{folder.name}'s header is {header[:60]}"


def odd_metrics(run: Path, rng: np.random.Generator) -> str:
    """A line of metrics.jsonl is something else, huge, deep or endless."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    line = json.loads(pick(rng, lines)) if lines else {"step": 1}
    _set(line, rng, pick(rng, SCRAPS))
    odd = pick(
        rng,
        [json.dumps(line).encode(), json.dumps(line).encode(), b"\xff", b"x" * 2**21, b"[" * 10**5, b'{"step": 1}',
         b'{"step": ' + b"9" * 9000 + b"}", b"", b'{"step": 1, "step": 2}', b"null"],
    )  # fmt: skip
    lines.insert(int(rng.integers(len(lines) + 1)), odd)
    path.write_bytes(b"\n".join(lines) + b"\n")
    if rng.random() < 0.1:
        os.truncate(path, 2**40)
    return f"metrics.jsonl has {odd[:60]!r}"


def odd_tensors(run: Path, rng: np.random.Generator) -> str:
    """A field of the header of a checkpoint's tensors is something else, with sums that fit."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    if not folders:
        return odd_meta(run, rng)
    path = folders[-1] / pick(rng, ["model.safetensors", "training/state.safetensors"])
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, scrap = json.loads(content[8:end]), pick(rng, SCRAPS)
    where = _set(header, rng, scrap)
    text = json.dumps(header).encode()
    _replaced(path, len(text).to_bytes(8, "little") + text + content[end:])
    note = json.loads((folders[-1] / "training" / "state.json").read_bytes())
    (folders[-1] / "training" / "state.json").unlink()
    note.pop("checksum")
    note["files"] = folder_sums(folders[-1])
    (folders[-1] / "training" / "state.json").write_text(json.dumps(sealed(note)))
    return f"{path.name}'s {where} is {str(scrap)[:40]!r}"


def planted(run: Path, rng: np.random.Generator) -> str:
    """Names of the run's own that lead elsewhere, which it removes or writes to."""
    victim = run.parent / "victim"
    name = pick(
        rng,
        [".metrics.jsonl-0123abcd.unfinished", "checkpoints/.step-00000006-0123abcd.unfinished", "checkpoints/x",
         "checkpoints/step-00000001", "checkpoints/step-00000009", "checkpoints/damaged-step-00000002-0123abcd",
         "model/notes.txt", "notes.txt", ".model-0123abcd.unfinished", "training", "model/model-2.safetensors"],
    )  # fmt: skip
    path = run / name
    path.parent.mkdir(exist_ok=True)
    kind = pick(rng, ["link", "file link", "file", "folder"])
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "file link":
        path.symlink_to(victim / "file")
    elif kind == "file":
        path.write_text("x")
    else:
        shutil.copytree(victim, path)
    return f"{name} is a {kind}"


WAYS: Mapping[str, Way] = {
    way.__name__: way
    for way in (
        flipped, truncated, removed, special, swapped, renamed, odd_settings, odd_notes, odd_meta, odd_tokens,
        odd_arrays, odd_metrics, odd_tensors, planted,
    )
}  # fmt: skip
