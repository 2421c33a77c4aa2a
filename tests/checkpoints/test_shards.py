"""Safetensors files written matrix by matrix: planned in full before, and read by safetensors itself."""

import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.layouts import Source, Written, sources
from dbrx_fn.checkpoints.raw import Raw, in_order, mapped, of_raw, raw
from dbrx_fn.checkpoints.safetensors_file import INDEX
from dbrx_fn.checkpoints.shards import Matrices, Shard, ShardSum, index_content, plan_shards, sum_in, write_shard
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.ops.formats import Format
from tests.support.checkpoints import QUANTIZABLE

CONFIG = config_from_dict(QUANTIZABLE)
MIXED = Quantization(Format(3, 32), Format(4, 16, "nvfp4"), Format(4, 32, "mxfp4"), Format(8, 64), Format(5, 128))
DTYPES: list[Dtype] = ["float32", "bfloat16", "float16"]


def planned(
    layout: Written, dtype: Dtype, quantization: Quantization | None, shard_bytes: int
) -> tuple[Mapping[str, Source], tuple[Shard, ...]]:
    config: Config = replace(CONFIG, dtype=dtype)
    table = sources(config, layout, wanted_formats(config, quantization) if quantization else {})
    return table, plan_shards(table, dtype, shard_bytes=shard_bytes, metadata={"format": "mlx"})


def random_matrices(table: Mapping[str, Source], dtype: Dtype, leaves: dict[str, Raw]) -> Matrices:
    """Random bits, which are put into `leaves` too, whole."""
    rng = np.random.default_rng(0)

    def matrices(linear: str) -> Iterator[Mapping[str, Raw]]:
        paths = [path for path in table if path.rpartition(".")[0] == linear]
        for path in paths:
            leaf = table[path].leaf
            size = getattr(mx, leaf.dtype or dtype).size
            leaves[path] = rng.integers(0, 256, (*leaf.shape[:-1], leaf.shape[-1] * size), np.uint8).view(f"u{size}")
        count = table[paths[0]].leaf.shape[0] if table[paths[0]].leaf.is_expert else 1
        for n in range(count):
            yield {path: leaves[path][n] if table[path].leaf.is_expert else leaves[path] for path in paths}

    return matrices


def write_all(folder: Path, table: Mapping[str, Source], shards: tuple[Shard, ...], matrices: Matrices) -> None:
    for shard in shards:
        with (folder / shard.file).open("xb") as out:
            write_shard(out, shard, table, matrices, lambda *_: None)
    index = index_content(shards)
    if index is not None:
        (folder / INDEX).write_bytes(index)


def stored_tensors(table: Mapping[str, Source], leaves: Mapping[str, Raw]) -> dict[str, Raw]:
    """What must be in the files."""
    found: dict[str, Raw] = {}
    for path, source in table.items():
        for expert, stored in enumerate(source.stored):
            leaf = leaves[path][expert] if len(source.stored) > 1 else leaves[path]
            upright = leaf.swapaxes(-1, -2) if stored.rule.transposed else leaf
            found[stored.name] = upright.reshape(stored.shape)
    return found


