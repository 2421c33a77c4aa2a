"""Converts a checkpoint to another layout, dtype or quantized format, or merges adapters, one matrix at a time.

A conversion works in a hidden folder beside its target (`conversion_work`). After an interruption, the same conversion
continues after the finished shards, and its result is byte for byte the same. The checkpoint's folder appears under its
name when all of it is on the disk.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from dbrx_fn.checkpoints.adapter_names import SETTINGS, TENSORS
from dbrx_fn.checkpoints.adapter_reader import read_adapters, style_of
from dbrx_fn.checkpoints.checkpoint import Checkpoint, LeafReader, require_fit
from dbrx_fn.checkpoints.conversion_work import PLAN_KEYS, ConversionWork, conversion_work, is_converting
from dbrx_fn.checkpoints.finite import is_finite, not_finite
from dbrx_fn.checkpoints.layouts import Source, Written, sources
from dbrx_fn.checkpoints.raw import Raw, of_raw, raw
from dbrx_fn.checkpoints.saver import check_layout, header_texts, small_files
from dbrx_fn.checkpoints.shards import SHARD_BYTES, Shard, ShardSum, plan_shards, write_shard
from dbrx_fn.checkpoints.tokenizer_files import fitting_tokenizer, tokenizer_files
from dbrx_fn.errors import CheckpointError, InputError, TokenizerError
from dbrx_fn.files.work_folder import WorkFolder, hidden
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import companions, listed, param_count
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.ops.formats import ADAPTER_LEAVES, Format, dequantize_matrix, quantize_matrix
from dbrx_fn.runtime.device import backend

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


@dataclass(frozen=True)
class Request:
    """The options of a conversion.

    `layout`: the new layout.
    `quantization`: formats of the kinds of matrices. `None` leaves all unchanged.
    `dequantize`: turn quantized matrices into floats first.
    `dtype`: dtype of all floats. `None` leaves it unchanged; then all must have one dtype.
    `shard_bytes`: the largest size of a file's tensors. Only a single linear may be larger.
    `check`: refuse weights that are NaN or infinite.
    `tokenizer`: folder with the tokenizer files to copy. The source's own, if `None`.
    `adapters`: folder of adapters to merge into the matrices. Quantized ones are quantized again, in their format.
    """

    layout: Written = "split"
    quantization: Quantization | None = None
    dequantize: bool = False
    dtype: Dtype | None = None
    shard_bytes: int = SHARD_BYTES
    check: bool = False
    tokenizer: str | None = None
    adapters: str | None = None


@dataclass(frozen=True, eq=False)
class Conversion:
    """A checked conversion: its source, the tensors to write, and their places in files.

    `adapters`: the leaves of adapters to merge, by their paths, float32.
    """

    source: Checkpoint
    request: Request
    config: Config
    formats: Mapping[str, Format]
    table: Mapping[str, Source]
    shards: tuple[Shard, ...]
    adapters: Mapping[str, mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Written bits per parameter."""
        return 8 * sum(shard.nbytes - len(shard.header) for shard in self.shards) / param_count(self.config)

    @property
    def peak_memory(self) -> int:
        """An estimate of the memory that converting needs: the largest tensor, and the results of the largest matrix.

        Most of it is pages of the source, which the system can take back (docs/checkpoints.md).
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
    """Raised for weights that `check` finds, and for those that merging makes."""


def plan_conversion(source: Checkpoint, request: Request) -> Conversion:
    """Plans a conversion and checks that it is possible. Only headers, adapters and a given tokenizer are read.

    Raises:
        InputError: if the layout can't hold the formats, a format doesn't fit a matrix, or a matrix that is quantized
            already would be quantized again.
        CheckpointError: if the checkpoint's tensors don't fit its config, or adapters don't fit them.
        TokenizerError: if the given tokenizer can't be read, or has more tokens than the model.
    """
    require_fit(source, one_dtype=request.dtype is None)
    config = replace(source.config, dtype=request.dtype or source.config.dtype)
    formats = {} if request.dequantize else dict(source.formats)
    if request.quantization is not None:
        for path, form in wanted_formats(config, request.quantization).items():
            if formats.get(path, form) != form:
                raise InputError(
                    f"{path} is quantized already in another format: take --dequantize to quantize it again, or leave"
                    " matrices of that kind."
                )
            formats[path] = form
    check_layout(request.layout, formats)
    table = sources(config, request.layout, formats)
    adapters = {} if request.adapters is None else _adapters(Path(request.adapters), config)
    if request.tokenizer is not None:
        fitting_tokenizer(Path(request.tokenizer), config.vocab_size)
    texts = header_texts(request.layout) | {
        "layout": request.layout,
        "converted_from": f"{source.layout}, {_formats_in_words(source.formats, source.config)}",
        "converted_to": f"{request.layout}, {_formats_in_words(formats, config)}{', adapters merged' * bool(adapters)}",
        "converted_by": "dbrx_fn",
    }
    shards = plan_shards(table, config.dtype, shard_bytes=request.shard_bytes, metadata=texts)
    return Conversion(source, request, config, formats, table, shards, adapters)


def convert(
    conversion: Conversion,
    folder: Path,
    *,
    progress: Progress | None = None,
    resumed: Callable[[int], None] | None = None,
) -> None:
    """Writes the new checkpoint's folder, or continues an interrupted conversion.

    Args:
        conversion: from `plan_conversion`.
        folder: the new folder. Missing parents are made too.
        progress: called as matrices are written.
        resumed: called with the number of shards that were finished before, if any, after a comparison with their
            checksums. A shard that differs is written again, with a warning.

    Raises:
        InputError: if the folder exists or can't be written, if another process is converting into it, or if its work
            folder holds files that no conversion made.
        CheckpointError: if a tensor can't be read, or with `check` isn't finite.
    """
    require_free(folder)
    with _writing(folder), conversion_work(folder, _plan(conversion)) as work:
        if os.path.lexists(folder):
            made = work.has_made(folder, conversion.shards)
            if work.has_ended():
                work.clear()
            if made:
                return
            raise _taken(folder)
        work.start()
        with work.checkpoint() as checkpoint:
            finished = work.finished(conversion.shards, checkpoint)
            if finished and resumed is not None:
                resumed(len(finished))
            try:
                _write(conversion, work, checkpoint, finished, progress)
            except BaseException as error:
                # Without a finished shard nothing is worth keeping. A source with NaN has to change, so neither.
                if isinstance(error, _NotFiniteError) or not finished:
                    with contextlib.suppress(OSError):
                        work.clear()
                raise
            if os.path.lexists(folder):
                raise _taken(folder)
            work.end(checkpoint, folder)


def require_free(folder: Path) -> None:
    """Raises `InputError` if `folder` exists, unless it is an interrupted conversion's."""
    with _writing(folder):
        converting = is_converting(folder)
        if os.path.lexists(folder) and not converting:
            raise _taken(folder)
        if converting:
            with conversion_work(folder, b""):
                pass


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder} can't be written ({error.strerror or error}): make room, or choose another place; the same"
            " conversion goes on where it was."
        ) from None


