"""A checkpoint's figures from its headers: sizes, bits per weight, and the memory that it needs.

Figures by part describe the loaded tree: floats in the dtype that most of them have, quantized matrices as stored. For
tensors that don't fit the config they follow the config.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dbrx_fn.checkpoints.checkpoint import Checkpoint
from dbrx_fn.checkpoints.layouts import Layout
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.costs import cache_bytes, read_weight_bytes
from dbrx_fn.model.params import param_count, param_spec
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import Backend, backend, memory_size

PartName = Literal["experts", "attention", "router", "embedding", "head", "norms"]
PARTS: tuple[PartName, ...] = get_args(PartName)

_MARKS: dict[str, PartName] = {
    ".experts.": "experts",
    ".attn.": "attention",
    ".router.": "router",
    ".wte.": "embedding",
    "lm_head.": "head",
}


@dataclass(frozen=True)
class Part:
    """All matrices, or norms, of one kind.

    `bits_per_weight`: over the matrices whose tensors exist; `None` if there are none.
    `formats`: the number of the tree's arrays stored in each format, by `format_text` or the float dtype.
    """

    parameters: int
    bytes: int
    bits_per_weight: float | None
    formats: dict[str, int]


@dataclass(frozen=True)
class CacheSize:
    """Keys and values of `batch_size` sequences of `context` tokens each.

    `capacity`: the cache's positions for each sequence. `bytes` counts all of them.
    """

    bytes_per_token: int
    context: int
    batch_size: int
    capacity: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Whether weights and cache fit this machine. A pass through the layers takes memory beyond `needed`.

    `bytes`: the default device's memory.
    `left`: `bytes` minus `needed`, negative if memory is lacking.
    """

    backend: Backend
    bytes: int
    needed: int
    left: int
    fits: bool


@dataclass(frozen=True)
class Description:
    """A checkpoint's figures. Sizes are in bytes.

    `files`, `file_bytes`: number and size of the weights' files.
    `weight_bytes`: size of the loaded tree.
    `bytes_per_token`: size of the weights that decoding one token reads: its experts, one row of the embedding, and all
        other weights.
    `problems`, `mixed`: as in `Checkpoint`.
    """

    layout: Layout
    files: int
    file_bytes: int
    config: Config
    parameters: int
    active_parameters: int
    weight_bytes: int
    bits_per_weight: float
    bytes_per_token: int
    parts: dict[PartName, Part]
    cache: CacheSize
    memory: Memory
    problems: tuple[str, ...]
    mixed: tuple[str, ...]


def describe(checkpoint: Checkpoint, *, context: int | None = None, batch_size: int = 1) -> Description:
    """Computes a checkpoint's figures.

    Args:
        checkpoint: from `open_checkpoint`.
        context: tokens per sequence. The longest that the model supports, if not given.
        batch_size: number of sequences at once.

    Raises:
        InputError: if a number is below 1 or absurdly large.
    """
    config = checkpoint.config
    context = config.max_seq_len if context is None else context
    for name, value in (("context", context), ("batch_size", batch_size)):
        if not 0 < value < 2**31:
            raise InputError(f"{name} is {value} where a whole number from 1 to below 2**31 is expected.")
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    parts = _parts(checkpoint)
    weights = sum(part.bytes for part in parts.values())
    cache = _cache_size(config, context, batch_size)
    memory, needed = memory_size(), weights + cache.bytes
    return Description(
        layout=checkpoint.layout,
        files=len(files),
        file_bytes=sum(file.stat().st_size for file in files),
        config=config,
        parameters=param_count(config),
        active_parameters=param_count(config, active=True),
        weight_bytes=weights,
        bits_per_weight=8 * weights / param_count(config),
        bytes_per_token=read_weight_bytes(config, checkpoint.formats, tokens=1),
        parts=parts,
        cache=cache,
        memory=Memory(backend(), memory, needed, memory - needed, needed <= memory),
        problems=tuple(sorted(checkpoint.problems)),
        mixed=tuple(sorted(checkpoint.mixed)),
    )


def part_of(path: str) -> PartName:
    """The part that a leaf of the tree belongs to."""
    return next((part for mark, part in _MARKS.items() if mark in path), "norms")


def format_text(form: Format) -> str:
    """A format as text, such as `affine 4:64` for 4 bits in groups of 64."""
    return f"{form.mode} {form.bits}:{form.group_size}"


def _parts(checkpoint: Checkpoint) -> dict[PartName, Part]:
    sizes: Counter[str] = Counter()
    for path, source in checkpoint.sources.items():
        sizes[path.rpartition(".")[0]] += source.leaf.nbytes(checkpoint.config.dtype)
    spec = param_spec(checkpoint.config)
    return {part: _part(checkpoint, sizes, [path for path in spec if part_of(path) == part]) for part in PARTS}


def _part(checkpoint: Checkpoint, sizes: Mapping[str, int], paths: Sequence[str]) -> Part:
    """A part, from its weights' paths and the sizes of their linears and norms."""
    spec = param_spec(checkpoint.config)
    parameters = {path: math.prod(spec[path].shape) for path in paths}
    nbytes = {path: sizes[path.rpartition(".")[0]] for path in paths}
    formats = {path: list(_formats(checkpoint, path)) for path in paths}
    there = [path for path in paths if formats[path]]
    bits = _bits_per_weight(sum(nbytes[path] for path in there), sum(parameters[path] for path in there))
    counts = Counter(text for texts in formats.values() for text in texts)
    return Part(sum(parameters.values()), sum(nbytes.values()), bits, dict(counts.most_common()))


def _bits_per_weight(nbytes: int, parameters: int) -> float | None:
    """Bits per parameter, or `None` without parameters."""
    return 8 * nbytes / parameters if parameters else None


def _formats(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    """The format of one of the tree's arrays. A dense one yields each dtype of its tensors."""
    if path in checkpoint.formats:
        yield format_text(checkpoint.formats[path])
        return
    stored = [checkpoint.prefix + name for name in checkpoint.sources[path].names]
    yield from sorted({checkpoint.tensors[name].dtype for name in stored if name in checkpoint.tensors})


def _cache_size(config: Config, context: int, batch_size: int) -> CacheSize:
    per_token = cache_bytes(config, 1)
    capacity = capacity_bucket(context)
    return CacheSize(per_token, context, batch_size, capacity, per_token * capacity * batch_size)
