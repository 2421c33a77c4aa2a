"""Loads a checkpoint into the parameter tree.

The tensors are lazy: MLX reads each from its file when it is first used.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_reader import read_adapters
from dbrx_fn.checkpoints.checkpoint import Checkpoint, LeafReader, open_checkpoint, require_fit
from dbrx_fn.checkpoints.hub import checkpoint_path
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import Leaf, nest, param_spec, quantized_spec
from dbrx_fn.model.shard import WHOLE, Shard, in_words, working_sizes
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.kernels.cuda_module import on_gpu
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.device import backend, memory_size
from dbrx_fn.runtime.memory import check_buffer, reading_device, room_remedy
from dbrx_fn.text.tokenizer import Tokenizer

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
    shard: Shard = WHOLE,
    adapter_path: str | Path | None = None,
) -> tuple[Params, Config]:
    """Loads a DBRX checkpoint of any known layout (`layouts`), from one file or from shards with an index.

    Quantized matrices stay quantized. Each matrix's format is read from its tensors. config.json isn't needed for that:
    older files of mlx-lm's are incomplete there.

    Args:
        path_or_repo: a folder, a GGUF file, or a Hugging Face repository as owner/name.
        revision: branch, tag or commit of the repository.
        dtype: dtype to convert all parameters to. As stored, if not given. Of a quantized matrix, scales and biases are
            converted.
        lazy: leave each tensor in its file until it is first used.
        progress: called as parameters are read.
        shard: this process's place, if several share the model. Each reads only its own part, and at once.
        adapter_path: a folder of adapters, as mlx-lm, PEFT and `train --lora` write them, to stand beside the weights.

    Returns:
        params: the tree that `dbrx_fn.model.params.param_spec` describes.
        config: the model's, with the parameters' `dtype` and the shard.

    Raises:
        ConfigError: if `config.json` is missing or isn't DBRX's, or if so many processes can't share the model.
        CheckpointError: if files are missing or damaged, if the parameters won't fit in memory, or if tensors are
            missing, unexpected, duplicate, or of a wrong shape or dtype. It names every such tensor. Adapters are
            refused as in `read_adapters`.
        InputError: if several processes share a model with adapters.
    """
    checkpoint = open_checkpoint(path_or_repo, revision=revision)
    require_fit(checkpoint, one_dtype=dtype is None)
    config = replace(checkpoint.config, dtype=dtype or checkpoint.config.dtype, shard=shard)
    check_groups(checkpoint, shard)
    adapters = {} if adapter_path is None else read_adapters(Path(adapter_path), config)
    if not lazy:
        _check_memory(checkpoint, config)

    with mx.stream(reading_device()):
        leaves = _whole_leaves(checkpoint, config) if shard.is_whole else _own_leaves(checkpoint, config, progress)
    params = nest(leaves | adapters, config)
    del leaves
    if not lazy:
        _read(params, checkpoint.path, progress if shard.is_whole else None)
    return params, config


def computing_dtype(path_or_repo: str | Path) -> Dtype | None:
    """The dtype to `load` a checkpoint in for fast computation. `None` means as stored.

    On a CPU that is float32, if it fits in memory: MLX multiplies only float32 there, and would convert other dtypes at
    every product (docs/performance.md). On a GPU with this project's kernels float16 becomes bfloat16, since kernels
    take no float16. GGUF's quantized types have float16 scales.

    Raises:
        ConfigError, CheckpointError: as in `load`.
    """
    if backend() != "cpu" and not on_gpu():
        return None
    checkpoint = open_checkpoint(path_or_repo)
    # A checkpoint of mixed dtypes is refused on every machine, unless the user asks for a conversion.
    if checkpoint.mixed and checkpoint.layout != "gguf":
        return None
    if backend() != "cpu":
        return "bfloat16" if checkpoint.config.dtype == "float16" else None
    return "float32" if checkpoint.nbytes("float32") <= memory_size() else None


@checked
def load_tokenizer(path_or_repo: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint: a folder, a repository as owner/name, or a GGUF file, which holds its own.

    Raises:
        CheckpointError: if the checkpoint doesn't exist.
        TokenizerError: if its tokenizer files are missing, unreadable or contradictory, or a GGUF file's can't be
            followed.
    """
    with tokenizer_files(checkpoint_path(path_or_repo, weights=False)) as files:
        return files.read()


