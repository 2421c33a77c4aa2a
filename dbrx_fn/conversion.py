"""A checkpoint to another: of another layout, other dtypes or other formats, one matrix at a time.

A conversion works in a hidden folder beside its place, `.NAME.converting`, which holds its plan and the shards that are
finished. Interrupted, the same conversion goes on after the last of these; what it makes is byte for byte the same. The
folder appears under its name when all of it is on the disk.
"""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.atomic import flush, write_file
from dbrx_fn.checkpoint import FLOATS, Checkpoint, LeafReader, require_fit
from dbrx_fn.config import Config, Dtype
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.file_lock import locked
from dbrx_fn.finite import not_finite
from dbrx_fn.layouts import Source, Written, sources
from dbrx_fn.params import Format, companions, listed, param_count
from dbrx_fn.quantization import Quantization, dequantize_matrix, quantize_matrix, wanted_formats
from dbrx_fn.raw import Raw, of_raw, raw
from dbrx_fn.saver import check_layout, copy_tokenizer, header_texts, write_config
from dbrx_fn.shards import SHARD_BYTES, Shard, plan_shards, write_index, write_shard

_FLOATS = tuple(getattr(mx, dtype) for dtype in FLOATS)

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


@dataclass(frozen=True)
class Request:
    """What is wanted of a conversion.

    `layout`: of what is written.
    `quantization`: formats of the kinds of matrices; `None` leaves all as they are.
    `dequantize`: turn quantized matrices into floats first.
    `dtype`: of all floats; as most of them are, if `None`.
    `shard_bytes`: how large a file's tensors become at most, unless a linear alone is larger.
    `check`: refuse weights that are NaN or infinite.
    """

    layout: Written = "split"
    quantization: Quantization | None = None
    dequantize: bool = False
    dtype: Dtype | None = None
    shard_bytes: int = SHARD_BYTES
    check: bool = False


