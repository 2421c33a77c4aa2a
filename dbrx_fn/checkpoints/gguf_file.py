"""GGUF files of DBRX: what tensors lie in one, the config in its metadata, and the tensors themselves.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's converter writes DBRX into it under
the names of https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py (`MODEL_ARCH.DBRX`).

Tensors become bit for bit what MLX's own reader makes of them, one by one
(https://github.com/ml-explore/mlx/blob/main/mlx/io/gguf_quants.cpp). That reader isn't used (MLX 0.32.4): it takes all
at once and twice a file's size of memory, ends the process where a damaged file's counts or offsets are wrong or a
number has 64 bits, opens the file for writing, and makes float16 of bfloat16, which hasn't its range.
"""

import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.safetensors_file import Tensor
from dbrx_fn.errors import CheckpointError, ConfigError
from dbrx_fn.files.json_file import POINTER, refuse_pointer
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import listed

GROUP_SIZE = 32
"""Weights that share a scale and a bias in every quantized type that is read."""

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_LAYER_NORM_EPSILON = 1e-5
# llama.cpp's own limits are these two and four dimensions.
_LONGEST_KEY = 2**16 - 1
_LONGEST_TENSOR_NAME = 64
_MOST_DIMENSIONS = 4
# Far above what any file holds, and far below what would cost noticeable time or memory.
_LONGEST_STRING = 2**26
_MOST_KEYS = 2**16
_MOST_TENSORS = 2**17
_MOST_ARRAY_ITEMS = 2**22
_LONGEST_STRING_KEPT = 2**10
# MLX counts the elements of an axis in 32-bit integers.
_INT32 = 2**31

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Metadata's number types, as `struct` knows them.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class _Type:
    """A tensor type that is read: a row is blocks of `items` entries, of `size` bytes each.

    `dtype`: of the entries, or of a quantized type's scales.
    `bits`: of a quantized type's entries.
    """

    name: str
    items: int
    size: int
    dtype: Dtype
    bits: int | None = None


_TYPES = {
    0: _Type("F32", 1, 4, "float32"),
    1: _Type("F16", 1, 2, "float16"),
    30: _Type("BF16", 1, 2, "bfloat16"),
    2: _Type("Q4_0", GROUP_SIZE, 18, "float16", bits=4),
    3: _Type("Q4_1", GROUP_SIZE, 20, "float16", bits=4),
    8: _Type("Q8_0", GROUP_SIZE, 34, "float16", bits=8),
}
_READ = ", ".join(kind.name for kind in _TYPES.values())
# https://github.com/ggml-org/ggml/blob/master/include/ggml.h, `enum ggml_type`.
_REFUSED = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """One tensor as the file has it: `shape` with the innermost axis last, `start` in bytes from the file's."""

    name: str
    type: _Type
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Contents:
    """Metadata's numbers and short strings (`None` stands for anything else), and the tensors in the file's order."""

    metadata: Mapping[str, float | str | None]
    entries: tuple[_Entry, ...]


