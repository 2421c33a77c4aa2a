"""Resumes many damaged runs, one after the other, and prints what came of each as a line of JSON.

    python -m tests.support.resume_damaged_runs WAY COUNT FOLDER

It is a process of its own, so that one that crashes, hangs or takes all memory tells which case it was.
"""

import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_fn.train import main as train
from tests.support.damage_runs import WAYS
from tests.support.tiny_runs import arguments, contents, write_config, write_conversations, write_text

SECONDS = 20
MEMORY = 2 * 2**30
BASES = ("finished", "unfinished", "fresh")


def write_bases(root: Path) -> None:
    """A finished run; one whose last checkpoint and model are gone; one that is only set up; and another run."""
    config, text = write_config(root / "config.json"), write_text(root / "text.md", 60)
    chats = write_conversations(root / "chats.jsonl", 40)
    more = {"steps": 4, "save_every": 2, "eval_every": 2, "sequence_length": 8, "batch_size": 2}
    for name, data, seed in (("finished", text, 0), ("unfinished", chats, 0), ("other", text, 1)):
        assert train(arguments(root / name, config, [data], seed=seed, held_out_share=0.2, **more)) == 0
    shutil.copytree(root / "finished", root / "fresh")
    shutil.copytree(root / "unfinished", root / "unfinished whole")
    for path in (root / "unfinished" / "checkpoints" / "step-00000004", root / "unfinished" / "model"):
        shutil.rmtree(path)
    for part in ("checkpoints", "model"):
        shutil.rmtree(root / "fresh" / part)
    (root / "fresh" / "metrics.jsonl").unlink()
    (root / "victim" / "step-00000002").mkdir(parents=True)
    (root / "victim" / "file").write_text("precious")
    (root / "victim" / "step-00000002" / "file").write_text("precious")


def resumed(run: Path) -> tuple[int | None, str]:
    """The command's status and what it said on standard error; `None` and a traceback if it didn't end with one."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return train(["--out", str(run), "--resume"]), said.getvalue()
        # Whatever it is.
        except BaseException:
            return None, traceback.format_exc()


def main(way: str, count: int, root: Path) -> None:
    """Damages and resumes runs, of each base in turn."""
    # Nothing here hangs on what a power cut leaves, nor on pictures.
    os.fsync = lambda *_: None
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    write_bases(root)
    whole = {"finished": root / "finished", "unfinished": root / "unfinished whole", "fresh": root / "finished"}
    expected = {base: (folder / "model" / "model.safetensors").read_bytes() for base, folder in whole.items()}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**41, 2**41))
    for number in range(count):
        base, case = BASES[number % len(BASES)], root / "case"
        case.mkdir()
        for name in ("other", "victim"):
            shutil.copytree(root / name, case / name)
        run = Path(shutil.copytree(root / base, case / "run"))
        rng = np.random.default_rng([sum(way.encode()), number])
        what = WAYS[way](run, rng)
        about: dict[str, Any] = {"number": number, "base": base, "what": what}
        print(json.dumps(about), flush=True)
        beside = contents(case / "other"), contents(case / "victim")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        status, said = resumed(run)
        faulthandler.cancel_dump_traceback_later()
        model = run / "model" / "model.safetensors"
        same = model.is_file() and model.read_bytes() == expected[base]
        kept = (contents(case / "other"), contents(case / "victim")) == beside
        print(json.dumps(about | {"status": status, "said": said, "same": same, "kept": kept}), flush=True)
        shutil.rmtree(case)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
