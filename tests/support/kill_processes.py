"""Kills one of two processes at random moments: `python -m tests.support.kill_processes [COUNT [SEED]]`.

Each time, every process must be gone within 10 seconds, and the others say in one sentence which one has ended. A run
of training must go on afterwards.
"""

import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Literal

import numpy as np

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.quantization import dequantize
from tests.support.processes import Finished, finished, run_processes, started

Kind = Literal["generate", "serve", "train"]
KINDS: tuple[Kind, ...] = ("generate", "serve", "train")
TINY = {
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 300,
    "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
}
"""The `config.json` of a model that trains in no time."""


@dataclass(frozen=True)
class Killed:
    """What followed when a process was killed.

    `seconds`: until the last of the others was gone.
    `others`: how they ended.
    """

    seconds: float
    others: list[Finished]

    def problems(self, victim: int) -> list[str]:
        """What isn't as it must be."""
        said = [line for one in self.others for line in one.err.splitlines() if line.startswith("error:")]
        found = [] if self.seconds < 10 else [f"it took {self.seconds:.1f} s"]
        if len(said) != 1 or f"the process of rank {victim} has ended" not in said[0]:
            found.append(f"they said {said}")
        return found + [f"status {one.status}, {one.err[-500:]}" for one in self.others if one.status != 2]


def dense_small(folder: Path) -> Path:
    """The small model, dense: its quantized groups can't be divided."""
    params, config = load(SMALL)
    save(folder, dequantize(params, config), config, tokenizer_files=SMALL)
    return folder


def training(folder: Path, *options: str) -> list[str]:
    """The command of a run of training in this folder, on a text made here."""
    config, text = folder.parent / "tiny.json", folder.parent / "text.txt"
    config.write_text(json.dumps(TINY))
    words = np.random.default_rng(0).integers(0, 999, 3000).tolist()
    text.write_text(" ".join(map(str, words)))
    shape = ["--batch-size", "4", "--sequence-length", "16", "--log-every", "1"]
    return [*_RUN, str(folder), "--config", str(config), "--data", str(text), *shape, *options]


_RUN = ["dbrx_fn.train", "--out"]


def killed(processes: "Sequence[Popen[str]]", victim: int) -> Killed:
    """Kills one process, and waits for the others."""
    processes[victim].kill()
    began = time.monotonic()
    others = finished([one for rank, one in enumerate(processes) if rank != victim])
    return Killed(time.monotonic() - began, others)


def killed_in(kind: Kind, model: Path, folder: Path, moment: float, victim: int) -> tuple[list[str], float]:
    """Kills a process `moment` seconds after a command's first output.

    Returns:
        What isn't as it must be, and the seconds until the others were gone.
    """
    if kind == "generate":
        arguments = ["-m", "dbrx_fn.generate", "--model", str(model), "--prompt", "a", "--max-tokens", "2000"]
        arguments += ["--temp", "1"]
    elif kind == "serve":
        arguments = ["-m", "dbrx_fn.serve", "--model", str(model), "--port", "0"]
    else:
        arguments = ["-m", *training(folder / "run", "--steps", "4000", "--save-every", "20", "--eval-every", "50")]
    with started(arguments) as processes:
        first = processes[0].stderr if kind == "train" else processes[0].stdout
        assert first is not None
        line = first.readline() if kind != "generate" else first.read(1)
        if kind == "serve":
            threading.Thread(target=_asked, args=(line.strip(),), daemon=True).start()
        time.sleep(moment)
        if any(one.poll() is not None for one in processes):
            return [], 0.0
        result = killed(processes, victim)
    problems = result.problems(victim)
    if kind == "train" and (folder / "run" / "run.json").exists():
        problems += _resumes(folder / "run")
    return problems, result.seconds


def _asked(url: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1500, "temperature": 1}).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/completions", body, {"Content-Type": "application/json"})
    with suppress(OSError):
        urllib.request.urlopen(request, timeout=60).read()


def _resumes(run: Path) -> list[str]:
    """What is wrong with a killed run: it must go on for some steps, and leave no hidden files."""
    last = max((int(entry.name.removeprefix("step-")) for entry in run.glob("checkpoints/step-*")), default=0)
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"]["steps"] = last + 3
    (run / "run.json").write_text(json.dumps(settings))
    ended = run_processes(["-m", *_RUN, str(run), "--resume"])
    found = [f"resuming: {one.status} {one.err[-500:]}" for one in ended if one.status != 0]
    return found + [f"{entry} is left" for entry in run.rglob(".*")]


def main(count: int, seed: int) -> int:
    """Kills so many times, and prints what isn't as it must be."""
    rng, bad = np.random.default_rng(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        model = dense_small(Path(folder) / "small")
        for number in range(count):
            kind, victim, moment = KINDS[number % 3], int(rng.integers(2)), float(rng.uniform(0, 2))
            (Path(folder) / str(number)).mkdir()
            problems, seconds = killed_in(kind, model, Path(folder) / str(number), moment, victim)
            bad += bool(problems)
            said = problems or f"as it must be, gone after {seconds:.2f} s"
            print(f"{number:3d} {kind:8} rank {victim} after {moment:.2f} s: {said}", flush=True)
    print(f"{bad} of {count} weren't as they must be")
    return int(bad > 0)


if __name__ == "__main__":
    words = [*map(int, sys.argv[1:]), 30, 0]
    sys.exit(main(words[0], words[1] if len(sys.argv) > 2 else 0))
