"""A training run's folder: its settings, data, checkpoints and metrics, none of them ever half-written.

    run.json                          what the run was asked for
    tokenizer/                        the tokenizer that made the tokens
    data/train/, data/held_out/       the tokens (dbrx_fn.token_file)
    checkpoints/step-00000500/        a plain checkpoint, which `generate` and mlx-lm load, with
        training/                     what else it takes to go on: the optimizer's state and the key
    metrics.jsonl                     a line every few steps

A checkpoint's tensors are the float32 master weights, so that nothing is stored twice.
"""

import contextlib
import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.atomic import hidden_beside, is_leftover, new_folder, write_file
from dbrx_fn.config import Config
from dbrx_fn.errors import CheckpointError, DbrxError, InputError, TrainingError
from dbrx_fn.file_lock import locked
from dbrx_fn.loader import load
from dbrx_fn.saver import write_checkpoint, write_tensors
from dbrx_fn.training import State

_STEP = re.compile(r"step-(\d{8,})")


class RunFolder:
    """Paths and files of one run; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.json"
        self.tokenizer = path / "tokenizer"
        self.train_data = path / "data" / "train"
        self.held_out_data = path / "data" / "held_out"
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"

    @property
    def started(self) -> bool:
        """Whether a run has been set up here."""
        return self.settings_file.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here; the lock goes with the process, however it ends.

        Raises:
            InputError: if another one does already.
        """
        taken = f"{self.path} is being trained by another process: wait until it ends."
        with locked(self.settings_file, taken):
            yield

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Notes what the run was asked for; from then on it has started."""
        write_file(self.settings_file, (json.dumps(settings, indent=2) + "\n").encode())

    def read_settings(self) -> dict[str, Any]:
        """What `write_settings` noted.

        Raises:
            InputError: if nothing was started here, or the file is damaged.
        """
        try:
            settings = json.loads(self.settings_file.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{self.path} holds no run to resume (there is no run.json): start one without --resume."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", error)
            raise InputError(f"{self.settings_file} can't be read ({reason}): start the run anew elsewhere.") from None
        return cast(dict[str, Any], settings)

    def saved_steps(self) -> list[int]:
        """Steps that there are checkpoints of, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def save(self, state: State, step: int, config: Config, *, keep: int) -> None:
        """Writes the checkpoint after `step` steps, and then removes all but the last `keep`.

        Raises:
            InputError: if it can't be written; what was there stays.
            TrainingError: if the state holds NaN or infinity.
        """
        broken = [path for path, array in _leaves(state) if not mx.isfinite(array).all().item()]
        if broken:
            raise self.not_finite(f"{broken[0]} holds NaN or infinity after", step)
        with new_folder(self.checkpoint(step)) as folder:
            write_checkpoint(folder, state["params"], config, tokenizer_files=self.tokenizer)
            training = folder / "training"
            training.mkdir()
            # Paths hold dots of their own, so tensors are numbered in the tree's order.
            rest = _leaves(_resumable(state))
            write_tensors(training / "state.safetensors", {f"{n:06d}": array for n, (_, array) in enumerate(rest)}, {})
            (training / "state.json").write_text(json.dumps({"step": step, "tensors": [path for path, _ in rest]}))
        for old in self.saved_steps()[:-keep]:
            _remove(self.checkpoint(old))

    def not_finite(self, what: str, step: int) -> TrainingError:
        """The error of a run whose numbers left the range at `step`; `what` is the sentence up to the step."""
        saved = self.saved_steps()
        after = (
            f"the last good checkpoint is {self.checkpoint(saved[-1])}: start from it with --model and a lower"
            if saved
            else "no checkpoint was saved yet: start anew with sound weights, or a lower"
        )
        return TrainingError(f"{what} step {step}, so training stops; {after} --learning-rate.")

    def load(self, fresh: State) -> tuple[State, int]:
        """The state of the last checkpoint and its step; `fresh` and 0, if there is none.

        Args:
            fresh: a state of the same structure.

        Raises:
            CheckpointError: if the checkpoint doesn't fit the run, or is damaged.
        """
        steps = self.saved_steps()
        if not steps:
            return fresh, 0
        folder = self.checkpoint(steps[-1])
        training = folder / "training"
        try:
            params, _ = load(folder, dtype="float32")
            names = json.loads((training / "state.json").read_bytes())["tensors"]
            arrays = cast(dict[str, mx.array], mx.load(str(training / "state.safetensors")))
            found = [arrays[f"{n:06d}"] for n in range(len(names))]
            mx.eval(found)
        except (DbrxError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            before = "resumes from the one before it" if steps[1:] else "begins again"
            raise CheckpointError(
                f"The checkpoint {folder} can't be read ({str(error).rstrip('.')}): remove it, and the run {before}."
            ) from None
        expected = _leaves(fresh["params"]) + _leaves(_resumable(fresh))
        if _outline(expected) != _outline(_leaves(params) + list(zip(names, found, strict=True))):
            raise CheckpointError(f"The checkpoint {folder} belongs to another run: resume where it came from.")
        rest = _like(_resumable(fresh), iter(found))
        return {**rest, "params": params}, steps[-1]

    def clean(self) -> None:
        """Removes what killed runs left half-written, inside of this folder and, of its set-up, beside it."""
        here = [entry for folder in (self.path, self.checkpoints) if folder.is_dir() for entry in folder.iterdir()]
        beside = self.path.parent.glob(f".{glob.escape(self.path.name)}-????????.unfinished")
        for entry in [*here, *beside]:
            if is_leftover(entry):
                _remove(entry)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without a last one that was cut short.

        Raises:
            InputError: if another is damaged, or the file can't be read.
        """
        try:
            lines = self.metrics_file.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [_metrics_line(line, f"{self.metrics_file}, line {n}") for n, line in enumerate(lines, start=1)]

    def cut_metrics(self, step: int) -> None:
        """Drops what was noted after `step`, which a resumed run does again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_file(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _resumable(state: State) -> State:
    return {name: part for name, part in state.items() if name != "params"}


def _leaves(tree: State) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def _outline(leaves: list[tuple[str, mx.array]]) -> list[tuple[str, tuple[int, ...], mx.Dtype]]:
    return [(path, array.shape, array.dtype) for path, array in leaves]


def _like(tree: Any, arrays: Iterator[mx.array]) -> Any:
    """`tree` with its arrays replaced, in `tree_flatten`'s order; `tree_unflatten` would split paths at their dots."""
    if isinstance(tree, dict):
        return {name: _like(part, arrays) for name, part in tree.items()}
    return next(arrays)


def _remove(path: Path) -> None:
    """Removes a file, or a folder under a hidden name first, so that half of it is never taken for the whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if is_leftover(path) else hidden_beside(path)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _metrics_line(line: bytes, source: str) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads(line)
        int(noted["step"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{source}: this isn't what a run notes there ({error}): mend it, or move the file.") from None
    return noted