def check_groups(checkpoint: Checkpoint, shard: Shard) -> None:
    """Raises `CheckpointError` if the shard's part of a quantized matrix would begin or end within a group."""
    widths = [
        (path, source_leaf.shape[-1], form.group_size)
        for path, form in checkpoint.formats.items()
        if (source_leaf := param_spec(checkpoint.config)[path]).cut is not None
        and source_leaf.cut.axis == len(source_leaf.axes) - 1
    ]
    broken = [path for path, inner, group in widths if inner // group % shard.size or inner % group]
    if broken:
        config = checkpoint.config
        groups = {inner // group for _, inner, group in widths}
        sizes = working_sizes(config.attn.kv_n_heads, config.ffn.ffn_hidden_size, config.vocab_size, *groups)
        raise CheckpointError(
            f"{shard.size} processes can't share {checkpoint.path}, since the groups of {broken[0]} can't be divided"
            f" evenly: start {in_words(sizes)}, or dequantize it or take smaller groups (python -m dbrx_fn.convert)."
        )


def _whole_leaves(checkpoint: Checkpoint, config: Config) -> dict[str, mx.array]:
    reader, float_type = LeafReader(checkpoint, config.dtype), getattr(mx, config.dtype)
    return {
        path: reader.read(path) if source.leaf.dtype else reader.read(path).astype(float_type)
        for path, source in checkpoint.sources.items()
    }


def _own_leaves(checkpoint: Checkpoint, config: Config, progress: Progress | None) -> dict[str, mx.array]:
    """A process's leaves. Each is read before the next one, so that no tensor's other parts stay in memory."""
    reader, float_type = LeafReader(checkpoint, config.dtype), getattr(mx, config.dtype)
    total, done = _nbytes(checkpoint, config), 0
    leaves: dict[str, mx.array] = {}
    for path, source in checkpoint.sources.items():
        try:
            leaf = reader.read_own(path, config.shard)
            # The copy frees a tensor that was read whole.
            leaf = mx.contiguous(leaf if source.leaf.dtype else leaf.astype(float_type))
            mx.eval(leaf)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise _unreadable(checkpoint.path, error, total) from None
        leaves[path] = leaf
        done += leaf.nbytes
        if progress is not None:
            progress(done, total)
    return leaves


def _leaves_of(checkpoint: Checkpoint, config: Config) -> dict[str, Leaf]:
    """This process's leaves by path."""
    return quantized_spec(param_spec(config), checkpoint.formats)


def _nbytes(checkpoint: Checkpoint, config: Config) -> int:
    return sum(leaf.nbytes(config.dtype) for leaf in _leaves_of(checkpoint, config).values())


def _check_memory(checkpoint: Checkpoint, config: Config) -> None:
    needed, dtype = _nbytes(checkpoint, config), config.dtype
    if needed > memory_size():
        raise CheckpointError(
            f"{checkpoint.path} needs {needed / _GIB:.1f} GiB in {dtype} and this machine has"
            f" {memory_size() / _GIB:.1f} GiB: {room_remedy(needed)}."
        )
    largest, leaf = max(_leaves_of(checkpoint, config).items(), key=lambda item: item[1].nbytes(dtype))
    check_buffer(f"{largest} of {checkpoint.path}", leaf.nbytes(dtype), "take a smaller quantization", CheckpointError)


def _read(params: Params, path: Path, progress: Progress | None) -> None:
    leaves = [cast(mx.array, array) for array in dict(tree_flatten(params)).values()]
    total = sum(array.nbytes for array in leaves)
    done = 0
    for array in leaves:
        try:
            mx.eval(array)
        except (RuntimeError, MemoryError) as error:
            raise _unreadable(path, error, total) from None
        done += array.nbytes
        if progress is not None:
            progress(done, total)


def _unreadable(path: Path, error: Exception, total: int) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be read to its end ({error}): check the disk, and that there are {total / _GIB:.1f}"
        " GiB of free memory."
    )
