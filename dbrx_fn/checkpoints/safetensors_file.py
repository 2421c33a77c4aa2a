"""The tensors in a checkpoint's safetensors files: names, shapes and dtypes, from headers only."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbrx_fn.errors import CheckpointError
from dbrx_fn.files.json_file import is_plain_name, parse_json, read_bounded, shown
from dbrx_fn.files.safetensors_header import LONGEST_NAME, checked_header
from dbrx_fn.model.params import listed

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U32": "uint32", "U8": "uint8"}
"""MLX's names of the safetensors dtypes that a model's tensors can have."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file's header. `dtype` is MLX's name, or the file's for a dtype that isn't used here.

    `start`: the offset of its bytes in the file, if MLX would read the same bytes.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int | None = None


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Name, file, shape and dtype of every tensor in a folder's safetensors files. Only headers are read.

    Raises:
        CheckpointError: if there are no weights, if a shard is missing or damaged, or if a tensor occurs twice.
    """
    files, indexed = _files(folder)
    tensors: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for file in files:
        for name, tensor in read_header(file).items():
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
    """The safetensors files to read, and each tensor's file by the index, if there is one."""
    index = folder / INDEX
    # A broken link, which an interrupted download leaves, counts as an index.
    if not os.path.lexists(index):
        files = sorted(file for file in folder.glob("*.safetensors") if not is_hidden(file))
        if not files:
            raise _no_weights(folder)
        return files, {}
    try:
        weight_map = _weight_map(parse_json(read_bounded(index), unique=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error}): fetch it again.") from None
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing)}, which {INDEX} names: fetch the missing shards.")
    return [folder / name for name in names], weight_map


def is_hidden(file: Path) -> bool:
    """Whether a file's name begins with a dot, as do files that macOS puts beside others on foreign disks."""
    return file.name.startswith(".")


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} holds no safetensors file but {listed(pickles, most=3)}, and a pickle can run code when it is"
            " read, so only safetensors and GGUF files are read: if you trust its source, load it with transformers and"
            " write it with save_pretrained, which makes safetensors."
        )
    return CheckpointError(
        f"{folder} holds no safetensors file: give a folder whose weights are in model.safetensors, or in shards with"
        f" a {INDEX}."
    )


def _weight_map(index: object) -> dict[str, str]:
    """The file of each tensor. Raises ValueError if the index is malformed."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("weight_map must give a file for each tensor")
    for name, file in weight_map.items():
        if not is_plain_name(name, LONGEST_NAME):
            raise ValueError(f"weight_map has {shown(name)} where a tensor's name is expected")
        if not is_plain_name(file, 255) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"weight_map must give a plain file name ending in .safetensors, and for {name} gives {shown(file)}"
            )
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor in one safetensors file.

    Raises:
        CheckpointError: if it isn't such a file, or is damaged.
    """
    try:
        size = file.stat().st_size
        header = checked_header(file)
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read ({error.strerror or error}): mend that, or copy it again from where it came."
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged or cut short at {size} bytes ({error}): copy it again from where it came."
        ) from None
    return {
        name: Tensor(file, found.shape, DTYPES.get(found.dtype, found.dtype), found.start)
        for name, found in header.tensors.items()
    }