def _taken(folder: Path) -> InputError:
    return InputError(f"{folder} exists already: choose another name, or remove it.")


def _write(
    conversion: Conversion,
    work: ConversionWork,
    checkpoint: WorkFolder,
    finished: list[Shard],
    progress: Progress | None,
) -> None:
    """Writes all unfinished shards, adds them to `finished`, and then writes the other files."""
    missing = [shard for shard in conversion.shards if shard not in finished]
    _check_space(sum(shard.nbytes for shard in missing), checkpoint.path)
    reader = LeafReader(conversion.source)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, conversion.nbytes)

    advance(sum(shard.nbytes for shard in finished))
    for shard in missing:
        advance(len(shard.header))
        try:
            with checkpoint.create(hidden(shard.file)) as out:
                found = _write_shard(out, shard, conversion, reader, advance)
        except BaseException:
            checkpoint.remove(hidden(shard.file))
            raise
        work.note(shard, found)
        checkpoint.rename(hidden(shard.file), shard.file)
        finished.append(shard)
    with _tokenizer(conversion) as tokenizer:
        contents = small_files(
            conversion.config, conversion.request.layout, conversion.formats, conversion.shards, tokenizer
        )
    for name, content in contents.items():
        checkpoint.write(name, content)


def _write_shard(
    out: BinaryIO, shard: Shard, conversion: Conversion, reader: LeafReader, advance: Callable[[int], None]
) -> str:
    """Writes one file. Returns the checksum of its intended content."""
    found = ShardSum(shard)
    with ThreadPoolExecutor(1) as summing:
        last: Future[None] | None = None

        def written(name: str, matrix: Raw) -> None:
            nonlocal last
            # Summing runs while the next matrix is read and written. At most one is pending, to save memory.
            if last is not None:
                last.result()
            last = summing.submit(found.add, name, matrix)
            advance(matrix.nbytes)

        write_shard(out, shard, conversion.table, lambda linear: _matrices(conversion, reader, linear), written)
        if last is not None:
            last.result()
    return found.hexdigest()


