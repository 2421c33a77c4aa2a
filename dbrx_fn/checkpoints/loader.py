"""Reads a checkpoint into the parameter tree.

The tensors are lazy: MLX reads each from its file when it is first used. A loader never computes a layer, and no layer
reads a file.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.checkpoint import Checkpoint, LeafReader, open_checkpoint, require_fit
from dbrx_fn.checkpoints.hub import checkpoint_path, tokenizer_folder
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import nest
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.device import backend, memory_size
from dbrx_fn.runtime.memory import check_buffer, reading_device, room_remedy
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer

_GIB = 2**30

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""


@checked
def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
    lazy: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, Config]:
    """Loads a DBRX checkpoint of any known layout (`layouts`), in one file or sharded with an index.

    Quantized matrices stay quantized. Which ones are, and how, is read from the tensors, each for itself: what
    config.json says of that isn't needed, and older files of mlx-lm's don't say all of it.

    Args:
        path_or_repo: a folder, a GGUF file, or a Hugging Face repository as owner/name.
        revision: of the repository: a branch, tag or commit.
        dtype: what to convert all parameters to; as they are stored, if not given. Of a quantized matrix, that is its
            scales and biases.
        lazy: leave each tensor in its file until it is first used.
        progress: called as parameters are read.

    Returns:
        params: the tree that `dbrx_fn.model.params.param_spec` describes.
        config: the model's, its `dtype` that of the parameters.

    Raises:
        ConfigError: if `config.json` is missing or no DBRX model's.
        CheckpointError: if files are missing or damaged, or their tensors aren't exactly the config's: every missing,
            unexpected, duplicate, misshapen or wrongly typed one is named. Also if they won't fit in memory.
    """
    checkpoint = open_checkpoint(path_or_repo, revision=revision)
    require_fit(checkpoint, one_dtype=dtype is None)
    config = replace(checkpoint.config, dtype=dtype or checkpoint.config.dtype)
    if not lazy:
        _check_memory(checkpoint, config.dtype)

    reader, float_type = LeafReader(checkpoint), getattr(mx, config.dtype)
    with mx.stream(reading_device()):
        leaves = {
            path: reader.read(path) if source.leaf.dtype else reader.read(path).astype(float_type)
            for path, source in checkpoint.sources.items()
        }
    params = nest(leaves, config)
    del leaves
    if not lazy:
        _read(params, checkpoint.path, progress)
    return params, config


def computing_dtype(path_or_repo: str | Path) -> Dtype | None:
    """What to `load` a checkpoint's parameters as, so that computing with them is fast; `None`: as they are stored.

    A CPU multiplies float32 only, and turns anything else into that at every product: a bfloat16 model of 40 million
    parameters makes 20 tokens a second on 2 cores, and 72 as float32.

    Raises:
        ConfigError, CheckpointError: as `load`.
    """
    if backend() != "cpu":
        return None
    checkpoint = open_checkpoint(path_or_repo)
    # One of several dtypes is refused on every machine, unless somebody asks for it to be converted.
    fits = not checkpoint.mixed and checkpoint.nbytes("float32") <= memory_size()
    return "float32" if fits else None


@checked
def load_tokenizer(path_or_repo: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint: a folder, a GGUF file beside which it lies, or a repository as owner/name.

    Raises:
        CheckpointError: if there is no such checkpoint.
        TokenizerError: if its tokenizer files are missing, unreadable or contradictory.
    """
    return read_tokenizer(tokenizer_folder(checkpoint_path(path_or_repo, weights=False)))


def _check_memory(checkpoint: Checkpoint, dtype: Dtype) -> None:
    needed = checkpoint.nbytes(dtype)
    if needed > memory_size():
        raise CheckpointError(
            f"{checkpoint.path} needs {needed / _GIB:.1f} GiB in {dtype} and this machine has"
            f" {memory_size() / _GIB:.1f} GiB: {room_remedy(needed)}."
        )
    largest, source = max(checkpoint.sources.items(), key=lambda item: item[1].leaf.nbytes(dtype))
    check_buffer(
        f"{largest} of {checkpoint.path}", source.leaf.nbytes(dtype), "take a smaller quantization", CheckpointError
    )


def _read(params: Params, path: Path, progress: Progress | None) -> None:
    leaves = [cast(mx.array, array) for array in dict(tree_flatten(params)).values()]
    total = sum(array.nbytes for array in leaves)
    done = 0
    for array in leaves:
        try:
            mx.eval(array)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{path} can't be read to its end ({error}): check the disk, and that there are {total / _GIB:.1f}"
                " GiB of free memory."
            ) from None
        done += array.nbytes
        if progress is not None:
            progress(done, total)
