"""A training run's folder: its settings, data, checkpoints and metrics, none of them ever half-written.

    run.json                          what the run was asked for
    tokenizer/                        the tokenizer that made the tokens
    data/train/, data/held_out/       the tokens (dbrx_fn.data.token_file)
    checkpoints/step-00000500/        a plain checkpoint, and what it takes to go on (dbrx_fn.runs.checkpoint)
    metrics.jsonl                     a line every few steps (dbrx_fn.runs.metrics_file)
    model/                            the last step's model

A run is set up in a hidden folder beside its place, `.NAME-set-up`. Whoever sets a run up or trains it holds a lock on
the folder itself.
"""

import contextlib
import fnmatch
import json
import os
import re
import secrets
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import CHECKPOINT_FILES, TOKENIZER_FILES, write_checkpoint
from dbrx_fn.errors import CheckpointError, DbrxError, InputError, TrainingError
from dbrx_fn.files.atomic import flush, hidden_beside, is_leftover, new_folder, write_file
from dbrx_fn.files.checksums import file_sum, folder_sums
from dbrx_fn.files.file_lock import folder_claimed, locked
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, parse_json, read_bounded, shown
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runs.checkpoint import leaves, not_finite_leaf, read_run_checkpoint, write_run_checkpoint
from dbrx_fn.runs.plan import Plan, difference
from dbrx_fn.training.step import State

_MADE_OF = "made_of"
_STEP = re.compile(r"step-([0-9]{8,})")


