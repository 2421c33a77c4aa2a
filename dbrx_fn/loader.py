"""Reads a checkpoint folder into the parameter tree: files, headers, checks, then tensors.

Everything that can be wrong is found from the files' headers, before any tensor is read, and reported together. The
tensors themselves are lazy: MLX reads each from its file when it is first used. A loader never computes a layer, and
no layer reads a file.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.backend import memory_size
from dbrx_fn.config import Config, Dtype, read_config
from dbrx_fn.errors import CheckpointError
from dbrx_fn.hub import checkpoint_folder
from dbrx_fn.layouts import Source, layout_of, sources
from dbrx_fn.params import Params, companions, formats_of, listed, nest
from dbrx_fn.tensor_files import Tensor, read_headers
from dbrx_fn.tokenizer import Tokenizer, read_tokenizer

_FLOATS = get_args(Dtype)
_GIB = 2**30

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""


def load(
    path_or_repo: str | Path, *, dtype: Dtype | None = None, lazy: bool = False, progress: Progress | None = None
) -> tuple[Params, Config]:
    """Loads a DBRX checkpoint of any known layout (`dbrx_fn.layouts`), in one file or sharded with an index.

    Quantized matrices stay quantized. Which ones are, and how, is read from the tensors, each for itself: what
    config.json says of that isn't needed, and older files of mlx-lm's don't say all of it.

    Args:
        path_or_repo: a folder, or a Hugging Face repository as owner/name.
        dtype: what to convert all parameters to; as they are stored, if not given. Of a quantized matrix, that is its
            scales and biases.
        lazy: leave each tensor in its file until it is first used.
        progress: called as parameters are read.

    Returns:
        params: the tree that `dbrx_fn.params.param_spec` describes.
        config: the model's, its `dtype` that of the parameters.

    Raises:
        ConfigError: if `config.json` is missing or no DBRX model's.
        CheckpointError: if files are missing or damaged, or their tensors aren't exactly the config's: every missing,
            unexpected, duplicate, misshapen or wrongly typed one is named. Also if they won't fit in memory.
    """
    folder = checkpoint_folder(path_or_repo)
    config = read_config(folder)
    tensors = read_headers(folder)
    layout = layout_of(tensors)
    dense = sources(config, layout)
    formats, unknown = formats_of(
        tensors, {path: (source.names, source.shape[-1]) for path, source in dense.items() if len(source.shape) > 1}
    )
    table = sources(config, layout, formats)
    config = replace(config, dtype=_stored_dtype(tensors, table))
    _check(folder, tensors, table, unknown, config.dtype, mixed=dtype is not None)
    config = replace(config, dtype=dtype or config.dtype)
    if not lazy:
        _check_memory(folder, table, config.dtype)

    arrays: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        arrays |= cast(dict[str, mx.array], mx.load(str(file)))
    float_type = getattr(mx, config.dtype)
    leaves = {
        path: _of_dtype(source.join([arrays.pop(name) for name in source.names]), float_type, source)
        for path, source in table.items()
    }
    params = nest(leaves, config)
    del leaves
    if not lazy:
        _read(params, folder, progress)
    return params, config


def load_tokenizer(path_or_repo: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, from a folder or a Hugging Face repository as owner/name.

    Raises:
        CheckpointError: if there is no such folder or repository.
        TokenizerError: if its tokenizer files are missing, unreadable or contradictory.
    """
    return read_tokenizer(checkpoint_folder(path_or_repo, weights=False))


def _stored_dtype(tensors: Mapping[str, Tensor], table: Mapping[str, Source]) -> Dtype:
    """The float dtype that most of the expected tensors have."""
    names = [name for source in table.values() for name in source.names]
    counts = Counter(tensors[name].dtype for name in names if name in tensors and tensors[name].dtype in _FLOATS)
    return cast(Dtype, counts.most_common(1)[0][0] if counts else _FLOATS[0])


def _of_dtype(array: mx.array, float_type: mx.Dtype, source: Source) -> mx.array:
    return array.astype(float_type) if source.dtype is None else array


def _check(
    folder: Path,
    tensors: Mapping[str, Tensor],
    table: Mapping[str, Source],
    unknown: Mapping[str, list[str]],
    dtype: str,
    *,
    mixed: bool,
) -> None:
    problems = [problem for reasons in unknown.values() for problem in reasons]
    told = {companion for path in unknown for name in table[path].names for companion in companions(name)}
    expected = {name: source for path, source in table.items() if path not in unknown for name in source.names}
    problems += [f"{name} {list(expected[name].shape)} is missing" for name in expected.keys() - tensors.keys()]
    problems += [
        f"{name} {list(tensors[name].shape)} in {tensors[name].file.name} is unexpected"
        for name in tensors.keys() - expected.keys() - told
    ]
    for name in expected.keys() & tensors.keys():
        tensor, source = tensors[name], expected[name]
        if tensor.shape != source.shape:
            problems.append(f"{name} is {list(tensor.shape)} where {list(source.shape)} is expected")
        if source.dtype is not None:
            if tensor.dtype != source.dtype:
                problems.append(f"{name} is {tensor.dtype} where {source.dtype} is expected, since it is quantized")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{name} is {tensor.dtype} where one of {', '.join(_FLOATS)} is expected")
        elif tensor.dtype != dtype and not mixed:
            problems.append(f"{name} is {tensor.dtype} where {dtype} is expected, as most are (dtype converts all)")
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} of the weights don't fit config.json: {listed(problems)}.")


def _check_memory(folder: Path, table: Mapping[str, Source], dtype: str) -> None:
    needed = sum(
        len(source.names) * math.prod(source.shape) * getattr(mx, source.dtype or dtype).size
        for source in table.values()
    )
    if needed > memory_size():
        raise CheckpointError(
            f"{folder} needs {needed / _GIB:.1f} GiB in {dtype} and this machine has"
            f" {memory_size() / _GIB:.1f} GiB: take a smaller checkpoint, or a larger machine."
        )


def _read(params: Params, folder: Path, progress: Progress | None) -> None:
    leaves = [cast(mx.array, array) for array in dict(tree_flatten(params)).values()]
    total = sum(array.nbytes for array in leaves)
    done = 0
    for array in leaves:
        try:
            mx.eval(array)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{folder} can't be read to its end ({error}): check the disk, and that there are {total / _GIB:.1f}"
                " GiB of free memory."
            ) from None
        done += array.nbytes
        if progress is not None:
            progress(done, total)
