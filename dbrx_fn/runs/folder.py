"""A training run's folder: settings, data, checkpoints and metrics. Its files appear whole, or not at all.

    run.json                          the run's settings
    tokenizer/                        the tokenizer that made the tokens
    data/train/, data/held_out/       the tokens (dbrx_fn.data.token_file)
    checkpoints/step-00000500/        a plain checkpoint, and the training state (dbrx_fn.runs.checkpoint)
    metrics.jsonl                     a line every few steps (dbrx_fn.runs.metrics_file)
    model/                            the last step's model, or
    adapters/                         the last step's adapters (dbrx_fn.checkpoints.adapter_files)

A run is set up in a hidden folder beside it, `.NAME-set-up`. A process that sets up or trains a run holds a lock on the
folder.
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

from dbrx_fn.checkpoints.adapter_files import ADAPTER_FILES, write_adapters
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import CHECKPOINT_FILES, TOKENIZER_FILES, write_checkpoint
from dbrx_fn.errors import CheckpointError, DbrxError, InputError, TrainingError
from dbrx_fn.files.atomic import flush, hidden_beside, is_leftover, new_folder, write_file
from dbrx_fn.files.checksums import file_sum, folder_sums
from dbrx_fn.files.file_lock import folder_claimed, locked
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, parse_json, read_bounded, shown
from dbrx_fn.model.adapters import Adapters
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runs.checkpoint import leaves, not_finite_leaf, read_run_checkpoint, write_run_checkpoint
from dbrx_fn.runs.plan import Plan, difference
from dbrx_fn.runtime.group import group
from dbrx_fn.training.step import State

_MADE_OF = "made_of"
_STEP = re.compile(r"step-([0-9]{8,})")


class RunFolder:
    """The paths and files of one run, as in the module's docstring."""

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
        self.adapters = path / "adapters"

    @property
    def started(self) -> bool:
        """Whether the folder holds a run that has been set up."""
        return self.settings_file.exists()

    # Set up, and held

    @contextlib.contextmanager
    def set_up(self) -> Iterator["RunFolder"]:
        """Yields a hidden folder to set up the run in. It becomes this folder when the block ends without an error.

        Leftovers of a killed set-up are removed first. If the block raises, nothing is left.

        Raises:
            InputError: if this folder exists, can't be written or is being set up by another process, or if the hidden
                one holds files that no run wrote.
        """
        hidden = RunFolder(self.path.parent / f".{self.path.name}-set-up")
        taken = f"{self.path} is being set up by another process: wait until it ends, or name another --out."
        made = [folder for folder in self.path.parents if not folder.exists()]
        with folder_claimed(hidden.path, taken, self.path):
            hidden._clear()
            # An empty folder counts as missing.
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
        """Removes a killed set-up's files from a folder."""
        own = {self.tokenizer, self.data, self.settings_file}
        left = list(self.path.iterdir())
        foreign = [entry for entry in left if entry not in own and not is_leftover(entry)]
        if foreign:
            raise InputError(f"{foreign[0]} is in the way and no run wrote it: move it elsewhere, and start again.")
        for entry in left:
            _remove(entry)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here. The lock ends with the process, at the latest.

        Raises:
            InputError: if another process holds the lock, if there is no run, or if a part of the run is a link.
                Through a link, a stranger's folder could make the run overwrite other files.
        """
        if not self.started:
            raise InputError(f"{self.path} holds no run to resume (there is no run.json): start one without --resume.")
        taken = f"{self.path} is being trained by another process: wait until it ends."
        with locked(self.path, taken):
            parts = (self.settings_file, self.tokenizer, self.data, self.checkpoints, self.metrics_file)
            links = [part for part in (*parts, self.model, self.adapters) if part.is_symlink()]
            if links:
                raise InputError(
                    f"{links[0]} is a link, which no run writes through: put what it leads to in its place."
                )
            yield

    def clean(self) -> None:
        """Removes incomplete files of killed processes from this folder."""
        for folder in (self.path, self.checkpoints):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if is_leftover(entry):
                    _remove(entry)

    # Settings

    def begin(self, plan: Plan, data: Mapping[str, str], model: Mapping[str, Any]) -> None:
        """Writes the run's settings and fingerprints. From then on the run has started.

        Args:
            plan: the run's.
            data: fingerprints of its token files.
            model: sums of the files of the model that it trains a part of; empty for a run that trains all of it.
        """
        made_of = {"tokenizer": folder_sums(self.tokenizer), "data": dict(data)}
        self._write_settings({**plan.as_dict(), _MADE_OF: made_of | ({"model": dict(model)} if model else {})})

    def read_plan(self) -> Plan:
        """Reads the run's settings.

        Raises:
            InputError: if the file is damaged.
        """
        settings = self._read_settings()
        settings.pop(_MADE_OF, None)
        return Plan.from_dict(settings, self.settings_file)

    def change_steps(self, steps: int) -> None:
        """Writes another number of steps into the run's settings."""
        settings = self._read_settings()
        settings["recipe"]["steps"] = steps
        self._write_settings(settings)

    def check_made_of(self, data: Mapping[str, str], model: Mapping[str, Any]) -> None:
        """Checks that the run still has its original tokenizer, data and model. (Earlier versions didn't note them.)

        Args:
            data: fingerprints of the present token files.
            model: sums, as in `begin`.

        Raises:
            InputError: if one differs. It names the difference.
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
                    " start the run again elsewhere."
                ) from None
        present = {"tokenizer": sums, "data": dict(data)} | ({"model": dict(model)} if model else {})
        found = difference(present, noted)
        if found:
            raise InputError(
                f"{self.path} isn't made of what {self.settings_file.name} notes ({found}): put back what was changed,"
                " or start the run again elsewhere."
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
            raise InputError(f"{self.settings_file} can't be read ({reason}): start the run again elsewhere.") from None
        return settings

    # Checkpoints

    def saved_steps(self) -> list[int]:
        """The steps with a checkpoint, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        steps = sorted(int(name[1]) for name in names if name)
        return [step for step in steps if self.checkpoint(step).exists()]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:08d}"

    def save(self, state: State, step: int, plan: Plan, data: Mapping[str, str]) -> None:
        """Writes the checkpoint after `step` steps, and then removes all but the last `plan.keep` checkpoints.

        Args:
            state: the state after this step.
            step: the number of steps done.
            plan: the run's.
            data: fingerprints of its token files.

        Raises:
            InputError: if it can't be written. Existing checkpoints are kept.
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
                is_part=plan.trains_part,
            )
        for old in self.saved_steps()[: -plan.keep]:
            _remove(self.checkpoint(old))

    def load(self, fresh: State, plan: Plan, data: Mapping[str, str]) -> tuple[State, int, int | None]:
        """Loads the newest undamaged checkpoint. Newer, damaged ones are renamed, with a warning.

        Args:
            fresh: a state of the same structure.
            plan: the run's.
            data: fingerprints of its token files.

        Returns:
            The state, its step, and the run's planned number of steps when it was saved (`None` if not noted). Without
            a checkpoint: `fresh`, 0 and `None`.

        Raises:
            CheckpointError: if there are checkpoints, and all are damaged.
            InputError: if one belongs to another run.
        """
        steps, damaged = self.saved_steps(), []
        for step in reversed(steps):
            folder = self.checkpoint(step)
            try:
                state, noted = read_run_checkpoint(
                    folder,
                    step,
                    fresh,
                    config=plan.config,
                    run=_decides(plan, data),
                    is_part=plan.trains_part,
                )
            except CheckpointError as error:
                damaged.append((folder, str(error)))
                continue
            for other, reason in damaged if group().leads else ():
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
        """The error of a run whose numbers became NaN or infinite at `step`. `what` is the sentence up to the step."""
        saved = self.saved_steps()
        after = (
            f"the last good checkpoint is {self.checkpoint(saved[-1])}: start from it with --model and a lower"
            if saved
            else "no checkpoint was saved yet: start again with sound weights, or a lower"
        )
        return TrainingError(f"{what} step {step}, so training stops; {after} --learning-rate.")

    def how_to_go_on(self) -> str:
        """How to continue an interrupted command, and from which step, as a clause."""
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
        """Writes the last step's model. It replaces an earlier one; an equal one is left unchanged.

        Raises:
            InputError: if it can't be written, or files that no run wrote would be lost.
        """
        if self._holds(params):
            return
        self.check_model()
        with self._replaced(self.model) as folder:
            write_checkpoint(folder, params, config, tokenizer_files=self.tokenizer)

    def write_adapters(self, trained: Params, config: Config, adapters: Adapters) -> None:
        """Writes the last step's adapters. They replace earlier ones. Errors are those of `write_model`."""
        self.check_model()
        with self._replaced(self.adapters) as folder:
            write_adapters(folder, trained, config, adapters)

    def check_model(self) -> None:
        """Raises `InputError` if replacing `model/` or `adapters/` would lose files that no run wrote."""
        for written, patterns in ((self.model, CHECKPOINT_FILES), (self.adapters, ADAPTER_FILES)):
            found = sorted(written.iterdir()) if written.is_dir() else [written]
            for entry in found if os.path.lexists(written) else ():
                own = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
                if not own or not entry.is_file():
                    what = f"{entry} is in the way of the run's {written.name} and no run wrote it"
                    raise InputError(f"{what}: move it elsewhere.")

    @contextlib.contextmanager
    def _replaced(self, written: Path) -> Iterator[Path]:
        """Yields a folder whose files replace those in `written` when the block ends without an error."""
        replaced = os.listdir(written) if written.is_dir() else ()
        with new_folder(written, replacing=replaced) as folder:
            yield folder

    def _holds(self, params: Params) -> bool:
        """Whether `model/` holds these parameters."""
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
    """Removes a file, link or folder. A folder gets a hidden name first, so a half-removed one isn't taken as whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path if is_leftover(path) else hidden_beside(path)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