class RunFolder:
    """Paths and files of one run; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.json"
        self.tokenizer = path / "tokenizer"
        self.data = path / "data"
        self.train_data = self.data / "train"
        self.held_out_data = self.data / "held_out"
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.model = path / "model"

    @property
    def started(self) -> bool:
        """Whether a run has been set up here."""
        return self.settings_file.exists()

    # Set up, and held

    @contextlib.contextmanager
    def set_up(self) -> Iterator["RunFolder"]:
        """Yields a hidden folder to set the run up in, which becomes this one when the block ends well.

        What a killed process left of another set-up is removed. If the block raises, nothing stays.

        Raises:
            InputError: if this folder exists, can't be written or is being set up by another process, or the hidden
                one holds what no run wrote.
        """
        hidden = RunFolder(self.path.parent / f".{self.path.name}-set-up")
        taken = f"{self.path} is being set up by another process: wait until it ends, or name another --out."
        made = [folder for folder in self.path.parents if not folder.exists()]
        with folder_claimed(hidden.path, taken, self.path):
            hidden._clear()
            # An empty folder is as good as none.
            with contextlib.suppress(OSError):
                self.path.rmdir()
            try:
                with new_folder(self.path, beside=hidden.path):
                    yield hidden
            except BaseException:
                with contextlib.suppress(OSError, InputError):
                    hidden._clear()
                raise
        for folder in made:
            flush(folder.parent)

    def _clear(self) -> None:
        """Empties a folder of what a killed process left of a set-up."""
        own = {self.tokenizer, self.data, self.settings_file}
        left = list(self.path.iterdir())
        foreign = [entry for entry in left if entry not in own and not is_leftover(entry)]
        if foreign:
            raise InputError(f"{foreign[0]} is in the way and no run wrote it: move it elsewhere, and start again.")
        for entry in left:
            _remove(entry)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here; the lock goes with the process, however it ends.

        Raises:
            InputError: if another one does already, there is no run, or a part of it is a link, through which a
                folder that a stranger made would have others written to.
        """
        if not self.started:
            raise InputError(f"{self.path} holds no run to resume (there is no run.json): start one without --resume.")
        taken = f"{self.path} is being trained by another process: wait until it ends."
        with locked(self.path, taken):
            parts = (self.settings_file, self.tokenizer, self.data, self.checkpoints, self.metrics_file, self.model)
            links = [part for part in parts if part.is_symlink()]
            if links:
                raise InputError(
                    f"{links[0]} is a link, which no run writes through: put what it leads to in its place."
                )
            yield

    def clean(self) -> None:
        """Removes what killed processes left half-written in this folder."""
        for folder in (self.path, self.checkpoints):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if is_leftover(entry):
                    _remove(entry)

    # Settings

    def begin(self, plan: Plan, data: Mapping[str, str]) -> None:
        """Notes what the run was asked for and made of; from then on it has started.

        Args:
            plan: the run's.
            data: fingerprints of its token files.
        """
        self._write_settings(
            {**plan.as_dict(), _MADE_OF: {"tokenizer": folder_sums(self.tokenizer), "data": dict(data)}}
        )

    def read_plan(self) -> Plan:
        """What the run was asked for.

        Raises:
            InputError: if the file is damaged.
        """
        settings = self._read_settings()
        settings.pop(_MADE_OF, None)
        return Plan.from_dict(settings, self.settings_file)

    def change_steps(self, steps: int) -> None:
        """Notes another number of steps."""
        settings = self._read_settings()
        settings["recipe"]["steps"] = steps
        self._write_settings(settings)

    def check_made_of(self, data: Mapping[str, str]) -> None:
        """Makes sure that the run has the tokenizer and the data that it began with; earlier versions didn't note them.

        Args:
            data: fingerprints of the token files that are there.

        Raises:
            InputError: naming what is another.
        """
        settings = self._read_settings()
        if _MADE_OF not in settings:
            return
        noted, sums = settings[_MADE_OF], {}
        for name in TOKENIZER_FILES:
            file = self.tokenizer / name
            try:
                if os.path.lexists(file):
                    sums[name] = file_sum(file, LARGEST_VOCABULARY)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{file} can't be read ({getattr(error, 'strerror', None) or error}): put it back as it was, or"
                    " start the run anew elsewhere."
                ) from None
        found = difference({"tokenizer": sums, "data": dict(data)}, noted)
        if found:
            raise InputError(
                f"{self.path} isn't made of what {self.settings_file.name} notes ({found}): put back what was changed,"
                " or start the run anew elsewhere."
            )

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        write_file(self.settings_file, (json.dumps(settings, indent=2) + "\n").encode())

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings = parse_json(read_bounded(self.settings_file), unique=True)
            if not isinstance(settings, dict):
                raise ValueError(f"it holds {shown(settings)} where an object is expected")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.settings_file} can't be read ({reason}): start the run anew elsewhere.") from None
        return settings

    # Checkpoints

    def saved_steps(self) -> list[int]:
        """Steps that there are checkpoints of, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        steps = sorted(int(name[1]) for name in names if name)
        return [step for step in steps if self.checkpoint(step).exists()]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def save(self, state: State, step: int, plan: Plan, data: Mapping[str, str]) -> None:
        """Writes the checkpoint after `step` steps, and then removes all but the last `plan.keep`.

        Args:
            state: after this step.
            step: how many it has made.
            plan: the run's.
            data: fingerprints of its token files.

        Raises:
            InputError: if it can't be written; what was there stays.
            TrainingError: if the state holds NaN or infinity.
        """
        if broken := not_finite_leaf(state):
            raise self.not_finite(f"{broken} holds NaN or infinity after", step)
        with new_folder(self.checkpoint(step)) as folder:
            write_run_checkpoint(
                folder,
                state,
                step,
                config=plan.config,
                steps=plan.recipe.steps,
                run=_decides(plan, data),
                tokenizer=self.tokenizer,
            )
        for old in self.saved_steps()[: -plan.keep]:
            _remove(self.checkpoint(old))

    def load(self, fresh: State, plan: Plan, data: Mapping[str, str]) -> tuple[State, int, int | None]:
        """The state of the newest whole checkpoint; damaged ones that are newer are put aside, with a warning.

        Args:
            fresh: a state of the same structure.
            plan: the run's.
            data: fingerprints of its token files.

        Returns:
            The state, its step, and how many steps the run was to make when it was saved (`None` if that wasn't
            noted); `fresh`, 0 and `None`, if there is no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints and none is whole.
            InputError: if one is of another run.
        """
        steps, damaged = self.saved_steps(), []
        for step in reversed(steps):
            folder = self.checkpoint(step)
            try:
                state, noted = read_run_checkpoint(folder, step, fresh, config=plan.config, run=_decides(plan, data))
            except CheckpointError as error:
                damaged.append((folder, str(error)))
                continue
            for other, reason in damaged:
                self._put_aside(other, reason, step)
            if not noted.files:
                said = f"{folder} has no checksums, as an earlier version wrote it: damage isn't seen."
                warnings.warn(said, stacklevel=2)
            return state, step, noted.steps
        if damaged:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged[:3])
            raise CheckpointError(
                f"{self.checkpoints} holds no whole checkpoint ({reasons}): put one there that is, or move the folder"
                " elsewhere, and --resume begins with the first step."
            )
        return fresh, 0, None

    def not_finite(self, what: str, step: int) -> TrainingError:
        """The error of a run whose numbers left the range at `step`; `what` is the sentence up to the step."""
        saved = self.saved_steps()
        after = (
            f"the last good checkpoint is {self.checkpoint(saved[-1])}: start from it with --model and a lower"
            if saved
            else "no checkpoint was saved yet: start anew with sound weights, or a lower"
        )
        return TrainingError(f"{what} step {step}, so training stops; {after} --learning-rate.")

    def how_to_go_on(self) -> str:
        """What an interrupted command keeps here, and what going on with it does, as a clause."""
        if not self.started:
            return "nothing is kept"
        saved = self.saved_steps()
        where = f"goes on after step {saved[-1]:,}" if saved else "begins with the first step, as none was saved"
        return f"--out {shlex.quote(str(self.path))} --resume {where}"

    def _put_aside(self, folder: Path, reason: str, step: int) -> None:
        aside = folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(4)}")
        folder.rename(aside)
        warnings.warn(
            f"The checkpoint {folder} is damaged ({reason}) and is now called {aside.name}: the run goes on after step"
            f" {step:,} instead.",
            stacklevel=3,
        )

    # The model

    def write_model(self, params: Params, config: Config) -> None:
        """Writes the last step's model, in place of an earlier one; the same one is left as it is.

        Raises:
            InputError: if it can't be written, or files would be lost that no run wrote.
        """
        if self._holds(params):
            return
        self.check_model()
        replaced = os.listdir(self.model) if self.model.is_dir() else ()
        with new_folder(self.model, replacing=replaced) as folder:
            write_checkpoint(folder, params, config, tokenizer_files=self.tokenizer)

    def check_model(self) -> None:
        """Raises `InputError` if something would be lost that no run wrote, if `model/` were replaced."""
        found = sorted(self.model.iterdir()) if self.model.is_dir() else [self.model]
        for entry in found if os.path.lexists(self.model) else ():
            own = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in CHECKPOINT_FILES)
            if not own or not entry.is_file():
                raise InputError(f"{entry} is in the way of the run's model and no run wrote it: move it elsewhere.")

    def _holds(self, params: Params) -> bool:
        """Whether `model/` is made of these parameters."""
        try:
            found = dict(leaves(load(self.model)[0]))
            wanted = dict(leaves(params))
            return found.keys() == wanted.keys() and all(
                found[path].dtype == array.dtype and bool(mx.array_equal(found[path], array))
                for path, array in wanted.items()
            )
        except (DbrxError, RuntimeError):
            return False


def _decides(plan: Plan, data: Mapping[str, str]) -> dict[str, Any]:
    return {**plan.decides(), "data": dict(data)}


def _remove(path: Path) -> None:
    """Removes a file or link; a folder under a hidden name first, so that half of it is never taken for the whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if is_leftover(path) else hidden_beside(path)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
