"""What tensors lie in a checkpoint's files: names, shapes and dtypes from the headers, and no tensor is read.

A header is checked here in full, and more strictly than by those who read the tensors: safetensors' own reader takes
the last of two tensors of one name, and MLX's reads shapes into 32 bits, lets tensors overlap, and chooses a file's
format by the end of its name. Format: https://github.com/huggingface/safetensors#format.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbrx_fn.errors import CheckpointError
from dbrx_fn.files.json_file import LARGEST, POINTER, is_plain_name, parse_json, read_bounded, refuse_pointer, shown
from dbrx_fn.model.params import listed

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U32": "uint32", "U8": "uint8"}
"""MLX's names of safetensors' dtypes, of those that a model's tensors can have."""

_BITS = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "C64 F64 I64 U64",
    }.items()
    for dtype in dtypes.split()
}
_LONGEST_NAME = 256
_MOST_AXES = 8
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Tensor:
    """What a file's header says of one tensor; `dtype` is MLX's name, or the file's for what isn't used here.

    `start`: where its bytes begin in the file, if they are what MLX would read.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int | None = None


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Name, file, shape and dtype of every tensor in a folder's safetensors files, without reading any.

    Raises:
        CheckpointError: if there are no weights, a shard is missing or damaged, or a tensor is there twice.
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
    """The safetensors files to read, and what the index, if there is one, says of each tensor's file."""
    index = folder / INDEX
    # A link to nothing, as an interrupted download leaves, would otherwise be no index.
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
    """Whether a file's name begins with a dot, as of those that macOS puts beside others on foreign disks."""
    return file.name.startswith(".")


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} holds no safetensors file but {listed(pickles, most=3)}, and a pickle can run code when it is"
            " read: safetensors and GGUF files are, and nothing else is read; if you trust its source, load it with"
            " transformers and write it with save_pretrained, which makes safetensors."
        )
    return CheckpointError(
        f"{folder} holds no safetensors file: a checkpoint's weights lie in model.safetensors or in shards"
        f" with a {INDEX}, and nothing else is read."
    )


def _weight_map(index: object) -> dict[str, str]:
    """The file of each tensor. Raises ValueError if that isn't what the index says."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("weight_map must give a file for each tensor")
    for name, file in weight_map.items():
        if not is_plain_name(name, _LONGEST_NAME):
            raise ValueError(f"weight_map has {shown(name)} where a tensor's name is expected")
        if not is_plain_name(file, 255) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"weight_map must give a plain file name ending in .safetensors, and for {name} gives {shown(file)}"
            )
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor in one safetensors file.

    Raises:
        CheckpointError: if it is no such file, or a damaged one.
    """
    size = 0
    try:
        if not file.is_file():
            raise ValueError("it is no regular file" if file.exists() else "it is a link to nothing")
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            if start == POINTER[:8]:
                refuse_pointer(file, start + opened.read(len(POINTER)))
            if len(start) < 8 or 8 + length > size:
                raise ValueError("its header is cut short")
            if length > LARGEST:
                raise ValueError(f"its header has {length} bytes, more than the {LARGEST} that are read")
            content = opened.read(length)
        if not content.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        return _tensors(file, parse_json(content, unique=True), 8 + length, size)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged or cut short at {size} bytes ({error}): copy it again from where it came."
        ) from None


def _tensors(file: Path, header: object, data_start: int, size: int) -> dict[str, Tensor]:
    """The tensors of a header, which must fill the data that follows it exactly. Raises ValueError if it is wrong."""
    assert isinstance(header, dict)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not is_plain_name(name, _LONGEST_NAME):
            raise ValueError(f"{shown(name)} can't be a tensor's name")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is {shown(entry)} where its dtype, shape and data_offsets are expected")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{name} has the dtype {shown(dtype)}, which safetensors has not")
        if not _is_sizes(shape, 2**31) or len(shape) > _MOST_AXES:
            raise ValueError(f"{name} has the shape {shown(shape)}")
        if not _is_sizes(offsets, 2**63) or len(offsets) != 2:
            raise ValueError(f"{name} has the data_offsets {shown(offsets)}")
        if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name} has the data_offsets {offsets}, which don't fit {dtype} {shape}")
        spans.append((offsets[0], offsets[1], name))
        tensors[name] = Tensor(file, tuple(shape), DTYPES.get(dtype, dtype), data_start + offsets[0])
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"{name} starts at byte {start} of the data where {end} is expected")
        end = stop
    if end != size - data_start:
        raise ValueError(f"its tensors take {end} bytes where {size - data_start} follow the header")
    return tensors


def _is_sizes(value: object, limit: int) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < limit for size in value)