@dataclass(frozen=True, eq=False)
class Conversion:
    """A conversion that can be done: what is read, what is written, and how it lies in files."""

    source: Checkpoint
    request: Request
    config: Config
    formats: Mapping[str, Format]
    table: Mapping[str, Source]
    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Of what is written, over all parameters."""
        return 8 * sum(shard.nbytes - len(shard.header) for shard in self.shards) / param_count(self.config)

    @property
    def peak_memory(self) -> int:
        """About how many bytes of memory converting takes: the largest tensor, and what is made of a matrix of it."""
        source = self.source
        largest = matrix = 0
        for one in source.sources.values():
            size = getattr(mx, one.leaf.dtype or source.config.dtype).size
            largest = max(largest, *(math.prod(stored.shape) * size for stored in one.stored))
            shape = one.leaf.shape[1:] if one.leaf.is_expert else one.leaf.shape
            matrix = max(matrix, 4 * math.prod(shape))
        whole = sum(tensor.file.stat().st_size for tensor in source.tensors.values()) if source.path.is_file() else 0
        return max(largest, whole) + 2 * matrix


def plan_conversion(source: Checkpoint, request: Request) -> Conversion:
    """Finds out what a conversion would write, and that it can be done; nothing is read but headers.

    Raises:
        InputError: if the layout can't hold the formats, a format doesn't fit a matrix, or a matrix that is quantized
            already would be quantized again.
        CheckpointError: if the checkpoint's tensors don't fit its config.
    """
    require_fit(source, one_dtype=False)
    config = replace(source.config, dtype=request.dtype or source.config.dtype)
    formats = {} if request.dequantize else dict(source.formats)
    if request.quantization is not None:
        for path, form in wanted_formats(config, request.quantization).items():
            if formats.get(path, form) != form:
                raise InputError(
                    f"{path} is quantized already, otherwise than asked for: take --dequantize to quantize it anew, or"
                    " leave matrices of that kind."
                )
            formats[path] = form
    check_layout(request.layout, formats)
    table = sources(config, request.layout, formats)
    texts = header_texts(request.layout) | {
        "layout": request.layout,
        "converted_from": f"{source.layout}, {_formats_in_words(source.formats, source.config)}",
        "converted_to": f"{request.layout}, {_formats_in_words(formats, config)}",
        "converted_by": "dbrx_fn",
    }
    shards = plan_shards(table, config.dtype, shard_bytes=request.shard_bytes, metadata=texts)
    return Conversion(source, request, config, formats, table, shards)


def convert(conversion: Conversion, folder: Path, *, progress: Progress | None = None) -> None:
    """Writes the new checkpoint's folder, or goes on where the same conversion was interrupted.

    Args:
        conversion: from `plan_conversion`.
        folder: to be made; its parents too, where they are missing.
        progress: called as matrices are written.

    Raises:
        InputError: if the folder exists, can't be written, or another process is converting into it.
        CheckpointError: if a tensor can't be read, or with `check` isn't finite.
    """
    work = folder.parent / f".{folder.name}.converting"
    plan, unfinished = work / "plan.json", work / "checkpoint"
    content = json.dumps(_plan(conversion), indent=2).encode()
    try:
        if os.path.lexists(folder):
            if not plan.is_file() or plan.read_bytes() != content or unfinished.exists():
                raise InputError(f"{folder} exists already: choose another name, or remove it.")
            shutil.rmtree(work)
            return
        work.mkdir(parents=True, exist_ok=True)
        lock = work / "lock"
        lock.touch()
        with locked(lock, f"{folder} is being written by another conversion: wait until it ends."):
            if not plan.is_file() or plan.read_bytes() != content:
                shutil.rmtree(unfinished, ignore_errors=True)
                write_file(plan, content)
            unfinished.mkdir(exist_ok=True)
            _check_space(conversion, unfinished)
            _write(conversion, unfinished, progress)
            if os.path.lexists(folder):
                raise InputError(f"{folder} exists already: choose another name, or remove it.")
            unfinished.rename(folder)
            flush(folder.parent)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} can't be written ({error.strerror or error}): make room, or choose another"
            " place; the same conversion goes on where it was."
        ) from None


def finished_shards(conversion: Conversion, folder: Path) -> list[Shard]:
    """The shards that an interrupted conversion into `folder` has finished."""
    work = folder.parent / f".{folder.name}.converting"
    try:
        same = (work / "plan.json").read_bytes() == json.dumps(_plan(conversion), indent=2).encode()
    except OSError:
        same = False
    return [shard for shard in conversion.shards if same and (work / "checkpoint" / shard.file).is_file()]


def _write(conversion: Conversion, folder: Path, progress: Progress | None) -> None:
    reader = LeafReader(conversion.source)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, conversion.nbytes)

    for shard in conversion.shards:
        file = folder / shard.file
        if file.is_file():
            advance(shard.nbytes)
            continue
        advance(len(shard.header))
        beside = folder / f".{shard.file}.unfinished"
        write_shard(beside, shard, conversion.table, lambda linear: _matrices(conversion, reader, linear), advance)
        beside.rename(file)
        flush(folder)
    write_index(folder, conversion.shards)
    source = conversion.source.path
    if source.is_dir():
        copy_tokenizer(source, folder)
    write_config(folder, conversion.config, conversion.request.layout, conversion.formats)
    for written in folder.iterdir():
        flush(written)
    flush(folder)


def _matrices(conversion: Conversion, reader: LeafReader, linear: str) -> Iterator[dict[str, Raw]]:
    """Each matrix of a linear as it is to be written, by its leaves' paths."""
    source, dtype = conversion.source, getattr(mx, conversion.config.dtype)
    weight = f"{linear}.weight"
    before, after = source.formats.get(weight), conversion.formats.get(weight)
    paths = [path for path in companions(weight) if path in source.sources]
    dtypes = [getattr(mx, source.sources[path].leaf.dtype or source.config.dtype) for path in paths]
    unchanged = before == after and source.config.dtype == conversion.config.dtype
    for parts in zip(*(reader.matrices(path) for path in paths), strict=True):
        if unchanged and not conversion.request.check:
            yield dict(zip(paths, parts, strict=True))
            continue
        stored = {path: of_raw(part, kind) for path, part, kind in zip(paths, parts, dtypes, strict=True)}
        if conversion.request.check and (bad := not_finite(stored.items(), source.formats)):
            raise CheckpointError(
                f"{source.path} holds NaN or infinite weights ({listed(bad)}): repair it, or take another checkpoint."
            )
        if before == after:
            yield {path: raw(part.astype(dtype) if part.dtype in _FLOATS else part) for path, part in stored.items()}
        else:
            matrix = stored[weight] if before is None else dequantize_matrix(list(stored.values()), before, dtype)
            made = [matrix.astype(dtype)] if after is None else quantize_matrix(matrix.astype(dtype), after)
            yield {path: raw(part) for path, part in zip(companions(weight), made, strict=False)}


def _check_space(conversion: Conversion, folder: Path) -> None:
    """Raises `InputError` if the disk has no room for the shards that aren't there yet."""
    needed = sum(shard.nbytes for shard in conversion.shards if not (folder / shard.file).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent.parent} has {free / 2**30:.1f} GiB free where {needed / 2**30:.1f} GiB are still to be"
            " written: make room, or choose another place."
        )


def _plan(conversion: Conversion) -> dict[str, Any]:
    """All that decides what is written, as JSON has it."""
    files = sorted({tensor.file for tensor in conversion.source.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shards = hashlib.sha256(b"".join(shard.header for shard in conversion.shards)).hexdigest()
    return {
        "source": str(conversion.source.path.resolve()),
        "files": [list(stat) for stat in stats],
        "request": asdict(conversion.request),
        "headers": shards,
    }


def _formats_in_words(formats: Mapping[str, Format], config: Config) -> str:
    counts = Counter(formats.values())
    words = [f"{form.mode} {form.bits} bits in groups of {form.group_size}" for form, _ in counts.most_common()]
    return "; ".join([*words, config.dtype])