@settings(max_examples=40)
@given(
    case=st.sampled_from([("split", None), ("split", MIXED), ("stacked", MIXED), ("stacked", None), ("fused", None)]),
    dtype=st.sampled_from(DTYPES),
    shard_bytes=st.integers(1, 3_000_000),
)
def test_shards_are_filled_without_gaps_and_linears_stay_together(
    case: tuple[Written, Quantization | None], dtype: Dtype, shard_bytes: int
) -> None:
    table, shards = planned(*(case[0], dtype, case[1], shard_bytes))
    shard_of = {name: shard.file for shard in shards for name in shard.starts}
    assert sorted(shard_of) == sorted(name for source in table.values() for name in source.names)
    assert len(shard_of) == sum(len(shard.starts) for shard in shards)
    for linear in {path.rpartition(".")[0] for path in table}:
        names = [name for path, one in table.items() if path.rpartition(".")[0] == linear for name in one.names]
        assert len({shard_of[name] for name in names}) == 1
    for shard in shards:
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        assert len(shard.header) % 8 == 0
        fields = json.loads(shard.header[8:])
        assert fields.pop("__metadata__") == {"format": "mlx"}
        end = 0
        for name, field in fields.items():
            start, stop = field["data_offsets"]
            assert start == end
            assert shard.starts[name] == len(shard.header) + start
            size = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4, "U8": 1}[field["dtype"]]
            assert shard.starts[name] % size == 0
            assert stop - start == size * int(np.prod(field["shape"]))
            end = stop
        assert shard.nbytes == len(shard.header) + end
        assert end <= shard_bytes or len(shard.linears) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_start_at_multiples_of_their_entries(dtype: Dtype) -> None:
    """Also where others have an odd number of bytes, as 41 rows of three 8-bit scales have."""
    config = replace(CONFIG, d_model=96, vocab_size=41, dtype=dtype)
    form = Format(4, 32, "mxfp4")
    table = sources(config, "split", wanted_formats(config, Quantization(form, None, form, form, Format(8, 32))))
    (shard,) = plan_shards(table, dtype, shard_bytes=10**9, metadata={})
    for source in table.values():
        size = getattr(mx, source.leaf.dtype or dtype).size
        assert all(shard.starts[name] % size == 0 for name in source.names)


@pytest.mark.parametrize("shard_bytes", [1, 300_000, 10**9])
@pytest.mark.parametrize(
    ("layout", "quantization"),
    [("split", None), ("split", MIXED), ("stacked", MIXED), ("fused", None), ("fused", replace(MIXED, experts=None))],
)
def test_safetensors_reads_what_was_written(
    layout: Written, quantization: Quantization | None, shard_bytes: int, tmp_path: Path
) -> None:
    table, shards = planned(layout, "float16", quantization, shard_bytes)
    leaves: dict[str, Raw] = {}
    write_all(tmp_path, table, shards, random_matrices(table, "float16", leaves))
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")} == {
        shard.file: shard.nbytes for shard in shards
    }
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard.file).items()}
    expected = stored_tensors(table, leaves)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].view(tensor.dtype), tensor)


def test_the_index_says_where_each_tensor_is(tmp_path: Path) -> None:
    table, shards = planned("split", "bfloat16", MIXED, 200_000)
    write_all(tmp_path, table, shards, random_matrices(table, "bfloat16", {}))
    assert [shard.file for shard in shards][:2] == [f"model-0000{n}-of-{len(shards):05}.safetensors" for n in (1, 2)]
    index: dict[str, Any] = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    total = 0
    for shard in shards:
        with safe_open(tmp_path / shard.file, framework="numpy") as opened:
            assert set(opened.keys()) == {name for name, file in index["weight_map"].items() if file == shard.file}
        total += shard.nbytes - len(shard.header)
    assert index["metadata"]["total_size"] == total


def test_one_file_has_no_index(tmp_path: Path) -> None:
    table, shards = planned("stacked", "bfloat16", None, 10**9)
    write_all(tmp_path, table, shards, random_matrices(table, "bfloat16", {}))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError("[read] Unable to read"), MemoryError("too much")])
def test_what_mlx_can_not_compute_is_told(error: Exception, tmp_path: Path) -> None:
    table, shards = planned("split", "float32", None, 10**9)

    def matrices(linear: str) -> Iterator[Mapping[str, Raw]]:
        raise error
        yield {}

    with pytest.raises(CheckpointError, match=f"can't be read or computed .*{str(error)[-8:]}"):
        write_shard(io.BytesIO(), shards[0], table, matrices, lambda *_: None)


