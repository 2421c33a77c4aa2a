"""GGUF files as llama.cpp's own package writes them, and files that are damaged, lie, or hold what can't be read."""

import os
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.gguf_file import gguf_config, gguf_headers, read_gguf
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Dtype
from tests.support import checkpoints
from tests.support.layouts_written import GGUF_TYPES, GgufType, write_gguf

RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 96,
    "vocab_size": 24,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3, "moe_top_k": 2},
}
TENSORS = checkpoints.random_tensors(RAW, np.random.default_rng(0))
DTYPES: dict[GgufType, Dtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
METADATA: dict[str, float] = {
    "dbrx.block_count": 2,
    "dbrx.embedding_length": 64,
    "dbrx.attention.head_count": 4,
    "dbrx.attention.head_count_kv": 2,
    "dbrx.feed_forward_length": 96,
    "dbrx.context_length": 96,
    "dbrx.rope.freq_base": 500000.0,
    "dbrx.attention.clamp_kqv": 2.0,
    "dbrx.attention.layer_norm_epsilon": 1e-5,
    "dbrx.expert_count": 3,
    "dbrx.expert_used_count": 2,
}
EMBEDDING = {"token_embd.weight": np.zeros((24, 64), np.float32)}
HUGE = 2**62

every_type = pytest.mark.parametrize("quantization", GGUF_TYPES)


def written(folder: Path, quantization: GgufType = "q8_0") -> Path:
    file = folder / f"{quantization}.gguf"
    write_gguf(file, RAW, TENSORS, quantization=quantization)
    return file


def one_tensor(
    file: Path, data: NDArray[Any], kind: GGMLQuantizationType | None = None, endian: GGUFEndian = GGUFEndian.LITTLE
) -> Path:
    writer = GGUFWriter(file, "dbrx", endianess=endian)
    writer.add_tensor("a.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def replaced(file: Path, old: bytes, new: bytes) -> Path:
    content = file.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new))
    return file


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def with_value(file: Path, key: str, code: str, value: float) -> Path:
    """Overwrites a metadata's number, which lies behind its key and its type."""
    content = bytearray(file.read_bytes())
    struct.pack_into(code, content, content.index(string(key)) + 8 + len(key) + 4, value)
    file.write_bytes(content)
    return file


def with_tensor_field(file: Path, tensor: str, field: int, code: str, *values: int) -> Path:
    """Overwrites what lies `field` bytes behind a tensor's name: count of axes, axes, type, offset."""
    content = bytearray(file.read_bytes())
    struct.pack_into(code, content, content.index(string(tensor)) + 8 + len(tensor) + field, *values)
    file.write_bytes(content)
    return file


def with_metadata(
    file: Path, changes: Mapping[str, object], *, tensors: Mapping[str, NDArray[Any]] = EMBEDDING
) -> Path:
    """A file of `METADATA` with `changes`: another value, one with its type, or `None` for no such key."""
    writer = GGUFWriter(file, "dbrx")
    for key, value in {**METADATA, **changes}.items():
        kind, number = value if isinstance(value, tuple) else (None, value)
        if number is not None:
            writer.add_key_value(key, number, kind or GGUFValueType.get_type(number))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def header_size(file: Path) -> int:
    return int(GGUFReader(file).data_offset)


def same_as_headers(file: Path) -> bool:
    tensors, arrays = gguf_headers(file), read_gguf(file)
    return {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (array.shape, str(array.dtype).removeprefix("mlx.core.")) for name, array in arrays.items()
    }


def refusal(read: Callable[[Path], object], file: Path) -> str:
    """The sentence that a file is refused with; none if it is read."""
    try:
        read(file)
    except CheckpointError as error:
        return str(error)
    return ""


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@every_type
def test_the_header_alone_says_what_is_read(tmp_path: Path, quantization: GgufType) -> None:
    file = written(tmp_path, quantization)
    assert same_as_headers(file)
    assert list(gguf_headers(file)) == list(read_gguf(file))
    assert {tensor.file for tensor in gguf_headers(file).values()} == {file}


