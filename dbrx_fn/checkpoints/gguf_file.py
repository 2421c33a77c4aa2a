"""GGUF files of DBRX: config from their metadata, and tensors as arrays in the tree's formats.

llama.cpp's converter writes DBRX under the names of
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py (`MODEL_ARCH.DBRX`).

Tensors are read one by one. Each quantized type that a format of MLX holds exactly becomes that format, and the others
become floats (`gguf_types`). MLX's own reader isn't used (MLX 0.32.4): it reads all tensors at once into twice the
file's size of memory, opens the file for writing, knows three quantized types, and converts bfloat16 to float16, which
has a smaller range.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.gguf_blocks import floats_of_blocks, leaf_of_blocks
from dbrx_fn.checkpoints.gguf_header import Contents, Entry
from dbrx_fn.checkpoints.gguf_parts import read_parts
from dbrx_fn.checkpoints.gguf_types import BlockType
from dbrx_fn.checkpoints.raw import Raw, raw
from dbrx_fn.checkpoints.safetensors_file import Tensor
from dbrx_fn.errors import CheckpointError, ConfigError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import listed
from dbrx_fn.runtime.cores import usable_cores

_LAYER_NORM_EPSILON = 1e-5
# What a core makes at once, in bytes. Smaller pieces wait for the interpreter lock, larger ones don't fit the caches
# (docs/checkpoints.md).
_PIECE = 2**20
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def gguf_headers(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every array that `read_gguf` returns. Only headers are read, of all parts of the file.

    A quantized tensor X.weight of a type with a format becomes its leaves: `X.weight` uint32 [... inner * bits / 32],
    and `X.scales` and `X.biases` [... inner / group_size]. Without a format it becomes float32.

    Raises:
        CheckpointError: if the file is missing or damaged, or holds a tensor that can't be read. It names the tensor.
    """
    return {name: tensor for entry in _read(file).entries for name, tensor in _arrays(entry).items()}


def gguf_config(file: Path) -> Config:
    """The config in a file's metadata.

    GGUF doesn't give the normalization of the chosen experts' weights or the activation. This config divides by their
    sum and uses silu, as llama.cpp's DBRX does. `clamp_kqv` 0 means no clamp, as in llama.cpp. `dtype` is that of most
    tensors. A quantized tensor counts as float16.

    Raises:
        CheckpointError: as in `gguf_headers`; or if the metadata isn't DBRX's, lacks a key, or describes another model.
    """
    contents = _read(file)
    metadata = contents.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "dbrx":
        raise CheckpointError(
            f"{file} has general.architecture {shown(architecture)}, not 'dbrx': only DBRX files can be loaded here."
        )
    embedding = next((entry.shape for entry in contents.entries if entry.name == "token_embd.weight"), ())
    needed = ["dbrx." + key for key in _KEYS]
    missing = [key for key in needed if key not in metadata]
    if missing:
        raise CheckpointError(f"{file} lacks the metadata {listed(missing)}: convert the model again.")
    if len(embedding) != 2:
        raise CheckpointError(f"{file} lacks token_embd.weight, a matrix of a row for each token: convert it again.")
    wrong = [
        f"{key} is {shown(metadata[key])}"
        for key in needed
        if not isinstance(metadata[key], int | float) or isinstance(metadata[key], bool)
    ]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {listed(wrong)} where each must be one number; copy it again.")
    try:
        return _config({key: float(cast(float, metadata["dbrx." + key])) for key in _KEYS}, contents, embedding[0])
    except ConfigError as error:
        raise CheckpointError(f"{file} describes a model that can't be loaded here: {error}") from None


