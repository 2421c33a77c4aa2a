"""A run's checkpoint: the model as a plain checkpoint, and in `training/` everything else that resuming needs.

    config.json, model.safetensors …  the float32 master weights, which `generate` and mlx-lm load
    tokenizer.json …                  the run's tokenizer
    training/state.safetensors        the optimizer's state and the key
    training/state.json               a note: the step, the settings that determined it, all other files' checksums

A run that trains only a part of a model has no plain checkpoint here. Its master weights are in
`training/state.safetensors` too, and the others stay where the run was started from.

Before a tensor is loaded, all files are compared with the note, and the note with the run.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.safetensors_file import read_header
from dbrx_fn.checkpoints.saver import copy_tokenizer, write_checkpoint, write_tensors
from dbrx_fn.errors import CheckpointError, DbrxError, InputError, lacks_memory
from dbrx_fn.files.checksums import SEAL, disagreement, file_sum, folder_sums, read_note, sealed
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, shown
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import own_part
from dbrx_fn.model.tree import Params
from dbrx_fn.runs.plan import difference
from dbrx_fn.training.shared_state import state_cut
from dbrx_fn.training.step import State

_TENSORS, _NOTE = "training/state.safetensors", "training/state.json"
_WEIGHTS = ".safetensors"
_OLD_KEYS = ("step", "tensors")
_KEYS = (*_OLD_KEYS, "steps", "run", "files", SEAL)
"""The keys of `state.json`. Earlier versions have fewer."""

_STORED = {mx.float32: "float32", mx.uint32: "uint32", mx.uint64: "U64"}
"""`Tensor.dtype` of a state's arrays."""


@dataclass(frozen=True)
class Noted:
    """A checkpoint's note.

    `steps`: the run's planned number of steps when it was written; `None` in an earlier version's note.
    `files`: the checksums of its files by path; empty in an earlier version's note.
    """

    steps: int | None
    files: Mapping[str, Any]


def write_run_checkpoint(
    folder: Path,
    state: State,
    step: int,
    *,
    config: Config,
    steps: int,
    run: Mapping[str, Any],
    tokenizer: Path,
    is_part: bool,
) -> None:
    """Writes a checkpoint's files into a folder that nobody reads yet.

    Args:
        folder: to write into.
        state: the state after `step` steps.
        step: the number of steps done.
        config: the model's.
        steps: the run's planned number of steps.
        run: the settings that determine the results, as values of JSON. `read_run_checkpoint` compares them.
        tokenizer: the folder whose files are copied.
        is_part: whether the state has only a part of the model.

    Raises:
        CheckpointError: if the state can't be computed.
        OSError: if a file can't be written.
    """
    if is_part:
        copy_tokenizer(tokenizer, folder)
    else:
        write_checkpoint(folder, state["params"], config, tokenizer_files=tokenizer)
    (folder / "training").mkdir()
    # Paths hold dots of their own, so tensors are numbered in the tree's order.
    rest = leaves(_resumable(state, is_part))
    write_tensors(folder / _TENSORS, {f"{n:06d}": array for n, (_, array) in enumerate(rest)}, {})
    note = {"step": step, "steps": steps, "run": run, "tensors": [path for path, _ in rest]}
    (folder / _NOTE).write_text(json.dumps(sealed({**note, "files": folder_sums(folder)})))