@every_type
def test_values_are_bitwise_those_of_the_gguf_package(tmp_path: Path, quantization: GgufType) -> None:
    file = written(tmp_path, quantization)
    arrays = read_gguf(file)
    kinds = set()
    for tensor in GGUFReader(file).tensors:
        kinds.add(tensor.tensor_type)
        expected = quants.dequantize(tensor.data, tensor.tensor_type)
        weight, path = arrays.pop(tensor.name), tensor.name.removesuffix(".weight")
        if weight.dtype == mx.uint32:
            scales, biases = (arrays.pop(f"{path}.{leaf}").astype(mx.float32) for leaf in ("scales", "biases"))
            bits = 8 if tensor.tensor_type == GGMLQuantizationType.Q8_0 else 4
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
        assert np.array_equal(np.array(weight.astype(mx.float32)), expected), tensor.name
        assert tensor.tensor_type == GGMLQuantizationType.F32 or expected.ndim > 1
    assert not arrays
    assert kinds == {GGMLQuantizationType.F32, GGMLQuantizationType[quantization.upper()]}


@every_type
def test_the_metadata_gives_the_config_that_was_converted(tmp_path: Path, quantization: GgufType) -> None:
    config = replace(config_from_dict(RAW), dtype=DTYPES.get(quantization, "float16"))
    assert gguf_config(written(tmp_path, quantization)) == config


