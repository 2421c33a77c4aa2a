"""A training run's folder: its settings, data, checkpoints and metrics, none of them ever half-written.

    run.json                          what the run was asked for
    tokenizer/                        the tokenizer that made the tokens
    data/train/, data/held_out/       the tokens (dbrx_fn.token_file)
    checkpoints/step-00000500/        a plain checkpoint, which `generate` and mlx-lm load, with
        training/                     what else it takes to go on: the optimizer's state and the key
    metrics.jsonl                     a line every few steps

A checkpoint's tensors are the float32 master weights, so that nothing is stored twice.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.atomic import new_folder, write_file
from dbrx_fn.config import Config
from dbrx_fn.errors import CheckpointError, InputError
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
            raise InputError(f"{self.settings_file} can't be read ({error}): start the run anew elsewhere.") from None
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
            CheckpointError: if the state holds NaN or infinity.
        """
        leaves = dict(tree_flatten(state["params"]))
        broken = [path for path, array in leaves.items() if not mx.isfinite(array).all().item()]
        if broken:
            raise CheckpointError(f"{broken[0]} holds NaN or infinity after step {step}, so it isn't saved.")
        with new_folder(self.checkpoint(step)) as folder:
            write_checkpoint(folder, state["params"], config, tokenizer_files=self.tokenizer)
            training = folder / "training"
            training.mkdir()
            # Paths hold dots of their own, so tensors are numbered in the tree's order.
            rest = _leaves(state)
            write_tensors(training / "state.safetensors", {f"{n:06d}": array for n, (_, array) in enumerate(rest)}, {})
            (training / "state.json").write_text(json.dumps({"step": step, "tensors": [path for path, _ in rest]}))
        for old in self.saved_steps()[:-keep]:
            _remove(self.checkpoint(old))

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
        params, _ = load(folder, dtype="float32")
        template = _leaves(fresh)
        try:
            names = json.loads((folder / "training" / "state.json").read_bytes())["tensors"]
            arrays = cast(dict[str, mx.array], mx.load(str(folder / "training" / "state.safetensors")))
            found = [arrays[f"{n:06d}"] for n in range(len(names))]
            mx.eval(found)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / 'training'} can't be read ({error}): remove {folder}, and the run resumes from the"
                " checkpoint before it."
            ) from None
        shapes = [(path, array.shape, array.dtype) for path, array in template]
        if shapes != [(path, array.shape, array.dtype) for path, array in zip(names, found, strict=True)]:
            raise CheckpointError(f"{folder / 'training'} belongs to another run: resume with the folder it came from.")
        rest = _like(_resumable(fresh), iter(found))
        return {**rest, "params": params}, steps[-1]

    def clean(self) -> None:
        """Removes what a killed run left half-written: it lies under hidden names."""
        for folder in (self.path, self.checkpoints):
            if folder.is_dir():
                for entry in folder.iterdir():
                    if entry.name.startswith("."):
                        _remove(entry)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without a last one that was cut short."""
        try:
            lines = self.metrics_file.read_text().splitlines()
        except FileNotFoundError:
            return []
        return list(_whole_lines(lines))

    def cut_metrics(self, step: int) -> None:
        """Drops what was noted after `step`, which a resumed run does again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_file(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _resumable(state: State) -> State:
    return {name: part for name, part in state.items() if name != "params"}


def _leaves(state: State) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(_resumable(state)))


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
    hidden = path if path.name.startswith(".") else path.with_name(f".removed-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _whole_lines(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return
