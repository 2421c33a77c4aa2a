"""GGUF files of DBRX: config from their metadata, and tensors as arrays in the tree's formats.

llama.cpp's converter writes DBRX under the names of
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py (`MODEL_ARCH.DBRX`).

Tensors are read one by one, and become bit for bit what MLX's own reader makes of them
(https://github.com/ml-explore/mlx/blob/main/mlx/io/gguf_quants.cpp). That reader isn't used (MLX 0.32.4): it reads all
tensors at once into twice the file's size of memory, opens the file for writing, and converts bfloat16 to float16,
which has a smaller range.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.gguf_header import GROUP_SIZE, BlockType, Contents, Entry, read_contents
from dbrx_fn.checkpoints.safetensors_file import Tensor
from dbrx_fn.errors import CheckpointError, ConfigError
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import listed

_LAYER_NORM_EPSILON = 1e-5


def gguf_headers(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every array that `read_gguf` returns. Only the header is read.

    A quantized tensor X.weight becomes three arrays of MLX's affine mode in groups of 32: `X.weight` uint32
    [... inner * bits / 32], and `X.scales` and `X.biases` float16 [... inner / 32].

    Raises:
        CheckpointError: if the file is missing or damaged, or holds a tensor that can't be read. It names the tensor.
    """
    return {name: tensor for entry in _read(file).entries for name, tensor in _arrays(file, entry).items()}


def gguf_config(file: Path) -> Config:
    """The config in a file's metadata.

    GGUF doesn't give the normalization of the chosen experts' weights or the activation. This config divides by their
    sum and uses silu, as llama.cpp's DBRX does. `clamp_kqv` 0 means no clamp, as in llama.cpp. `dtype` is that of most
    tensors. A quantized tensor counts as float16, the dtype of its scales.

    Raises:
        CheckpointError: as in `gguf_headers`; or if the metadata isn't DBRX's, lacks a key, or describes another model.
    """
    contents = _read(file)
    metadata = contents.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "dbrx":
        raise CheckpointError(
            f"{file} has general.architecture {architecture!r}, not 'dbrx': only DBRX files can be loaded here."
        )
    embedding = next((entry.shape for entry in contents.entries if entry.name == "token_embd.weight"), ())
    needed = ["dbrx." + key for key in _KEYS]
    missing = [key for key in needed if key not in metadata]
    if missing:
        raise CheckpointError(f"{file} lacks the metadata {listed(missing)}: convert the model again.")
    if len(embedding) != 2:
        raise CheckpointError(f"{file} lacks token_embd.weight, a matrix of a row for each token: convert it again.")
    wrong = [
        f"{key} is {metadata[key]!r}"
        for key in needed
        if not isinstance(metadata[key], int | float) or isinstance(metadata[key], bool)
    ]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {listed(wrong)} where each must be one number; copy it again.")
    try:
        return _config({key: float(cast(float, metadata["dbrx." + key])) for key in _KEYS}, contents, embedding[0])
    except ConfigError as error:
        raise CheckpointError(f"{file} describes a model that can't be loaded here: {error}") from None


def open_gguf(file: Path) -> Mapping[str, mx.array]:
    """Every array of a file, as `gguf_headers` describes them. Each is read when it is asked for, and not kept.

    Raises:
        CheckpointError: as in `gguf_headers`.
    """
    return _Arrays(file, _read(file).entries)


def read_gguf(file: Path) -> dict[str, mx.array]:
    """All arrays of `open_gguf`. They take memory of the file's size.

    Raises:
        CheckpointError: as in `gguf_headers`.
    """
    return dict(open_gguf(file))


class _Arrays(Mapping[str, mx.array]):
    def __init__(self, file: Path, entries: tuple[Entry, ...]) -> None:
        self._file = file
        self._headers = {name: (entry, tensor) for entry in entries for name, tensor in _arrays(file, entry).items()}

    def __len__(self) -> int:
        return len(self._headers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __getitem__(self, name: str) -> mx.array:
        entry, tensor = self._headers[name]
        kind = entry.type
        size = math.prod(entry.shape) // kind.items * kind.size
        blocks = np.memmap(self._file, np.uint8, "r", entry.start, (size,))
        if kind.bits is None:
            stored = blocks.view(np.uint16 if kind.dtype == "bfloat16" else kind.dtype)
            array = mx.array(stored)
            return (array.view(mx.bfloat16) if kind.dtype == "bfloat16" else array).reshape(tensor.shape)
        leaf = "weight" if name == entry.name else name.rpartition(".")[2]
        return mx.array(_quantized(blocks.reshape(-1, kind.size), kind, leaf).reshape(tensor.shape))


def _quantized(blocks: NDArray[np.uint8], kind: BlockType, leaf: str) -> NDArray[np.uint32] | NDArray[np.float16]:
    """A leaf of MLX's affine format, `scale * q + bias`, from blocks `[block byte]`.

    A block is a float16 scale, in Q4_1 a float16 bias, and then its entries. In Q8_0 these are signed bytes. In the
    other types they are half bytes, the first sixteen in the lower halves and the others in the upper; in Q4_0 they
    have an offset of 8.
    """
    scales: NDArray[np.float16] = blocks[:, :2].copy().view(np.float16)
    if leaf == "scales":
        return scales
    if leaf == "biases":
        own: NDArray[np.float16] = blocks[:, 2:4].copy().view(np.float16)
        return own if kind.name == "Q4_1" else scales * np.float16(-128 if kind.bits == 8 else -8)
    entries: NDArray[np.uint8]
    if kind.bits == 8:
        entries = np.bitwise_xor(blocks[:, -GROUP_SIZE:], 0x80)
        return entries.view(np.uint32)
    halves = blocks[:, -GROUP_SIZE // 2 :]
    entries = np.concatenate([halves & 15, halves >> 4], axis=1)
    return (entries[:, ::2] | entries[:, 1::2] << 4).view(np.uint32)


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
            raise ConfigError(f"dbrx.{key} is {value!r} where it must be {only!r}.")


def _dtype(entries: tuple[Entry, ...]) -> Dtype:
    return Counter(entry.type.dtype for entry in entries).most_common(1)[0][0]


def _read(file: Path) -> Contents:
    """A file's contents. Raises `CheckpointError` if two of the resulting arrays would have one name."""
    contents = read_contents(file)
    counts = Counter(chain.from_iterable(_arrays(file, entry) for entry in contents.entries))
    twice = [f"{name!r} is there {count} times" for name, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(
            f"{file} is damaged or cut short: the tensor {listed(twice)}; copy it again from where it came."
        )
    return contents


def _arrays(file: Path, entry: Entry) -> dict[str, Tensor]:
    bits = entry.type.bits
    if bits is None:
        return {entry.name: Tensor(file, entry.shape, entry.type.dtype)}
    if not entry.name.endswith(".weight"):
        raise CheckpointError(
            f"{file} has the tensor {entry.name!r} as {entry.type.name}, and only those named ….weight can be."
        )
    *outer, inner = entry.shape
    path = entry.name.removesuffix(".weight")
    grouped = Tensor(file, (*outer, inner // GROUP_SIZE), "float16")
    return {
        entry.name: Tensor(file, (*outer, inner * bits // 32), "uint32"),
        f"{path}.scales": grouped,
        f"{path}.biases": grouped,
    }