def gguf_headers(file: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every array that `read_gguf` returns, without reading any.

    A quantized tensor X.weight is three: `X.weight` uint32 [... inner * bits / 32], and `X.scales` and `X.biases`
    float16 [... inner / 32], MLX's affine mode in groups of 32.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds what can't be read; it names the tensor.
    """
    return {name: tensor for entry in _read(file).entries for name, tensor in _arrays(file, entry).items()}


def gguf_config(file: Path) -> Config:
    """The config in a file's metadata.

    GGUF doesn't say how the chosen experts' weights are normalized or what the activation is: llama.cpp's DBRX divides
    by their sum and takes silu, and so does this config. `clamp_kqv` 0 means no clamp, as there. `dtype` is that of
    most tensors, and a quantized one counts as float16, which its scales are.

    Raises:
        CheckpointError: as `gguf_headers`; or if the metadata isn't DBRX's, lacks a key, or describes another model.
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
    """Every array of a file, named and shaped as `gguf_headers` says; each is read when it is asked for, and not kept.

    Raises:
        CheckpointError: as `gguf_headers`.
    """
    return _Arrays(file, _read(file).entries)


def read_gguf(file: Path) -> dict[str, mx.array]:
    """All of `open_gguf`'s arrays: memory of the file's size.

    Raises:
        CheckpointError: as `gguf_headers`.
    """
    return dict(open_gguf(file))


class _Arrays(Mapping[str, mx.array]):
    def __init__(self, file: Path, entries: tuple[_Entry, ...]) -> None:
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


def _quantized(blocks: NDArray[np.uint8], kind: _Type, leaf: str) -> NDArray[np.uint32] | NDArray[np.float16]:
    """A leaf of MLX's affine format, `scale * q + bias`, from blocks `[block byte]`.

    A block is a float16 scale, in Q4_1 a float16 bias, and its entries: bytes around 0 in Q8_0; otherwise half bytes,
    the first sixteen in the lower halves and the others in the upper, and in Q4_0 around 8.
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


# Metadata under `dbrx.`, as `DbrxModel` of llama.cpp's converter writes it and its loader needs it.
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


def _config(values: Mapping[str, float], contents: _Contents, vocab_size: int) -> Config:
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
    """Refuses what a converter may write of any model, and llama.cpp would honour, but no DBRX was made with."""
    for key, only in {
        "rope.scaling.type": "none",
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }.items():
        value = metadata.get(f"dbrx.{key}", only)
        if value != only:
            raise ConfigError(f"dbrx.{key} is {value!r} where it must be {only!r}.")


def _dtype(entries: tuple[_Entry, ...]) -> Dtype:
    return Counter(entry.type.dtype for entry in entries).most_common(1)[0][0]


def _arrays(file: Path, entry: _Entry) -> dict[str, Tensor]:
    bits = entry.type.bits
    if bits is None:
        return {entry.name: Tensor(file, entry.shape, entry.type.dtype)}
    *outer, inner = entry.shape
    path = entry.name.removesuffix(".weight")
    grouped = Tensor(file, (*outer, inner // GROUP_SIZE), "float16")
    return {
        entry.name: Tensor(file, (*outer, inner * bits // 32), "uint32"),
        f"{path}.scales": grouped,
        f"{path}.biases": grouped,
    }


def _read(file: Path) -> _Contents:
    """Reads and checks everything before the tensors' data, and that the data is all there."""
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} isn't a file: name the .gguf file itself.")
    try:
        with file.open("rb") as opened:
            return _Reader(file, opened).contents()
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from None