@pytest.mark.parametrize("seed", range(8))
def test_every_random_config_comes_back(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = checkpoints.random_config(rng)
    raw["ffn_config"] |= {"moe_normalize_expert_weights": 1, "moe_jitter_eps": None, "moe_loss_weight": 0.01}
    write_gguf(tmp_path / "a.gguf", raw, checkpoints.random_tensors(raw, rng), quantization="f32")
    assert gguf_config(tmp_path / "a.gguf") == replace(config_from_dict(raw), dtype="float32")


def test_bfloat16_keeps_its_range_and_its_smallest_numbers(tmp_path: Path) -> None:
    values = np.array([[1e38, -1e-38, 3.140625, 0.0, -0.0, 1e-30]], np.float32)
    kind = GGMLQuantizationType.BF16
    stored = quants.quantize(values, kind)
    read = read_gguf(one_tensor(tmp_path / "a.gguf", stored, kind))["a.weight"]
    assert read.dtype == mx.bfloat16
    assert np.array_equal(np.array(read.astype(mx.float32)), quants.dequantize(stored, kind))


def test_version_2_is_read_as_version_3_is(tmp_path: Path) -> None:
    file = written(tmp_path)
    config = gguf_config(file)
    content = bytearray(file.read_bytes())
    content[4] = 2
    file.write_bytes(content)
    assert gguf_config(file) == config
    assert same_as_headers(file)


def test_another_alignment_is_honoured(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "dbrx")
    writer.add_custom_alignment(256)
    data = {name: np.full((3, 5), i, np.float32) for i, name in enumerate(("a.weight", "b.weight"))}
    for name, tensor in data.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays = read_gguf(tmp_path / "a.gguf")
    assert {name: array.tolist() for name, array in arrays.items()} == {n: t.tolist() for n, t in data.items()}


@pytest.mark.parametrize("number", [0, 3, 4, 48, 2**31 - 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, number: int) -> None:
    file = with_metadata(tmp_path / "a.gguf", {"general.alignment": (GGUFValueType.UINT32, number)})
    with pytest.raises(CheckpointError, match=rf"a\.gguf .* general\.alignment is {number} "):
        read_gguf(file)


@pytest.mark.parametrize("kind", [GGMLQuantizationType[name] for name in ("I32", "F64", "Q8_1")], ids=lambda k: k.name)
def test_other_types_are_refused_by_name(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    file = with_tensor_field(written(tmp_path), "blk.1.ffn_down_exps.weight", 4 + 3 * 8, "<I", kind)
    expected = (
        rf"^{file} has the tensor 'blk\.1\.ffn_down_exps\.weight' as {kind.name}, and only F32, F16, BF16, Q4_0, .* are"
        r" read: quantize to one of these\.$"
    )
    for read in (gguf_headers, gguf_config, read_gguf):
        with pytest.raises(CheckpointError, match=expected):
            read(file)


def test_a_type_that_nobody_knows_is_refused_by_number(tmp_path: Path) -> None:
    file = with_tensor_field(written(tmp_path), "output.weight", 4 + 2 * 8, "<I", 77)
    with pytest.raises(CheckpointError, match=r"'output\.weight' as of the unknown type 77"):
        gguf_headers(file)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    file = one_tensor(tmp_path / "a.gguf", np.zeros((2, 3), np.float32), endian=GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=rf"^{file} is big-endian: convert it with gguf-convert-endian"):
        read_gguf(file)


def test_a_64_bit_float_in_the_metadata_is_read(tmp_path: Path) -> None:
    """MLX's reader loses its place behind one, and ends the process."""
    file = with_metadata(tmp_path / "a.gguf", {"dbrx.some": (GGUFValueType.FLOAT64, 1.5)})
    assert gguf_config(file).n_layers >= 1
    assert read_gguf(file).keys() == gguf_headers(file).keys()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    file = replaced(written(tmp_path), string("dbrx"), string("grok"))
    with pytest.raises(CheckpointError, match=rf"^{file} has general\.architecture 'grok', not 'dbrx'"):
        gguf_config(file)


@pytest.mark.parametrize("key", METADATA)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    file = with_metadata(tmp_path / "a.gguf", {key: None})
    with pytest.raises(CheckpointError, match=rf"^{file} lacks the metadata {key}: convert the model again\.$"):
        gguf_config(file)


def test_a_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.gguf", {}, tensors={})
    with pytest.raises(CheckpointError, match=rf"^{file} holds no tensors"):
        gguf_config(file)
    file = with_metadata(tmp_path / "b.gguf", {}, tensors={"output.weight": np.zeros((24, 64), np.float32)})
    with pytest.raises(CheckpointError, match=rf"^{file} lacks token_embd\.weight"):
        gguf_config(file)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dbrx.attention.layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06 where DBRX's is 1e-05"),
        ("dbrx.rope.freq_base", float("nan"), "dbrx.rope.freq_base must be a finite number"),
        ("dbrx.rope.freq_base", "500000", "dbrx.rope.freq_base is '500000' where each must be one number"),
        ("dbrx.attention.clamp_kqv", -1.0, "clip_qkv is -1.0 where it must be a positive number"),
        ("dbrx.attention.head_count", 5, "n_heads is 5 where it must be a divisor of d_model, 64"),
        ("dbrx.attention.head_count_kv", [2, 2], "head_count_kv is None where each must be one number"),
        ("dbrx.expert_used_count", 9, "moe_top_k is 9 where it must be at most moe_num_experts, which is 3"),
        ("dbrx.expert_count", 2.5, "dbrx.expert_count is 2.5 where it must be a whole number"),
        ("dbrx.block_count", True, "dbrx.block_count is True where each must be one number"),
        ("dbrx.block_count", 2**31 - 1, "n_layers is 2147483647 where it must be at most"),
        ("dbrx.rope.scaling.type", "yarn", "dbrx.rope.scaling.type is 'yarn' where it must be 'none'"),
        ("dbrx.rope.dimension_count", 8, "dbrx.rope.dimension_count is 8 where it must be 16"),
        ("dbrx.attention.key_length", 32, "dbrx.attention.key_length is 32 where it must be 16"),
    ],
)
def test_metadata_of_another_model_is_refused(tmp_path: Path, key: str, value: object, expected: str) -> None:
    file = with_metadata(tmp_path / "a.gguf", {key: value})
    error = refusal(gguf_config, file)
    assert error.startswith(str(file))
    assert expected in error


def test_metadata_that_says_what_is_so_anyway_is_accepted(tmp_path: Path) -> None:
    said = {"dbrx.rope.scaling.type": "none", "dbrx.rope.dimension_count": 16, "dbrx.attention.value_length": 16}
    file = with_metadata(tmp_path / "a.gguf", said)
    assert gguf_config(file) == gguf_config(with_metadata(tmp_path / "b.gguf", {}))


def test_a_long_text_in_the_metadata_does_no_harm(tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.gguf", {"tokenizer.chat_template": "{{ x }}" * 10_000, "general.tags": ["a"]})
    assert gguf_config(file).n_layers == 2
    assert same_as_headers(file)


def test_no_clamp_is_a_clamp_of_0(tmp_path: Path) -> None:
    file = with_value(written(tmp_path), "dbrx.attention.clamp_kqv", "<f", 0.0)
    assert gguf_config(file).attn.clip_qkv is None


def test_what_is_no_gguf_file_says_so(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 a pickle", bytes(64)):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.gguf isn't a GGUF file"):
            read_gguf(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"b\.gguf can't be read: No such file"):
        read_gguf(tmp_path / "b.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(CheckpointError, match="isn't a file"):
            read_gguf(path)


TENSOR = "blk.0.attn_qkv.weight"
LIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tensors": (lambda file: replaced_at(file, 8, HUGE), f"it claims {HUGE} tensors"),
    "one more tensor": (lambda file: replaced_at(file, 8, 20), ""),
    "metadata": (lambda file: replaced_at(file, 16, HUGE), f"and {HUGE} metadata"),
    "one more metadata": (lambda file: replaced_at(file, 16, 16), ""),
    "one metadata less": (lambda file: replaced_at(file, 16, 14), ""),
    "length of a key": (
        lambda file: replaced(file, string("dbrx.block_count"), struct.pack("<Q16s", HUGE, b"dbrx")),
        f"the length of metadata's key is {HUGE}",
    ),
    "length of a string": (
        lambda file: replaced(file, string("dbrx"), struct.pack("<Q4s", HUGE, b"dbrx")),
        f"the length of metadata 'general.architecture' is {HUGE}",
    ),
    "length of a token": (
        lambda file: replaced(file, string("token3"), struct.pack("<Q6s", 2**26, b"token3")),
        "metadata 'tokenizer.ggml.tokens' runs past its end",
    ),
    "tokens": (lambda file: with_value(file, "tokenizer.ggml.tokens", "<4xQ", HUGE), f"claims {HUGE} items"),
    "token types": (lambda file: with_value(file, "tokenizer.ggml.token_type", "<4xQ", HUGE), f"claims {HUGE} items"),
    "an array of arrays": (lambda file: with_value(file, "tokenizer.ggml.tokens", "<I", 9), "as an array of type 9"),
    "a type of an array": (lambda file: with_value(file, "tokenizer.ggml.tokens", "<I", 99), "as an array of type 99"),
    "length of a tensor's name": (
        lambda file: replaced(file, string("output.weight"), struct.pack("<Q13s", HUGE, b"output.weight")),
        f"the length of tensor's name is {HUGE}",
    ),
    "no axes": (lambda file: with_tensor_field(file, TENSOR, 0, "<I", 0), f"{TENSOR!r} has 0 dimensions"),
    "axes": (lambda file: with_tensor_field(file, TENSOR, 0, "<I", 2**32 - 1), f"has {2**32 - 1} dimensions"),
    "an empty axis": (lambda file: with_tensor_field(file, TENSOR, 4, "<Q", 0), f"{TENSOR!r} has the shape (128, 0)"),
    "an axis": (lambda file: with_tensor_field(file, TENSOR, 4, "<Q", HUGE), f"has the shape (128, {HUGE})"),
    "an axis of half a block": (lambda file: with_tensor_field(file, TENSOR, 4, "<Q", 48), "with rows of 48"),
    "axes whose product is 0 in 64 bits": (lambda file: with_tensor_field(file, TENSOR, 4, "<Q", 2**63), "the shape"),
    "a shorter axis": (lambda file: with_tensor_field(file, TENSOR, 4, "<Q", 32), "lies at offset"),
    "an offset past the end": (lambda file: with_tensor_field(file, TENSOR, 24, "<Q", HUGE), f"lies at offset {HUGE}"),
    "an offset that overflows": (lambda file: with_tensor_field(file, TENSOR, 24, "<Q", 2**64 - 32), "lies at offset"),
    "an offset on another tensor": (lambda file: with_tensor_field(file, TENSOR, 24, "<Q", 0), "lies at offset 0 "),
    "an offset that isn't aligned": (lambda file: with_tensor_field(file, TENSOR, 24, "<Q", 4), "lies at offset 4 "),
    "another type": (lambda file: with_tensor_field(file, TENSOR, 20, "<I", 2), "lies at offset"),
    "two of a name": (
        lambda file: replaced(file, string("blk.1.attn_qkv.weight"), string(TENSOR)),
        f"'{TENSOR}' is there 2 times",
    ),
    "no UTF-8": (lambda file: replaced(file, b"blk.1.attn_norm.weight", b"blk.1.attn_norm.weigh\xff"), "isn't UTF-8"),
    "a quantized tensor that is no weight": (
        lambda file: replaced(file, string("blk.1.attn_qkv.weight"), string("blk.1.attn_qkv.scales")),
        "only those named ….weight can be",
    ),
}


def replaced_at(file: Path, place: int, number: int) -> Path:
    content = bytearray(file.read_bytes())
    struct.pack_into("<Q", content, place, number)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_header_is_found_before_it_costs_memory(tmp_path: Path, lie: str) -> None:
    damage, expected = LIES[lie]
    file = damage(written(tmp_path))
    with little_memory():
        error = refusal(gguf_headers, file)
        assert refusal(gguf_config, file) == refusal(read_gguf, file) == error
    assert error.startswith(str(file))
    assert expected in error


def test_two_metadata_of_a_key_are_refused(tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.gguf", {"dbrx.expert_counX": 3})
    assert refusal(gguf_config, file) == ""
    error = refusal(gguf_config, replaced(file, string("dbrx.expert_counX"), string("dbrx.expert_count")))
    assert "a metadata key is there twice" in error


def test_long_keys_are_not_all_kept(tmp_path: Path) -> None:
    keys = [string(f"{number:065535}") + struct.pack("<IB", 0, 1) for number in range(300)]
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))
    assert "its metadata's keys have more than 16777216 characters" in refusal(gguf_headers, tmp_path / "a.gguf")


def test_an_error_shows_only_the_beginning_of_a_long_key(tmp_path: Path) -> None:
    key = string("k" * 65535) + struct.pack("<I", 99)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    assert re.search(r"metadata 'k{50,90}…'? is of type 99, which", refusal(gguf_headers, tmp_path / "a.gguf"))


def test_a_truth_that_is_neither_is_refused(tmp_path: Path) -> None:
    file = with_value(with_metadata(tmp_path / "a.gguf", {"dbrx.some": True}), "dbrx.some", "<B", 2)
    assert "metadata 'dbrx.some' is 2 where it must be true or false" in refusal(gguf_config, file)


def test_a_file_cut_short_anywhere_says_so(tmp_path: Path) -> None:
    file = written(tmp_path)
    content, header = file.read_bytes(), header_size(file)
    last = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
    for size in [*range(0, header, 8), *range(header, last, 4096), last - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf (is damaged or cut short: .*|isn't a GGUF file.*)\.$"):
            read_gguf(tmp_path / "cut.gguf")


def test_flipped_bytes_end_in_an_error_or_in_what_the_header_says(tmp_path: Path) -> None:
    file = written(tmp_path, "q4_0")
    content, header, rng = file.read_bytes(), header_size(file), np.random.default_rng(0)
    flips = [(place, int(rng.integers(1, 256))) for place in range(0, header, 3)]
    refused = 0
    for place, flip in flips:
        damaged = bytearray(content)
        damaged[place] ^= flip
        file.write_bytes(damaged)
        if error := refusal(gguf_headers, file):
            refused += 1
            assert error.startswith(str(file))
            assert refusal(read_gguf, file) == refusal(gguf_config, file) == error
        else:
            assert same_as_headers(file)
            assert not (error := refusal(gguf_config, file)) or error.startswith(str(file))
    assert refused > len(flips) / 4


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 3))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes, tensors: int, keys: int) -> None:
    file = tmp_path_factory.getbasetemp() / "noise.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + noise)
    with pytest.raises(CheckpointError):
        read_gguf(file)