def open_gguf(file: Path, floats: Dtype = "float32") -> "GgufArrays":
    """Every array of a file, as `gguf_headers` describes them. Each is read when it is asked for, and not kept.

    Args:
        file: the GGUF file.
        floats: the dtype of tensors that have no format. They are rounded to it piece by piece.

    Raises:
        CheckpointError: as in `gguf_headers`; or if a tensor's type needs the package `gguf`, which isn't installed.
    """
    entries = _read(file).entries
    needing = next((entry for entry in entries if entry.type.needs_package), None)
    if needing is not None and importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"{needing.file} has the tensor {needing.name!r} as {needing.type.name}, which the package gguf reads:"
            " pip install 'dbrx-fn[gguf]'."
        )
    return GgufArrays(entries, floats)


def read_gguf(file: Path) -> dict[str, mx.array]:
    """All arrays of `open_gguf`. They take memory of the file's size.

    Raises:
        CheckpointError: as in `open_gguf`.
    """
    return dict(open_gguf(file))


class GgufArrays(Mapping[str, mx.array]):
    """Arrays by their names, made by `open_gguf`."""

    def __init__(self, entries: tuple[Entry, ...], floats: Dtype) -> None:
        self._headers = {name: (entry, tensor) for entry in entries for name, tensor in _arrays(entry).items()}
        self._floats = floats

    def __len__(self) -> int:
        return len(self._headers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __getitem__(self, name: str) -> mx.array:
        entry, tensor = self._headers[name]
        bits, dtype = self._read(entry, name, 0, _blocks_in(entry.type, entry.shape))
        # MLX takes no axis of 2**31 entries or more, so the shape comes first.
        return mx.array(bits.reshape(tensor.shape)).view(dtype)

    def matrices(self, name: str) -> Iterator[Raw]:
        """Yields the bits of a stack's matrices `[expert outer inner]` one by one, as `gguf_headers` describes them."""
        entry, tensor = self._headers[name]
        count = _blocks_in(entry.type, entry.shape[1:])
        for expert in range(entry.shape[0]):
            bits, _ = self._read(entry, name, expert * count, count)
            yield bits.reshape(tensor.shape[1:])

    def _read(self, entry: Entry, name: str, first: int, count: int) -> tuple[Raw, mx.Dtype]:
        """The bits of an array's part that some of the tensor's blocks make, and their dtype."""
        kind = entry.type
        start = entry.start + first * kind.size
        blocks = np.memmap(entry.file, np.uint8, "r", start, (count, kind.size))
        if not kind.is_quantized:
            return blocks.reshape(-1).view(_BITS[kind.size]), getattr(mx, kind.dtype)
        if kind.form is None:
            dtype = getattr(mx, self._floats)
            # MLX starts a thread for each one that uses it and never ends it, so one core does this.
            made = _in_pieces(blocks, lambda piece: raw(mx.array(floats_of_blocks(piece, kind)).astype(dtype)), 1)
            return made, dtype
        leaf = "weight" if name == entry.name else name.rpartition(".")[2]
        made = _in_pieces(blocks, lambda piece: leaf_of_blocks(piece, kind, leaf), usable_cores())
        return made.view(_BITS[made.itemsize]), getattr(mx, self._headers[name][1].dtype)


def _in_pieces(blocks: NDArray[np.uint8], make: Callable[[NDArray[np.uint8]], Raw], cores: int) -> Raw:
    """What `make` makes of blocks, `[block item]`.

    Cores share the pieces, since NumPy releases the interpreter lock while it computes. Small pieces save memory.
    """
    # NumPy's functions are slower on its class of mapped files.
    blocks = np.asarray(blocks)
    one = make(blocks[:1])
    whole = np.empty((len(blocks), one.shape[1]), one.dtype)
    count = _PIECE // one.nbytes
    starts = range(0, len(blocks), count)
    left = iter(starts)

    def work() -> None:
        for start in left:
            whole[start : start + count] = make(blocks[start : start + count])

    threads = min(cores, len(starts))
    if threads == 1:
        work()
        return whole
    with ThreadPoolExecutor(threads) as pool:
        try:
            for worker in as_completed([pool.submit(work) for _ in range(threads)]):
                worker.result()
        finally:
            # After an error or Ctrl-C no thread takes another piece.
            for _ in left:
                pass
    return whole


def _blocks_in(kind: BlockType, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // kind.items


# Metadata under `dbrx.` that `DbrxModel` of llama.cpp's converter writes and llama.cpp's loader needs.
_KEYS = (
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "context_length",
    "rope.freq_base",
    "attention.clamp_kqv",
    "attention.layer_norm_epsilon",
    "expert_count",
    "expert_used_count",
)


def _config(values: Mapping[str, float], contents: Contents, vocab_size: int) -> Config:
    def whole(key: str) -> int:
        if not values[key].is_integer():
            raise ConfigError(f"dbrx.{key} is {values[key]:g} where it must be a whole number.")
        return int(values[key])

    infinite = [f"dbrx.{key}" for key, value in values.items() if not math.isfinite(value)]
    if infinite:
        raise ConfigError(f"{listed(infinite)} must be a finite number.")
    epsilon = values["attention.layer_norm_epsilon"]
    if not math.isclose(epsilon, _LAYER_NORM_EPSILON, rel_tol=1e-6):
        raise ConfigError(f"dbrx.attention.layer_norm_epsilon is {epsilon:g} where DBRX's is {_LAYER_NORM_EPSILON:g}.")
    clip = values["attention.clamp_kqv"]
    config = Config(
        d_model=whole("embedding_length"),
        n_heads=whole("attention.head_count"),
        n_layers=whole("block_count"),
        max_seq_len=whole("context_length"),
        vocab_size=vocab_size,
        attn=AttnConfig(
            clip_qkv=None if clip == 0 else clip,
            kv_n_heads=whole("attention.head_count_kv"),
            rope_theta=values["rope.freq_base"],
        ),
        ffn=FFNConfig(
            ffn_hidden_size=whole("feed_forward_length"),
            moe_num_experts=whole("expert_count"),
            moe_top_k=whole("expert_used_count"),
        ),
        dtype=_dtype(contents.entries),
    )
    _refuse_other_models(config, contents.metadata)
    return config


def _refuse_other_models(config: Config, metadata: Mapping[str, float | str | None]) -> None:
    """Refuses settings that llama.cpp would apply, but that no DBRX model has."""
    for key, only in {
        "rope.scaling.type": "none",
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }.items():
        value = metadata.get(f"dbrx.{key}", only)
        if value != only:
            raise ConfigError(f"dbrx.{key} is {shown(value)} where it must be {only!r}.")


def _dtype(entries: tuple[Entry, ...]) -> Dtype:
    return Counter("float16" if entry.type.is_quantized else entry.type.dtype for entry in entries).most_common(1)[0][0]


def _read(file: Path) -> Contents:
    """A file's contents. Raises `CheckpointError` if two of the resulting arrays would have one name."""
    contents = read_parts(file)
    counts = Counter(chain.from_iterable(_arrays(entry) for entry in contents.entries))
    twice = [f"{name!r} is there {count} times" for name, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(
            f"{file} is damaged or cut short: the tensor {listed(twice)}; copy it again from where it came."
        )
    return contents


def _arrays(entry: Entry) -> dict[str, Tensor]:
    file, form = entry.file, entry.type.form
    if form is None:
        return {entry.name: Tensor(file, entry.shape, entry.type.dtype)}
    if not entry.name.endswith(".weight"):
        raise CheckpointError(
            f"{file} has the tensor {entry.name!r} as {entry.type.name}, and only those named ….weight can be."
        )
    *outer, inner = entry.shape
    path = entry.name.removesuffix(".weight")
    affine = form.mode == "affine"
    grouped = Tensor(file, (*outer, inner // form.group_size), entry.type.dtype if affine else "uint8")
    leaves = {entry.name: Tensor(file, (*outer, inner * form.bits // 32), "uint32"), f"{path}.scales": grouped}
    return leaves | ({f"{path}.biases": grouped} if affine else {})
