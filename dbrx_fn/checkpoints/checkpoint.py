"""A checkpoint as its headers describe it: config, layout, the tensors of each leaf, and everything that doesn't fit.

All errors are found from the headers, before any tensor is read. Loading, converting and inspecting begin with
`open_checkpoint`. A `LeafReader` then reads the tree's leaves one by one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast, get_args

import mlx.core as mx

from dbrx_fn.checkpoints.config_file import read_config
from dbrx_fn.checkpoints.gguf_file import GgufArrays, gguf_config, gguf_headers, open_gguf
from dbrx_fn.checkpoints.hub import checkpoint_path, refuse_adapters
from dbrx_fn.checkpoints.layouts import (
    Layout,
    Source,
    has_tensor_per_expert,
    holds_quantized,
    is_extra,
    layout_of,
    prefix_of,
    sources,
)
from dbrx_fn.checkpoints.raw import Raw, bits_in_file, mapped, of_raw, raw, read_part
from dbrx_fn.checkpoints.safetensors_file import Tensor, is_hidden, read_headers
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import companions, formats_of, listed, own_part
from dbrx_fn.model.shard import Shard
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.memory import reading_device

FLOATS: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's headers.

    `path`: its folder, or its GGUF file.
    `config`: the model's. Its `dtype` is that of most float tensors.
    `tensors`: all tensors by name, as in the files.
    `sources`: for each leaf's path, the tensors that make it up. Their names lack `prefix`.
    `formats`: the formats of the quantized matrices, by their paths.
    `problems`: every tensor that is missing, unexpected, of a wrong shape, or of an unusable dtype.
    `mixed`: every tensor with another float dtype than the config's.
    """

    path: Path
    config: Config
    layout: Layout
    prefix: str
    tensors: Mapping[str, Tensor]
    sources: Mapping[str, Source]
    formats: Mapping[str, Format]
    problems: tuple[str, ...]
    mixed: tuple[str, ...]

    def nbytes(self, dtype: Dtype | None = None) -> int:
        """Size of the tree in `dtype`, or as stored, in bytes. Quantized integers keep their size."""
        return sum(source.leaf.nbytes(dtype or self.config.dtype) for source in self.sources.values())