@contextlib.contextmanager
def _tokenizer(conversion: Conversion) -> Iterator[Path | None]:
    """Yields the folder whose tokenizer files are copied, if there is one."""
    if conversion.request.tokenizer is not None:
        yield Path(conversion.request.tokenizer)
        return
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(tokenizer_files(conversion.source.path))
        except TokenizerError as error:
            warnings.warn(f"The new checkpoint has no tokenizer: {error}", stacklevel=4)
            yield None
        else:
            yield files.folder


def _matrices(conversion: Conversion, reader: LeafReader, linear: str) -> Iterator[dict[str, Raw]]:
    """Yields each matrix of a linear as it is written, by its leaves' paths."""
    source, dtype = conversion.source, getattr(mx, conversion.config.dtype)
    weight = f"{linear}.weight"
    before, after = source.formats.get(weight), conversion.formats.get(weight)
    paths = [path for path in companions(weight) if path in source.sources]
    dtypes = [source.sources[path].leaf.stored_as(conversion.config.dtype) for path in paths]
    read = [reader.matrices(path, conversion.config.dtype) for path in paths]
    for number, parts in enumerate(zip(*read, strict=True)):
        added = _added(conversion.adapters, linear, number)
        same = before == after and added is None
        if same and not conversion.request.check:
            yield dict(zip(paths, parts, strict=True))
            continue
        stored = {path: of_raw(part, kind) for path, part, kind in zip(paths, parts, dtypes, strict=True)}
        if conversion.request.check and (bad := not_finite(stored.items(), source.formats)):
            raise _NotFiniteError(
                f"{source.path} holds weights that are NaN or infinite in {conversion.config.dtype} ({listed(bad)}):"
                " repair it, or take another checkpoint or dtype."
            )
        if same:
            yield dict(zip(paths, parts, strict=True))
        else:
            exact = dtype if added is None else mx.float32
            matrix = stored[weight] if before is None else dequantize_matrix(list(stored.values()), before, exact)
            if added is not None:
                matrix = (matrix.astype(mx.float32) + added).astype(dtype)
                if not is_finite(matrix):
                    raise _NotFiniteError(
                        f"{weight} merged with its adapter is NaN or infinite in {conversion.config.dtype}: convert the"
                        " model with --dtype float32 --check first, and merge into that, or take other adapters."
                    )
            made = [matrix] if after is None else quantize_matrix(matrix, after)
            yield {path: raw(part) for path, part in zip(companions(weight), made, strict=False)}


def _adapters(folder: Path, config: Config) -> dict[str, mx.array]:
    return read_adapters(folder, replace(config, dtype="float32"))


def _added(adapters: Mapping[str, mx.array], linear: str, number: int) -> mx.array | None:
    """What an adapter adds to a linear's matrix of this number, `[outer inner]`, float32, if there is one."""
    if f"{linear}.lora_a" not in adapters:
        return None
    lora_a, lora_b, scale = (adapters[f"{linear}.{name}"] for name in ADAPTER_LEAVES)
    return scale * lora_b @ lora_a if lora_a.ndim == 2 else scale * lora_b[number] @ lora_a[number]


def _check_space(needed: int, folder: Path) -> None:
    """Raises `InputError` if a folder's disk has no room for the missing shards."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent.parent} has {free / 2**30:.1f} GiB free where {needed / 2**30:.1f} GiB are still to be"
            " written: make room, or choose another place."
        )


def _plan(conversion: Conversion) -> bytes:
    """Everything that determines the written bytes, as JSON."""
    files = sorted({tensor.file for tensor in conversion.source.tensors.values()})
    if conversion.request.adapters is not None:
        folder = Path(conversion.request.adapters)
        files += [folder / TENSORS[style_of(folder)], folder / SETTINGS]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shards = hashlib.sha256(b"".join(shard.header for shard in conversion.shards)).hexdigest()
    # MLX's versions and back ends may round differently.
    computed_by = [version("mlx"), backend()]
    decides = (computed_by, str(conversion.source.path.resolve()), stats, asdict(conversion.request), shards)
    return json.dumps(dict(zip(PLAN_KEYS, decides, strict=True)), indent=2).encode()


def _formats_in_words(formats: Mapping[str, Format], config: Config) -> str:
    counts = Counter(formats.values())
    words = [f"{form.mode} {form.bits} bits in groups of {form.group_size}" for form, _ in counts.most_common()]
    return "; ".join([*words, config.dtype])
