"""Resumes many interrupted conversions whose work folders were damaged, and prints what came of each as a line of JSON.

    python -m tests.support.resume_damaged COUNT SEED FOLDER

The conversions are interrupted by SIGKILL before each of their file operations in turn. Cases run in this process, one
after the other: before each it prints the case's number, and it ends itself when one takes too long.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_fn.convert import main as convert
from tests.support.convert_and_kill import converted
from tests.support.damage import write_base
from tests.support.damage_work import WAYS, WORK
from tests.support.load_damaged import SECONDS, forget_peak, limit_memory, limited_files, peak_memory

# A file for each linear.
OPTIONS = ["--shard-size", "1e-9"]


def listing(root: Path) -> dict[str, str]:
    """Every name below a folder, with what is under it; a link's is where it leads."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def interrupted(source: Path, root: Path) -> list[Path]:
    """What conversions leave that are killed before each of their file operations."""
    left: list[Path] = []
    operation = 0
    while True:
        operation += 1
        place = root / f"{operation:03d}"
        place.mkdir(parents=True)
        child = os.fork()
        if not child:
            with tempfile.TemporaryDirectory() as told:
                converted(convert, [str(source), str(place / "dbrx"), *OPTIONS], operation, Path(told))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            shutil.rmtree(place)
            return left
        if (place / WORK).exists():
            left.append(place)


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err


@limited_files()
def resumed(source: Path, place: Path, foreign: tuple[Path, ...], expected: dict[str, str]) -> dict[str, Any]:
    """Converts, and says what came of it and what was touched that mustn't be."""
    before = {path: path.read_bytes() for path in foreign}
    victims = listing(place / "victim")
    names = {path.name for path in place.iterdir()}
    forget_peak()
    memory = peak_memory()
    with captured() as (out, err):
        try:
            status: object = convert([str(source), str(place / "dbrx"), *OPTIONS])
        except BaseException:
            status = traceback.format_exc()
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(("going on after", "warning: "))]
    outcome = f"{status}: {err.getvalue()}"
    if status == 0 and listing(place / "dbrx") == expected:
        outcome = "done"
    elif status == 2 and not out.getvalue():
        outcome = "refused"
    there = {path.name for path in place.iterdir()}
    left = there - names - {"dbrx"} | (there & {WORK} if status == 0 else set())
    touched = [str(path) for path, content in before.items() if not path.is_file() or path.read_bytes() != content]
    return {
        "outcome": outcome,
        "lines": lines,
        "left": sorted(left),
        "touched": touched + ([] if listing(place / "victim") == victims else ["victim"]),
        "grown": peak_memory() - memory,
    }


def main(count: int, seed: int, root: Path) -> None:
    """Damages and resumes, each way in turn, in a folder that is made for each case and removed again."""
    # Nothing here loses its power, and waiting for the disk would take most of the time.
    os.fsync = lambda _: None  # type: ignore[assignment]
    source = root / "source"
    write_base(source, "fused")
    with captured():
        assert convert([str(source), str(root / "whole" / "dbrx"), *OPTIONS]) == 0
    expected = listing(root / "whole" / "dbrx")
    snapshots = interrupted(source, root / "left")
    limit_memory()
    ways = list(WAYS)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        case = root / "case"
        snapshot = snapshots[rng.integers(len(snapshots))]
        shutil.copytree(snapshot, case, symlinks=True)
        (case / "victim" / "inner").mkdir(parents=True)
        for name in ("plan.json", "model-00001-of-00019.safetensors", "config.json", "inner/notes.txt"):
            (case / "victim" / name).write_text(f"mine: {name}")
        way = ways[number % len(ways)]
        damage = WAYS[way](case, rng)
        if (snapshot / "dbrx").exists() and damage.outcome == "done":
            # All was done but for what is cleaned up, and that a folder is there may be all that is said.
            damage = replace(damage, outcome=None)
        about = {"number": number, "way": way, "what": damage.what, "killed before": snapshot.name}
        print(json.dumps(about), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        result = resumed(source, case, damage.foreign, expected)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(about | {"expected": damage.outcome} | result), flush=True)
        shutil.rmtree(case)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
