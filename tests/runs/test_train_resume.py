"""A run that is killed again and again, anywhere, and resumed: to the last bit the one that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import pytest

from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.files.atomic import is_leftover
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.ops.formats import Format
from dbrx_fn.runs.folder import RunFolder
from tests.support.tiny_runs import arguments, contents, metrics, write_config, write_conversations, write_text

STEPS = 120
Aim = Literal["set-up", "start", "write", "removal", "step"]
# In this order, so that a run is set up before it is hit elsewhere; 18 for each of three runs.
AIMS: list[Aim] = [
    *("set-up", "set-up", "set-up", "set-up", "write", "step", "removal", "write", "start"),
    *("write", "write", "step", "removal", "write", "start", "write", "write", "step"),
]
# Seconds from what is aimed at until the kill, at most, and mostly less: it lasts about as long.
SPREAD: dict[Aim, float] = {"set-up": 0.15, "start": 1.2, "write": 0.012, "removal": 0.003, "step": 0.04}


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def noted(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Life:
    """One process of the command, from its start to its end."""

    def __init__(self, out: Path, options: list[str]) -> None:
        self.out = out
        self.resumed = (out / "run.json").exists()
        self.before = set(names(out / "checkpoints"))
        self.noted_before = noted(out)
        command = ["--out", str(out), "--resume"] if self.resumed else options
        self.hidden_seen: set[str] = set()
        self.log = out.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dbrx_fn.train", *command], stdout=log, stderr=subprocess.STDOUT
            )

    def new_checkpoints(self, hidden: bool) -> int:
        """How many this process has begun to write (hidden), or has written."""
        new = set(names(self.out / "checkpoints")) - self.before
        self.hidden_seen |= {name for name in new if name.startswith(".")}
        return len(self.hidden_seen) if hidden else sum(not name.startswith(".") for name in new)

    def reached(self, aim: Aim, number: int) -> bool:
        match aim:
            case "start":
                return True
            case "set-up":
                # A kill that came late leaves a run that is set up.
                return self.resumed or (self.out.parent / f".{self.out.name}-set-up").exists()
            case "write":
                return self.new_checkpoints(hidden=True) >= number
            case "removal" | "step":
                return self.new_checkpoints(hidden=False) >= 1

    def kill(self, aim: Aim, draw: random.Random) -> bool:
        """Kills the process at a random moment near what is aimed at; False if it ended before."""
        number, delay = draw.randint(1, 3), SPREAD[aim] * draw.random() ** 2
        while not self.reached(aim, number):
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        until = time.perf_counter() + delay
        # However fast the machine, a run that is hit so often must not come to its end before.
        while time.perf_counter() < until and self.new_checkpoints(hidden=False) < 4:
            time.sleep(0.0005)
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def place(self) -> str:
        """Where the kill hit, by what it left."""
        run = RunFolder(self.out)
        if not run.started:
            return "set-up" if (self.out.parent / f".{self.out.name}-set-up").exists() else "before the set-up"
        leftovers = [name for name in set(names(run.checkpoints)) - self.before if name.startswith(".")]
        if leftovers:
            newest = max([0, *run.saved_steps()])
            written = any(int(name.split("-")[1]) > newest for name in leftovers)
            return "a checkpoint's write" if written else "a checkpoint's removal"
        if not self.resumed:
            return "first steps"
        moved = set(names(run.checkpoints)) - self.before or noted(self.out) > self.noted_before
        return "a step" if moved else "start-up"


def run_to_end(out: Path, options: list[str]) -> None:
    life = Life(out, options)
    assert life.process.wait(timeout=120) == 0, life.log.read_text()


def masked(folder: Path) -> Path:
    return write_conversations(folder / "conversations.jsonl")


def plain(folder: Path) -> Path:
    return write_text(folder / "text.md")


def quantized(folder: Path, config: Path) -> Path:
    """A model in 4 bits, with a tokenizer."""
    run_to_end(folder / "start", arguments(folder / "start", config, [plain(folder)], steps=1))
    params, found = load(folder / "start" / "model")
    form = Format(4, 32)
    packed = quantize(params, found, Quantization(form, form, form, form))
    save(folder / "quantized", packed, found, tokenizer_files=folder / "start" / "model")
    return folder / "quantized"


@pytest.mark.parametrize(
    ("seed", "write_data", "options"),
    [
        (0, plain, {}),
        (1, plain, {"micro_batches": 2, "dtype": "bfloat16", "schedule": "linear"}),
        (2, masked, {"z_loss_weight": 0.001, "held_out_share": 0.2}),
        (3, masked, {"lora": 4, "held_out_share": 0.2}),
    ],
    ids=["plain", "micro-batches-bfloat16", "masked", "adapters"],
)
def test_a_run_killed_anywhere_ends_as_one_that_nobody_disturbed(
    seed: int, write_data: Callable[[Path], Path], options: dict[str, Any], tmp_path: Path, measured: Any
) -> None:
    config = write_config(tmp_path / "config.json")
    every = {"steps": STEPS, "save_every": 2, "eval_every": 7, "log_every": 3} | options
    adapts = "lora" in options
    model = {"model": quantized(tmp_path, config)} if adapts else {}

    def command(out: Path, keep: int) -> list[str]:
        return arguments(out, None if adapts else config, [write_data(tmp_path)], **every, **model, keep=keep)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_to_end(undisturbed, command(undisturbed, keep=STEPS))
    draw = random.Random(seed)
    places: Counter[str] = Counter()
    aims = AIMS[::2] if adapts else AIMS
    # On a busy machine a small checkpoint can be whole before the kill comes. A few more tries leave steps to the run.
    tries: Iterable[Aim] = chain(aims, repeat("write", 6))
    for aim in tries:
        if places.total() >= len(aims) and places["a checkpoint's write"]:
            break
        life = Life(killed, command(killed, keep=2))
        assert life.kill(aim, draw), f"it ended by itself, after {places}: {life.log.read_text()}"
        places[life.place()] += 1
        check_checkpoints(killed, undisturbed)
    run_to_end(killed, command(killed, keep=2))

    last = [STEPS - 2, STEPS]
    assert RunFolder(killed).saved_steps() == last
    check_checkpoints(killed, undisturbed)
    for part in ("adapters" if adapts else "model", "tokenizer", "data"):
        assert contents(killed / part) == contents(undisturbed / part)
    assert metrics(killed) == metrics(undisturbed)
    assert [name for folder in (tmp_path, killed, killed / "checkpoints") for name in left_in(folder)] == []
    assert places.total() >= len(aims)
    assert places["a checkpoint's write"]
    for place, count in places.items():
        measured(f"kills in {place}", count)


def check_checkpoints(killed: Path, undisturbed: Path) -> None:
    """Each that can be seen is whole: it loads, and is bitwise what the undisturbed run wrote at that step."""
    run = RunFolder(killed)
    for step in run.saved_steps():
        folder = run.checkpoint(step)
        if "config.json" in names(folder):
            load(folder)
        mx.eval(mx.load(str(folder / "training" / "state.safetensors")))
        assert json.loads((folder / "training" / "state.json").read_bytes())["step"] == step
        assert contents(folder) == contents(RunFolder(undisturbed).checkpoint(step))


def left_in(folder: Path) -> Iterator[str]:
    return (entry.name for entry in folder.iterdir() if is_leftover(entry))