def open_checkpoint(path_or_repo: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads its headers.

    Args:
        path_or_repo: a folder, a GGUF file, or a Hugging Face repository as owner/name.
        revision: branch, tag or commit of the repository.

    Raises:
        ConfigError: if `config.json` is missing or isn't DBRX's.
        CheckpointError: if the checkpoint doesn't exist, files are missing or damaged, or the layout is unknown.
    """
    path = checkpoint_path(path_or_repo, revision=revision)
    config = config_of(path)
    tensors = gguf_headers(path) if path.is_file() else read_headers(path)
    prefix = prefix_of(tensors)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    layout = layout_of(named)
    # Tables have names for each layer, and perhaps for each expert. A false config could make millions of them.
    experts = config.ffn.moe_num_experts
    if config.n_layers * (experts if has_tensor_per_expert(layout) else 1) > len(tensors):
        raise CheckpointError(
            f"{path} has {len(tensors)} tensors, too few for the {config.n_layers} layers of {experts} experts that"
            " config.json describes: fetch the config.json that came with these weights."
        )
    dense = sources(config, layout, found=named)
    places = {
        path: (source.names, source.leaf.shape[-1])
        for path, source in dense.items()
        if not source.leaf.is_norm and holds_quantized(layout, path)
    }
    formats, unknown = formats_of(named, places)
    table = sources(config, layout, formats, named)
    # A GGUF file's config counts a quantized tensor, even one without a format here, as float16.
    config = config if layout == "gguf" else replace(config, dtype=_stored_dtype(named, table))
    problems, mixed = _problems(named, table, unknown, layout, config.dtype)
    return Checkpoint(path, config, layout, prefix, tensors, table, formats, tuple(problems), tuple(mixed))


def config_of(path: Path) -> Config:
    """The config of a checkpoint's folder or GGUF file.

    Raises:
        ConfigError: if `config.json` is missing or isn't DBRX's.
        CheckpointError: if the folder holds GGUF files or adapters in place of a checkpoint.
    """
    if path.is_file():
        return gguf_config(path)
    _refuse_gguf_inside(path)
    refuse_adapters(path)
    return read_config(path)


def require_fit(checkpoint: Checkpoint, *, one_dtype: bool) -> None:
    """Raises `CheckpointError` with every tensor that doesn't fit the config; with `one_dtype`, also other dtypes.

    GGUF is an exception to `one_dtype`: its norms and routers are always float32.
    """
    problems = [*checkpoint.problems, *(checkpoint.mixed if one_dtype and checkpoint.layout != "gguf" else ())]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} of the weights don't fit config.json: {listed(problems)}."
        )


class LeafReader:
    """Reads a checkpoint's leaves one by one, and keeps none of them.

    Args:
        checkpoint: from `open_checkpoint`.
        floats: the dtype that the caller turns floats into. GGUF's tensors without a format are unpacked into it.

    Raises:
        CheckpointError: as in `open_gguf`.
    """

    def __init__(self, checkpoint: Checkpoint, floats: Dtype = "float32") -> None:
        self._checkpoint = checkpoint
        # Lazy arrays, each removed when it is asked for. Of a GGUF file, each tensor is read at that time.
        self._arrays = open_gguf(checkpoint.path, floats) if checkpoint.layout == "gguf" else _lazy_arrays(checkpoint)
        self._uses = Counter(name for source in checkpoint.sources.values() for name in source.names)

    def read(self, path: str) -> mx.array:
        """The leaf of this path, lazy and in its stored dtype. Each can be read once."""
        source = self._checkpoint.sources[path]
        return source.join([self._take(name) for name in source.names])

    def read_own(self, path: str, shard: Shard) -> mx.array:
        """A process's part of a leaf, in its stored dtype. Hardly more than these bytes are read from the files."""
        source = self._checkpoint.sources[path]
        if source.leaf.cut is None:
            return self.read(path)
        tensors = [self._checkpoint.tensors[self._checkpoint.prefix + name] for name in source.names]
        if any(tensor.start is None for tensor in tensors):
            # GGUF's matrices are permuted when they are read, so they are read whole.
            return own_part(self.read(path), source.leaf.cut, shard)
        wholes = [bits_in_file(one.file, one.start or 0, one.shape, getattr(mx, one.dtype)) for one in tensors]
        parts = [
            [of_raw(read_part(one.file, one.start or 0, whole, part), getattr(mx, one.dtype)) for part in own]
            for one, whole, own in zip(tensors, wholes, source.own_parts(wholes, shard), strict=True)
        ]
        return source.join_parts(parts)

    def matrices(self, path: str, dtype: Dtype) -> Iterator[Raw]:
        """Yields the bits of a leaf's matrices, with floats in `dtype`. Each leaf can be read once."""
        source = self._checkpoint.sources[path]
        wanted = source.leaf.stored_as(dtype)
        tensors = [self._checkpoint.tensors[self._checkpoint.prefix + name] for name in source.names]
        kinds = {getattr(mx, tensor.dtype) for tensor in tensors}
        # If all tensors have one dtype, matrices are converted one at a time.
        kind = kinds.pop() if len(kinds) == 1 else wanted
        # A GGUF file's stacks are unpacked matrix by matrix, since a type may take many times its size as floats.
        unpacked = self._arrays if isinstance(self._arrays, GgufArrays) and source.is_stack else None
        read = partial(self._bits, kind=kind) if unpacked is None else unpacked.matrices
        for matrix in source.matrices(read):
            yield matrix if kind == wanted else raw(of_raw(matrix, kind).astype(wanted))

    def _bits(self, name: str, kind: mx.Dtype) -> Raw:
        tensor = self._checkpoint.tensors[self._checkpoint.prefix + name]
        array = self._take(name)
        if tensor.start is None or array.dtype != kind:
            with mx.stream(reading_device()):
                return raw(array.astype(kind))
        return mapped(tensor.file, tensor.start, tensor.shape, kind)

    def _take(self, name: str) -> mx.array:
        self._uses[name] -= 1
        stored = self._checkpoint.prefix + name
        if isinstance(self._arrays, dict) and not self._uses[name]:
            return cast(mx.array, self._arrays.pop(stored))
        return self._arrays[stored]


def _refuse_gguf_inside(folder: Path) -> None:
    files = sorted(file.name for file in folder.glob("*.gguf") if not is_hidden(file))
    if files and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json but {listed(files, most=3)}: name the GGUF file itself.")


def _lazy_arrays(checkpoint: Checkpoint) -> Mapping[str, mx.array]:
    """All tensors of a checkpoint's safetensors files. MLX reads each when it is evaluated."""
    arrays: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        arrays |= cast(dict[str, mx.array], mx.load(str(file)))
    return arrays


def _stored_dtype(tensors: Mapping[str, Tensor], table: Mapping[str, Source]) -> Dtype:
    """The float dtype that most of the expected tensors have."""
    names = [name for source in table.values() for name in source.names]
    counts = Counter(tensors[name].dtype for name in names if name in tensors and tensors[name].dtype in FLOATS)
    return cast(Dtype, counts.most_common(1)[0][0] if counts else FLOATS[0])


def _problems(
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Source],
    unknown: Mapping[str, list[str]],
    layout: Layout,
    dtype: str,
) -> tuple[list[str], list[str]]:
    problems = [problem for reasons in unknown.values() for problem in reasons]
    mixed = []
    told = {companion for path in unknown for name in table[path].names for companion in companions(name)}
    expected = {
        stored.name: (stored.shape, source.leaf.dtype)
        for path, source in table.items()
        if path not in unknown
        for stored in source.stored
    }
    problems += [f"{name} {list(expected[name][0])} is missing" for name in expected.keys() - tensors.keys()]
    problems += [
        f"{name} {list(tensors[name].shape)} in {tensors[name].file.name} is unexpected"
        for name in tensors.keys() - expected.keys() - told
        if not is_extra(layout, name)
    ]
    for name in expected.keys() & tensors.keys():
        tensor, (shape, integers) = tensors[name], expected[name]
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)} where {list(shape)} is expected")
        if integers is not None:
            if tensor.dtype != integers:
                problems.append(f"{name} is {tensor.dtype} where {integers} is expected, since it is quantized")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} is {tensor.dtype} where one of {', '.join(FLOATS)} is expected")
        elif tensor.dtype != dtype:
            mixed.append(f"{name} is {tensor.dtype} where {dtype} is expected, as most are (dtype converts all)")
    return problems, mixed
