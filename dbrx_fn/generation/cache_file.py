"""A cache as a file (`save_cache`, `load_cache`), so a long prompt is computed only once.

The file is safetensors (https://github.com/huggingface/safetensors#format). Each layer N has two tensors, `keys.N` and
`values.N`, `[kv_heads tokens head_dim]` in the config's dtype: row 0's tokens, then row 1's, and so on. Free and
rewound positions aren't saved. The header's metadata holds `dbrx_fn_cache`, the format's version; `lengths`, a JSON
list of each row's number of tokens; and `config`, a JSON object of all settings that a cache depends on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

import mlx.core as mx

from dbrx_fn.errors import CacheError, CheckpointError
from dbrx_fn.files.atomic import new_file
from dbrx_fn.files.json_file import parse_json, shown
from dbrx_fn.files.safetensors_header import checked_header
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import listed
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.runtime.memory import reading_device

_VERSION = "1"
DTYPE_CODES: Mapping[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MOST_PADDING = 256
"""The most positions in memory for each token in a file. In memory a short row takes as much as the longest row, so
without a limit a small file could take all memory."""


def save_cache(file: str | Path, cache: Cache) -> None:
    """Saves a cache as a file. The file appears when it is complete, and replaces one of that name.

    Args:
        file: any name in an existing folder.
        cache: of any batch size and lengths. Its capacity isn't saved.

    Raises:
        CacheError: if most rows are almost empty beside long ones (more than 256 positions in memory per token).
        InputError: if the file can't be written. An existing file is kept.
    """
    if _pads_too_much(cache.lengths):
        raise CacheError(
            f"Most of this cache's {cache.batch_size} rows are almost empty beside its longest: choose rows with"
            " take_rows, and save long and short ones apart."
        )

    def held(arrays: tuple[mx.array, ...], name: str) -> dict[str, mx.array]:
        return {
            f"{name}.{layer}": mx.concatenate(
                [array[row, :, :length] for row, length in enumerate(cache.lengths)], axis=1
            )
            for layer, array in enumerate(arrays)
        }

    texts = {
        "dbrx_fn_cache": _VERSION,
        "config": json.dumps(cache_fields(cache.config)),
        "lengths": json.dumps(cache.lengths),
    }
    with new_file(Path(file)) as opened:
        mx.save_safetensors(opened, held(cache.keys, "keys") | held(cache.values, "values"), texts)


def load_cache(file: str | Path, config: Config, capacity: int | None = None) -> Cache:
    """Reads a cache that `save_cache` wrote, bit for bit.

    The file doesn't say which weights it was made with: a model of the same config with other weights needs another.

    Args:
        file: a file from `save_cache`.
        config: the model's. It may differ from the saved one in fields that no cache depends on: `max_seq_len`,
            `initializer_range` and settings for training.
        capacity: positions in each row. If not given, `grow_cache`'s choice for the longest row.

    Raises:
        CacheError: if the file can't be read, is damaged, belongs to another model, or holds a row longer than
            `capacity`; or if the cache won't fit in memory.
    """
    file = Path(file)
    try:
        lengths = _checked_lengths(file, config)
    except CheckpointError as error:
        # A pointer of Git LFS in the file's place.
        raise CacheError(str(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CacheError(f"{file} can't be read as a cache ({reason}): name a file that save_cache wrote.") from None
    capacity = capacity_bucket(max(lengths)) if capacity is None else capacity
    if capacity < max(lengths):
        raise CacheError(
            f"capacity is {capacity} where {file} holds a row of {max(lengths)} tokens: give at least that."
        )
    empty = init_cache(config, len(lengths), capacity)
    ends = list(accumulate(lengths))

    def rows(array: mx.array) -> mx.array:
        parts = mx.split(array, ends[:-1], axis=1)
        return mx.stack([mx.pad(part, [(0, 0), (0, capacity - part.shape[1]), (0, 0)]) for part in parts])

    try:
        arrays = cast(dict[str, mx.array], mx.load(str(file), format="safetensors"))
        with mx.stream(reading_device()):
            keys, values = (
                tuple(rows(arrays.pop(f"{name}.{layer}")) for layer in range(config.n_layers))
                for name in ("keys", "values")
            )
        mx.eval(keys, values)
    except (RuntimeError, MemoryError) as error:
        raise CacheError(f"{file} can't be read as a cache ({error}): check the file, and the memory.") from None
    return replace(empty, lengths=lengths, keys=keys, values=values)


def _checked_lengths(file: Path, config: Config) -> tuple[int, ...]:
    """Each row's number of tokens, after a check of the entire header. No tensor is read.

    Raises:
        CacheError: if the cache has another config, or a later version wrote it.
        CheckpointError: if Git LFS has left a pointer in its place.
        OSError, ValueError: if the file can't be read, or isn't a cache's.
    """
    header = checked_header(file)
    version = header.texts.get("dbrx_fn_cache")
    if version is None:
        raise ValueError("its header doesn't say dbrx_fn_cache")
    if version != _VERSION:
        raise CacheError(
            f"{file} is a cache of version {shown(version)} where {_VERSION} is expected: save it again, or use"
            " the release that wrote it."
        )
    _check_config(file, header.texts.get("config", ""), config)
    lengths = _lengths(header.texts.get("lengths", ""))
    dtype, shape = DTYPE_CODES[config.dtype], (config.attn.kv_n_heads, sum(lengths), config.head_dim)
    expected = {f"{name}.{layer}" for name in ("keys", "values") for layer in range(config.n_layers)}
    if header.tensors.keys() != expected:
        raise ValueError(f"it has other tensors than the keys and values of {config.n_layers} layers")
    for name, tensor in sorted(header.tensors.items()):
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} is expected")
    return lengths


def _check_config(file: Path, text: str, config: Config) -> None:
    found, expected = parse_json(text.encode()), cache_fields(config)
    if not isinstance(found, dict):
        raise ValueError("its config is not a JSON object")
    problems = [
        f"{name} is {shown(found.get(name))} where the config has {value}"
        for name, value in expected.items()
        if name not in found or found[name] != value
    ]
    if problems:
        raise CacheError(f"{file} belongs to another model ({listed(problems)}): make the cache again with this one.")


def _lengths(text: str) -> tuple[int, ...]:
    lengths = parse_json(text.encode())
    if not isinstance(lengths, list) or not lengths or any(type(n) is not int or not 0 <= n < 2**31 for n in lengths):
        raise ValueError(f"its lengths are {shown(lengths)} where a list of whole numbers is expected")
    if _pads_too_much(lengths):
        raise ValueError(f"its {len(lengths)} rows hold {sum(lengths)} tokens in all, too few beside its longest row")
    return tuple(lengths)


def _pads_too_much(lengths: Sequence[int]) -> bool:
    return len(lengths) * capacity_bucket(max(lengths)) > _MOST_PADDING * max(sum(lengths), 64)


def cache_fields(config: Config) -> dict[str, object]:
    """The settings that a cache depends on, by their names in `config.json`."""
    attn, ffn = asdict(config.attn), asdict(config.ffn)
    for name in ("moe_jitter_eps", "moe_loss_weight"):
        del ffn[name]
    sizes = {name: getattr(config, name) for name in ("n_layers", "d_model", "n_heads", "vocab_size", "dtype")}
    sections = {"attn_config": attn, "ffn_config": ffn}
    return sizes | {f"{name}.{field}": value for name, fields in sections.items() for field, value in fields.items()}
