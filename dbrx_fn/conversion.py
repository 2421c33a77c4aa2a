"""A checkpoint to another: of another layout, other dtypes or other formats, one matrix at a time.

A conversion works in a hidden folder beside its place, `.NAME.converting`, which holds its plan and the shards that are
finished. Interrupted, the same conversion goes on after the last of these; what it makes is byte for byte the same. The
folder appears under its name when all of it is on the disk.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from dbrx_fn.atomic import flush, write_file
from dbrx_fn.backend import backend
from dbrx_fn.checkpoint import Checkpoint, LeafReader, require_fit
from dbrx_fn.config import Config, Dtype
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.file_lock import locked
from dbrx_fn.finite import not_finite
from dbrx_fn.hub import has_tokenizer_beside, tokenizer_folder
from dbrx_fn.layouts import Source, Written, sources
from dbrx_fn.params import Format, companions, listed, param_count
from dbrx_fn.quantization import Quantization, dequantize_matrix, quantize_matrix, wanted_formats
from dbrx_fn.raw import Raw, of_raw, raw
from dbrx_fn.saver import check_layout, copy_tokenizer, header_texts, write_config
from dbrx_fn.shards import SHARD_BYTES, Shard, plan_shards, write_index, write_shard

_PLAN, _UNFINISHED = "plan.json", "checkpoint"
_BESIDE = ".unfinished"

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


@dataclass(frozen=True)
class Request:
    """What is wanted of a conversion.

    `layout`: of what is written.
    `quantization`: formats of the kinds of matrices; `None` leaves all as they are.
    `dequantize`: turn quantized matrices into floats first.
    `dtype`: of all floats; as they are, if `None`, and then all must be of one.
    `shard_bytes`: how large a file's tensors become at most, unless a linear alone is larger.
    `check`: refuse weights that are NaN or infinite.
    `tokenizer`: folder whose tokenizer files are copied; the source's own, if `None`.
    """

    layout: Written = "split"
    quantization: Quantization | None = None
    dequantize: bool = False
    dtype: Dtype | None = None
    shard_bytes: int = SHARD_BYTES
    check: bool = False
    tokenizer: str | None = None


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
        """About how many bytes of memory converting takes: the largest tensor, and what is made of its largest matrix.

        Measured for 8 GB with tensors of 1.07 GB, embedding 0.82: 1.2 GB as they are, 1.95 GB to 4 bits. Most of it is
        the source's pages, which the system takes back where it needs them.
        """
        source = self.source
        largest = matrix = 0
        for one in source.sources.values():
            size = one.leaf.stored_as(source.config.dtype).size
            largest = max(largest, *(math.prod(stored.shape) * size for stored in one.stored))
            shape = one.leaf.shape[1:] if one.leaf.is_expert else one.leaf.shape
            matrix = max(matrix, size * math.prod(shape))
        return largest + 3 * matrix // 2


class _NotFiniteError(CheckpointError):
    """Found by `check`."""


def plan_conversion(source: Checkpoint, request: Request) -> Conversion:
    """Finds out what a conversion would write, and that it can be done; nothing is read but headers.

    Raises:
        InputError: if the layout can't hold the formats, a format doesn't fit a matrix, or a matrix that is quantized
            already would be quantized again.
        CheckpointError: if the checkpoint's tensors don't fit its config.
    """
    require_fit(source, one_dtype=request.dtype is None)
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
    require_free(folder)
    work = _work_folder(folder)
    plan, unfinished = work / _PLAN, work / _UNFINISHED
    try:
        content = _plan(conversion)
        work.mkdir(parents=True, exist_ok=True)
        lock = work / "lock"
        lock.touch()
        with locked(lock, f"{folder} is being written by another conversion: wait until it ends."):
            same = plan.is_file() and plan.read_bytes() == content
            if os.path.lexists(folder):
                # A process may have been killed after it had renamed the folder.
                ended = not unfinished.exists()
                if ended and (same or not plan.exists()):
                    _clean_up(work)
                if ended and same:
                    return
                raise _taken(folder)
            if not same:
                if unfinished.exists():
                    shutil.rmtree(unfinished)
                write_file(plan, content)
            unfinished.mkdir(exist_ok=True)
            try:
                _write(conversion, unfinished, progress)
            except BaseException as error:
                # Nothing is worth keeping without a finished shard, nor if the source can't stay as it is.
                if isinstance(error, _NotFiniteError) or not _finished(conversion, unfinished):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            if os.path.lexists(folder):
                raise _taken(folder)
            unfinished.rename(folder)
            flush(folder.parent)
            _clean_up(work)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} can't be written ({error.strerror or error}): make room, or choose another"
            " place; the same conversion goes on where it was."
        ) from None


def require_free(folder: Path) -> None:
    """Raises `InputError` if something else than an interrupted conversion has made `folder`."""
    if os.path.lexists(folder) and not _work_folder(folder).is_dir():
        raise _taken(folder)


def finished_shards(conversion: Conversion, folder: Path) -> list[Shard]:
    """The shards that an interrupted conversion into `folder` has finished."""
    work = _work_folder(folder)
    try:
        same = (work / _PLAN).read_bytes() == _plan(conversion)
    except OSError:
        same = False
    return _finished(conversion, work / _UNFINISHED) if same else []


def _finished(conversion: Conversion, unfinished: Path) -> list[Shard]:
    return [shard for shard in conversion.shards if (unfinished / shard.file).is_file()]


def _work_folder(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.converting"


def _taken(folder: Path) -> InputError:
    return InputError(f"{folder} exists already: choose another name, or remove it.")


def _clean_up(work: Path) -> None:
    """Removes a work folder, its plan last: killed meanwhile, the same conversion knows by that that it has ended."""
    with contextlib.suppress(OSError):
        for left in work.iterdir():
            if left.name != _PLAN:
                left.unlink()
    shutil.rmtree(work, ignore_errors=True)


def _write(conversion: Conversion, folder: Path, progress: Progress | None) -> None:
    for left in folder.glob(f".*{_BESIDE}"):
        left.unlink()
    _check_space(conversion, folder)
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
        beside = folder / f".{shard.file}{_BESIDE}"
        try:
            write_shard(beside, shard, conversion.table, lambda linear: _matrices(conversion, reader, linear), advance)
            beside.rename(file)
        finally:
            beside.unlink(missing_ok=True)
        flush(folder)
    write_index(folder, conversion.shards)
    path = conversion.source.path
    if conversion.request.tokenizer is not None:
        copy_tokenizer(Path(conversion.request.tokenizer), folder)
    elif path.is_dir() or has_tokenizer_beside(path):
        copy_tokenizer(tokenizer_folder(path), folder)
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
    dtypes = [source.sources[path].leaf.stored_as(conversion.config.dtype) for path in paths]
    read = [reader.matrices(path, conversion.config.dtype) for path in paths]
    for parts in zip(*read, strict=True):
        if before == after and not conversion.request.check:
            yield dict(zip(paths, parts, strict=True))
            continue
        stored = {path: of_raw(part, kind) for path, part, kind in zip(paths, parts, dtypes, strict=True)}
        if conversion.request.check and (bad := not_finite(stored.items(), source.formats)):
            raise _NotFiniteError(
                f"{source.path} holds weights that are NaN or infinite in {conversion.config.dtype} ({listed(bad)}):"
                " repair it, or take another checkpoint or dtype."
            )
        if before == after:
            yield dict(zip(paths, parts, strict=True))
        else:
            matrix = stored[weight] if before is None else dequantize_matrix(list(stored.values()), before, dtype)
            made = [matrix] if after is None else quantize_matrix(matrix, after)
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


def _plan(conversion: Conversion) -> bytes:
    """All that decides what is written, as JSON."""
    files = sorted({tensor.file for tensor in conversion.source.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shards = hashlib.sha256(b"".join(shard.header for shard in conversion.shards)).hexdigest()
    decides = {
        # Which may round differently.
        "computed_by": [version("mlx"), backend()],
        "source": str(conversion.source.path.resolve()),
        "files": stats,
        "request": asdict(conversion.request),
        "headers": shards,
    }
    return json.dumps(decides, indent=2).encode()


def _formats_in_words(formats: Mapping[str, Format], config: Config) -> str:
    counts = Counter(formats.values())
    words = [f"{form.mode} {form.bits} bits in groups of {form.group_size}" for form, _ in counts.most_common()]
    return "; ".join([*words, config.dtype])