def read_run_checkpoint(
    folder: Path, step: int, fresh: State, *, config: Config, run: Mapping[str, Any], is_part: bool
) -> tuple[State, Noted]:
    """Reads a checkpoint's state and note.

    Args:
        folder: the checkpoint's.
        step: the step in its name.
        fresh: a state of the same structure.
        config: the model's. If processes share it, the state is this one's part.
        run: the settings that determine the run's results.
        is_part: whether the state has only a part of the model.

    Raises:
        CheckpointError: if the checkpoint is damaged. The text is only the reason.
        InputError: if it is undamaged, but belongs to another run.
    """
    try:
        note = read_note(folder / _NOTE, _KEYS, _OLD_KEYS)
        if note["step"] != step:
            raise ValueError(f"it is of step {shown(note['step'])}")
        noted = Noted(note.get("steps"), note.get("files", {}))
        if SEAL in note:
            if type(noted.steps) is not int or not isinstance(noted.files, dict):
                raise ValueError(f"its {_NOTE} says steps {shown(noted.steps)} and files {shown(noted.files)}")
            if found := difference(run, note["run"]):
                raise _other_run(folder, found)
        texts = {name: found for name, found in noted.files.items() if not name.endswith(_WEIGHTS)}
        _compare(folder, texts)
        # Sizes come from the headers, since those in the note may be false.
        params = None if is_part else _read_params(folder, config)
        rest = _outlined(folder, _resumable(fresh, is_part), config, note["tensors"])
        _compare(folder, {name: noted.files[name] for name in noted.files.keys() - texts.keys()})
        arrays = cast(dict[str, mx.array], mx.load(str(folder / _TENSORS)))
        found_rest = [_own(arrays.pop(f"{n:06d}"), path, config) for n, path in enumerate(rest)]
        mx.eval(params, found_rest)
    except InputError:
        raise
    except (DbrxError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            raise
        raise CheckpointError(str(error).rstrip(".")) from None
    state = _like(_resumable(fresh, is_part), iter(found_rest))
    if params is not None:
        state["params"] = params
    if broken := not_finite_leaf(state):
        raise CheckpointError(f"{broken} holds NaN or infinity")
    return state, noted


def not_finite_leaf(state: State) -> str | None:
    """The path of a leaf that holds NaN or infinity, or `None`."""
    return next((path for path, array in leaves(state) if not mx.isfinite(array).all().item()), None)


def leaves(tree: State | Params) -> list[tuple[str, mx.array]]:
    """A tree's arrays by path."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def _read_params(folder: Path, config: Config) -> Params:
    """The lazy parameters of the plain checkpoint."""
    params, found = load(folder, dtype="float32", lazy=True, shard=config.shard)
    if replace(found, dtype=config.dtype) != config:
        raise _other_run(folder, "its config.json is of another model")
    return params


def _outlined(folder: Path, fresh: State, config: Config, names: object) -> list[str]:
    """The paths of the state's arrays, after a check of their shapes and dtypes against `fresh`."""
    expected = leaves(fresh)
    if names != [path for path, _ in expected]:
        raise _other_run(folder, "its optimizer has other tensors")
    header = read_header(folder / _TENSORS)
    outline = {f"{n:06d}": (_whole_shape(*one, config), _STORED[one[1].dtype]) for n, one in enumerate(expected)}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in header.items()} != outline:
        raise ValueError(f"{_TENSORS} doesn't hold the tensors that its note names")
    return [path for path, _ in expected]


def _whole_shape(path: str, array: mx.array, config: Config) -> tuple[int, ...]:
    cut = state_cut(path, config)
    return array.shape if cut is None else cut.whole_shape(array.shape, config.shard)


def _own(stored: mx.array, path: str, config: Config) -> mx.array:
    """This process's part of a leaf. The whole one is read first, and freed."""
    cut = state_cut(path, config)
    if cut is None or config.shard.is_whole:
        return stored
    own = mx.contiguous(own_part(stored, cut, config.shard))
    mx.eval(own)
    return own


def _compare(folder: Path, files: Mapping[str, Any]) -> None:
    """Raises ValueError if a file differs from its note."""
    for name, noted in sorted(files.items()):
        most = None if name.endswith(_WEIGHTS) else LARGEST_VOCABULARY
        try:
            # A stranger's note may name files outside of the folder.
            if name != Path(name).as_posix() or name.startswith("/") or ".." in name.split("/"):
                raise ValueError("it isn't one of the checkpoint's")
            reason = disagreement(file_sum(folder / name, most), noted)
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if reason:
            raise ValueError(f"{shown(name)}: {reason}")


def _other_run(folder: Path, what: str) -> InputError:
    return InputError(
        f"The checkpoint {folder} belongs to another run, or this one was changed ({what}): put back what was changed,"
        " or move the checkpoint elsewhere."
    )


def _resumable(state: State, is_part: bool) -> State:
    """What `training/state.safetensors` holds."""
    return {name: part for name, part in state.items() if is_part or name != "params"}


def _like(tree: Any, arrays: Iterator[mx.array]) -> Any:
    """`tree` with its arrays replaced, in `tree_flatten`'s order. `tree_unflatten` would split paths at their dots."""
    if isinstance(tree, dict):
        return {name: _like(part, arrays) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_like(part, arrays) for part in tree]
    return next(arrays)
