"""What tensors lie in a checkpoint's files: names, shapes and dtypes from the headers, and no tensor is read."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbrx_fn.errors import CheckpointError
from dbrx_fn.params import listed

INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U32": "uint32", "U8": "uint8"}


@dataclass(frozen=True)
class Tensor:
    """What a file's header says of one tensor; `dtype` is MLX's name, or the file's for what isn't used here."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Name, file, shape and dtype of every tensor in a folder's safetensors files, without reading any.

    Raises:
        CheckpointError: if there are no weights, a shard is missing or damaged, or a tensor is there twice.
    """
    files, indexed = _files(folder)
    tensors: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for file in files:
        for name, tensor in _header(file).items():
            tensors[name] = tensor
            counts[name] += 1
    twice = [f"{name} is there {count} times" for name, count in counts.items() if count > 1]
    elsewhere = [
        f"{name} is not in {file}, where {INDEX} says it is"
        for name, file in indexed.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if twice or elsewhere:
        raise CheckpointError(
            f"{folder} holds damaged weights: {listed(twice + elsewhere)}; copy the files again from where they came."
        )
    return tensors


def _files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files to read, and what the index, if there is one, says of each tensor's file."""
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} holds no safetensors file: a checkpoint's weights lie in model.safetensors or in shards"
                f" with a {INDEX}, and nothing else is read."
            )
        return files, {}
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("weight_map must give a plain file name for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}): fetch it again.") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing)}, which {INDEX} names: fetch the missing shards.")
    return [folder / name for name in names], weight_map


def _header(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Tensor(file, tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file} is damaged or cut short at {size} bytes ({error}): copy it again from where it came."
        ) from None