@pytest.mark.parametrize("case", [("fused", None), ("stacked", MIXED), ("split", MIXED)])
def test_what_is_told_of_tensors_is_what_the_file_holds(
    case: tuple[Written, Quantization | None], tmp_path: Path
) -> None:
    """In the order of each one's bytes; so the sum of what was written is that of the file."""
    table, shards = planned(case[0], "float32", case[1], 10**9)
    told: dict[str, bytes] = dict.fromkeys(shards[0].starts, b"")
    found = ShardSum(shards[0])

    def written(name: str, bits: Raw) -> None:
        told[name] += bits.tobytes()
        found.add(name, bits)

    with (tmp_path / "file").open("xb") as out:
        write_shard(out, shards[0], table, random_matrices(table, "float32", {}), written)
    content = (tmp_path / "file").read_bytes()
    assert shards[0].header + b"".join(told.values()) == content
    with (tmp_path / "file").open("rb") as file:
        assert sum_in(file, shards[0]) == found.hexdigest()


@settings(max_examples=60)
@given(place=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans(), more=st.booleans())
def test_any_damage_changes_the_sum(place: float, bit: int, cut: bool, more: bool) -> None:
    table, shards = planned("stacked", "bfloat16", MIXED, 10**9)
    whole = io.BytesIO()
    with tempfile.TemporaryFile() as file:
        write_shard(file, shards[0], table, random_matrices(table, "bfloat16", {}), lambda *_: None)
        file.seek(0)
        whole.write(file.read())
        expected = sum_in(rewound(file), shards[0])
        assert expected is not None
        content = bytearray(whole.getvalue())
        at = int(place * (len(content) - 1))
        content[at] ^= 1 << bit
        damaged = bytes(content[:at]) if cut else bytes(content) + b"x" * more
        file.truncate(0)
        rewound(file).write(damaged)
        file.flush()
        assert sum_in(rewound(file), shards[0]) != expected


def rewound(file: Any) -> Any:
    file.seek(0)
    return file


# Bits


@given(rows=st.integers(0, 70), columns=st.integers(0, 70), size=st.sampled_from([1, 2, 4]), turned=st.booleans())
def test_entries_in_order(rows: int, columns: int, size: int, turned: bool) -> None:
    matrix = np.random.default_rng(0).integers(0, 200, (rows, columns)).astype(f"u{size}")
    given_ = np.asfortranarray(matrix) if turned else matrix
    ordered = in_order(given_)
    assert ordered.flags.c_contiguous
    np.testing.assert_array_equal(ordered, matrix)
    strided = in_order(np.repeat(matrix, 2, axis=1)[:, ::2])
    assert strided.flags.c_contiguous
    np.testing.assert_array_equal(strided, matrix)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8])
def test_bits_there_and_back(dtype: mx.Dtype) -> None:
    """Also of NaN with a payload, of both zeros, and where rows don't follow each other."""
    bits = mx.array(np.random.default_rng(0).integers(0, 256, (6, 16)).astype(np.uint8)).view(dtype)
    for array in (bits, bits[::2], bits.T, bits[:, 1:3]):
        again = of_raw(raw(array), dtype)
        assert again.dtype == dtype
        np.testing.assert_array_equal(raw(again), raw(array))
        assert raw(array).shape == array.shape
    np.testing.assert_array_equal(raw(of_raw(raw(bits).T, dtype)), raw(bits).T)


@pytest.mark.parametrize("start", range(5))
def test_mapped_bits(start: int, tmp_path: Path) -> None:
    """Wherever in the file they begin, and though it may not be written."""
    content = np.random.default_rng(0).integers(0, 256, 24 + start).astype(np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    bits = mapped(tmp_path / "file", start, (2, 3), mx.float32)
    assert bits.flags.aligned
    assert bits.tobytes() == content[start:].tobytes()
    np.testing.assert_array_equal(np.array(of_raw(bits, mx.float32).view(mx.uint32)), bits)
