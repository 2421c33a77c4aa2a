"""Writes a checkpoint's safetensors shards matrix by matrix, with one matrix in memory at a time.

All sizes and offsets are known in advance. So the header is written first, and then each matrix at its place, in any
order. The safetensors library can't do that, since it takes all tensors of a file at once. Format:
https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import mlx.core as mx

from dbrx_fn.checkpoints.layouts import Source
from dbrx_fn.checkpoints.raw import Raw, in_order
from dbrx_fn.checkpoints.safetensors_file import DTYPES
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Dtype

SHARD_BYTES = 5 * 10**9
"""The largest size of a shard, as the Hugging Face Hub advises. Only a single linear may be larger."""

Matrices = Callable[[str], Iterator[Mapping[str, Raw]]]
"""Yields a linear's matrices (one for each expert, or the only one), by their leaves' paths."""

_AT_ONCE = 2**20
_CODES = {getattr(mx, dtype): code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file: its name, its linears in order, its header, and where each tensor starts, in bytes."""

    file: str
    linears: tuple[str, ...]
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


def plan_shards(
    table: Mapping[str, Source], dtype: Dtype, *, shard_bytes: int, metadata: Mapping[str, str]
) -> tuple[Shard, ...]:
    """Distributes tensors over files. All tensors of a linear stay together, including its experts and scales.

    Args:
        table: the tensors to write for each leaf (`layouts.sources`, for a layout that can be written).
        dtype: dtype of the floats.
        shard_bytes: the largest size of a file's tensors. Only a single linear may be larger.
        metadata: texts for every header.
    """
    linears: dict[str, list[str]] = {}
    for path in table:
        linears.setdefault(path.rpartition(".")[0], []).append(path)
    groups: list[list[str]] = [[]]
    held = 0
    for linear, paths in linears.items():
        size = sum(table[path].leaf.nbytes(dtype) for path in paths)
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(linear)
        held += size
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return tuple(
        _shard(name, group, [path for linear in group for path in linears[linear]], table, dtype, metadata)
        for name, group in zip(names, groups, strict=True)
    )


def write_shard(
    out: BinaryIO, shard: Shard, table: Mapping[str, Source], matrices: Matrices, written: Callable[[str, Raw], None]
) -> None:
    """Writes one file, and waits until it is on the disk.

    Args:
        out: a new file.
        shard: the file's plan.
        table: as in `plan_shards`.
        matrices: makes a linear's matrices.
        written: called with each matrix's tensor and bits as written, in order within a tensor.

    Raises:
        CheckpointError: if a matrix can't be read or computed.
        OSError: if the file can't be written.
    """
    out.write(shard.header)
    for linear in shard.linears:
        # A function of its own, which frees a linear's memory before the next is read.
        _write_linear(out, shard, table, matrices(linear), written)
    out.flush()
    os.fsync(out.fileno())


def index_content(shards: Sequence[Shard]) -> bytes | None:
    """The content of the index, which gives each tensor's shard. `None` for a single shard."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.file for shard in shards for name in shard.starts}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


class ShardSum:
    """A shard's SHA-256 sum, made of its header and its tensors' sums, since tensors are written in turns."""

    def __init__(self, shard: Shard) -> None:
        self._header = shard.header
        self._tensors = {name: hashlib.sha256() for name in shard.starts}

    def add(self, name: str, matrix: Raw | bytes) -> None:
        """Adds more of a tensor, in the order of its bytes."""
        self._tensors[name].update(matrix if isinstance(matrix, bytes) else matrix.data.cast("B"))

    def hexdigest(self) -> str:
        """The sum in hexadecimal, after everything was added."""
        parts = [self._header, *(tensor.digest() for tensor in self._tensors.values())]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def sum_in(file: BinaryIO, shard: Shard) -> str | None:
    """The `ShardSum` of a file's content, or `None` if its size or header isn't the shard's."""
    if os.fstat(file.fileno()).st_size != shard.nbytes or file.read(len(shard.header)) != shard.header:
        return None
    found, ends = ShardSum(shard), [*shard.starts.values(), shard.nbytes][1:]
    for name, end in zip(shard.starts, ends, strict=True):
        while left := end - file.tell():
            content = file.read(min(left, _AT_ONCE))
            if not content:
                return None
            found.add(name, content)
    return found.hexdigest()


def _write_linear(
    out: BinaryIO,
    shard: Shard,
    table: Mapping[str, Source],
    made: Iterator[Mapping[str, Raw]],
    written: Callable[[str, Raw], None],
) -> None:
    for expert, leaves in enumerate(_computed(made)):
        for path, matrix in leaves.items():
            stored, before = table[path].place(expert)
            out.seek(shard.starts[stored.name] + before * matrix.nbytes)
            bits = in_order(matrix.T if stored.rule.transposed else matrix)
            out.write(bits.data)
            written(stored.name, bits)


def _computed(made: Iterator[Mapping[str, Raw]]) -> Iterator[Mapping[str, Raw]]:
    """Passes on a generator's matrices, and turns MLX's errors in it into `CheckpointError`."""
    while True:
        try:
            leaves = next(made)
        except StopIteration:
            return
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"The parameters can't be read or computed ({error}): check the files that they come from, and the"
                " memory."
            ) from None
        yield leaves


def _shard(
    file: str,
    linears: Sequence[str],
    paths: Sequence[str],
    table: Mapping[str, Source],
    dtype: Dtype,
    metadata: Mapping[str, str],
) -> Shard:
    # Wide entries come first, so each tensor starts at a multiple of its entries' size.
    ordered = sorted(paths, key=lambda path: -table[path].leaf.stored_as(dtype).size)
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for path in ordered:
        item = table[path].leaf.stored_as(dtype)
        for stored in table[path].stored:
            starts[stored.name], start = end, end
            end += math.prod(stored.shape) * item.size
            fields[stored.name] = {"dtype": _CODES[item], "shape": list(stored.shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(
        file, tuple(linears), header, {name: len(header) + start for name, start in starts.items()}, len(header) + end
    )