class _Reader:
    """Reads a file's header in order. Nothing is read, skipped or kept before it is known to lie inside the file."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self._file = file
        self._opened = opened
        self._size = os.fstat(opened.fileno()).st_size
        self._at = 0
        self._array_items = 0

    def contents(self) -> _Contents:
        tensors, keys = self._counts()
        metadata = dict(self._key_value() for _ in range(keys))
        if len(metadata) < keys:
            raise self._damaged("a metadata key is there twice")
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise self._refused(f"is one of {parts} parts of a file: join them with llama-gguf-split --merge")
        alignment = self._alignment(metadata)
        if not tensors:
            raise self._refused("holds no tensors: name the file with the model's weights")
        infos = [self._tensor_info() for _ in range(tensors)]
        entries = self._placed(infos, alignment)
        counts = Counter(chain.from_iterable(_arrays(self._file, entry) for entry in entries))
        twice = [f"{name!r} is there {count} times" for name, count in counts.items() if count > 1]
        if twice:
            raise self._damaged(f"the tensor {listed(twice)}")
        return _Contents(metadata, entries)

    def _counts(self) -> tuple[int, int]:
        magic = self._opened.read(len(POINTER))
        refuse_pointer(self._file, magic)
        self._opened.seek(0)
        if self._size < 4 or self._take(4, "magic") != b"GGUF":
            raise self._refused("isn't a GGUF file, which begins with the letters GGUF")
        version = self._integer("<I", "version")
        if version and version % 2**16 == 0:
            raise self._refused("is big-endian: convert it with gguf-convert-endian, of the package gguf")
        if version not in _VERSIONS:
            raise self._refused(f"is GGUF of version {version}, and only 2 and 3 are read: convert the model again")
        tensors, keys = self._integer("<Q", "count of tensors"), self._integer("<Q", "count of metadata")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self._damaged(f"it claims {tensors} tensors and {keys} metadata")
        return tensors, keys

    def _key_value(self) -> tuple[str, float | str | None]:
        key = self._text(_LONGEST_KEY, "metadata's key")
        return key, self._value(self._integer("<I", f"type of {key!r}"), f"metadata {key!r}")

    def _value(self, kind: int, what: str) -> float | str | None:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], what, is_bool=kind == _BOOL)
        if kind == _STRING:
            return self._short(self._string(_LONGEST_STRING, what))
        if kind != _ARRAY:
            raise self._damaged(f"{what} is of type {kind}, which GGUF doesn't have")
        self._skip_array(self._integer("<I", what), self._integer("<Q", what), what)
        return None

    def _skip_array(self, kind: int, count: int, what: str) -> None:
        self._array_items += count
        if self._array_items > _MOST_ARRAY_ITEMS:
            raise self._damaged(f"{what} claims {count} items")
        if kind in _NUMBERS:
            self._take(count * struct.calcsize(_NUMBERS[kind]), what)
        elif kind == _STRING:
            for _ in range(count):
                self._string(_LONGEST_STRING, what)
        else:
            raise self._refused(f"has {what} as an array of type {kind}, which isn't read: convert the model again")

    def _alignment(self, metadata: Mapping[str, float | str | None]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value < 8 or value.bit_count() != 1:
            raise self._damaged(f"general.alignment is {value!r} where it must be a power of 2, at least 8")
        return value

    def _tensor_info(self) -> tuple[str, _Type, tuple[int, ...], int]:
        """Name, type, shape and place in the data section."""
        name = self._text(_LONGEST_TENSOR_NAME, "tensor's name")
        what = f"tensor {name!r}"
        dimensions = self._integer("<I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"the {what} has {dimensions} dimensions")
        # The file lists the innermost first.
        shape = tuple(self._integer("<Q", what) for _ in range(dimensions))[::-1]
        if not all(0 < size < _INT32 for size in shape):
            raise self._damaged(f"the {what} has the shape {shape}")
        number = self._integer("<I", what)
        if number not in _TYPES:
            kind = _REFUSED.get(number, f"of the unknown type {number}")
            raise self._refused(f"has the {what} as {kind}, and only {_READ} are read: quantize to one of these")
        self._check_quantized(name, _TYPES[number], shape)
        return name, _TYPES[number], shape, self._integer("<Q", what)

    def _check_quantized(self, name: str, kind: _Type, shape: tuple[int, ...]) -> None:
        if shape[-1] % kind.items:
            raise self._damaged(f"the tensor {name!r} is {kind.name} with rows of {shape[-1]}, not of whole blocks")
        if kind.bits is None:
            return
        if not name.endswith(".weight"):
            raise self._refused(f"has the tensor {name!r} as {kind.name}, and only those named ….weight can be")

    def _placed(self, infos: list[tuple[str, _Type, tuple[int, ...], int]], alignment: int) -> tuple[_Entry, ...]:
        """The tensors with their places, which must follow each other as llama.cpp requires: no gap, no overlap."""
        data = _aligned(self._at, alignment)
        end = 0
        entries = []
        for name, kind, shape, offset in infos:
            due = _aligned(end, alignment)
            if offset != due:
                raise self._damaged(f"the tensor {name!r} lies at offset {offset} where it must be at {due}")
            entries.append(_Entry(name, kind, shape, data + offset))
            end = offset + math.prod(shape) // kind.items * kind.size
        if data + end > self._size:
            raise self._damaged(f"its tensors need {data + end} bytes and it has {self._size}")
        return tuple(entries)

    def _number(self, code: str, what: str, *, is_bool: bool) -> float:
        value: float = struct.unpack(code, self._take(struct.calcsize(code), what))[0]
        if is_bool and value > 1:
            raise self._damaged(f"{what} is {value} where it must be true or false")
        return bool(value) if is_bool else value

    def _integer(self, code: str, what: str) -> int:
        return int(self._number(code, what, is_bool=False))

    def _text(self, longest: int, what: str) -> str:
        try:
            return self._string(longest, what).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a {what} isn't UTF-8") from None

    def _short(self, string: bytes) -> str | None:
        return string.decode(errors="replace") if len(string) <= _LONGEST_STRING_KEPT else None

    def _string(self, longest: int, what: str) -> bytes:
        length = self._integer("<Q", what)
        if length > longest:
            raise self._damaged(f"the length of {what} is {length}")
        return self._take(length, what)

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"{what} runs past its end, at {self._size} bytes")
        self._at += count
        return self._opened.read(count)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is damaged or cut short: {what}; copy it again from where it came.")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file} {what}.")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
