"""Every tensor type of GGUF is read: exactly into a format where there is one, and else into floats."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dbrx_fn.checkpoints import gguf_file
from dbrx_fn.checkpoints.checkpoint import LeafReader, open_checkpoint
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion
from dbrx_fn.checkpoints.gguf_blocks import floats_of_blocks, leaf_of_blocks
from dbrx_fn.checkpoints.gguf_file import gguf_config, gguf_headers, open_gguf
from dbrx_fn.checkpoints.gguf_types import TYPES, BlockType
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.checkpoints.raw import of_raw
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.quantization import dequantize
from dbrx_fn.ops.formats import dequantize_matrix
from tests.support import checkpoints
from tests.support.layouts_written import add_metadata, gguf_tensors

RAW: dict[str, Any] = checkpoints.QUANTIZABLE | {"d_model": 256, "n_layers": 1}
# The package `gguf` reads these, and so is the truth for them.
KNOWN = [kind for kind in GGMLQuantizationType if kind.value in TYPES and hasattr(quants, kind.name)]
QUANTIZED = [kind for kind in KNOWN if TYPES[kind].is_quantized]

pytestmark = pytest.mark.filterwarnings("ignore:The new checkpoint has no tokenizer")
every_quantized_type = pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of a tensor of this shape: any bytes are valid."""
    items, size = GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // items * size), dtype=np.uint8)


def written(folder: Path, kind: GGMLQuantizationType, *, most: int = 0) -> dict[str, NDArray[Any]]:
    """Writes a model whose matrices are all of a type, in parts of `most` tensors. Returns its tensors' values."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    writer = GGUFWriter(folder / "model.gguf", "dbrx", split_max_tensors=most)
    add_metadata(writer, RAW)
    values: dict[str, NDArray[Any]] = {}
    for name, tensor in gguf_tensors(RAW, checkpoints.random_tensors(RAW, rng)).items():
        if tensor.ndim == 1 or "ffn_gate_inp" in name:
            values[name] = tensor
            writer.add_tensor(name, tensor)
        else:
            blocks = random_blocks(kind, tensor.shape, rng)
            with np.errstate(all="ignore"):
                values[name] = quants.dequantize(blocks, kind).reshape(tensor.shape)
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether all finite numbers are equal. Scales of random bytes may be infinite."""
    finite = np.isfinite(found) & np.isfinite(expected)
    return bool(finite.mean() > 0.5 and np.array_equal(found[finite], expected[finite]))


def of_format(blocks: NDArray[np.uint8], kind: BlockType) -> NDArray[Any]:
    assert kind.form is not None
    leaves = [mx.array(leaf_of_blocks(blocks, kind, leaf)) for leaf in ("weight", "scales", "biases")]
    leaves = [leaf.astype(mx.float32) if leaf.dtype == mx.float16 else leaf for leaf in leaves]
    return np.array(dequantize_matrix(leaves if leaves[2].size else leaves[:2], kind.form, mx.float32))


@every_quantized_type
def test_any_blocks_have_the_values_that_the_gguf_package_gives_them(kind: GGMLQuantizationType) -> None:
    found = TYPES[kind]
    assert (found.name, (found.items, found.size)) == (kind.name, GGML_QUANT_SIZES[kind])
    blocks = random_blocks(kind, (200, found.items), np.random.default_rng(kind.value))
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, kind)
    assert same(floats_of_blocks(blocks, found) if found.form is None else of_format(blocks, found), expected)


@given(st.sampled_from(["Q4_0", "Q4_1", "Q4_K", "MXFP4"]), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_half_bytes_are_packed_as_if_each_were_moved_on_its_own(name: str, count: int, seed: int) -> None:
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    blocks = np.random.default_rng(seed).integers(0, 256, (count, kind.size), dtype=np.uint8)
    # The entries are a block's last bytes: the lower halves of each run, and then the upper ones.
    run = 32 if name == "Q4_K" else 16
    runs = blocks[:, -kind.items // 2 :].reshape(-1, run)
    entries = np.concatenate([runs & 15, runs >> 4], axis=1).reshape(count, -1, 8).astype(np.uint32)
    expected = (entries << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    assert np.array_equal(leaf_of_blocks(blocks, kind, "weight"), expected)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Lets this thread, and those that it starts, use so many cores."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < count:
        pytest.skip(f"this test needs {count} cores and a system that can tell them")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def soon(holds: Callable[[], bool]) -> bool:
    """Whether a condition holds within 20 s."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def large_tensor(file: Path, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Writes a tensor that becomes several pieces, the last of them smaller. Returns its blocks."""
    blocks = random_blocks(kind, (1100, 8192), np.random.default_rng(0))
    writer = GGUFWriter(file, "dbrx")
    writer.add_tensor("output.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks.reshape(-1, TYPES[kind].size)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q5_K", "Q6_K"])
def test_pieces_made_on_any_cores_are_the_whole(tmp_path: Path, name: str, cores: int) -> None:
    kind = GGMLQuantizationType[name]
    found, file = TYPES[kind], tmp_path / "a.gguf"
    blocks = large_tensor(file, kind)
    with on_cores(cores):
        arrays = dict(open_gguf(file))
    for path, array in arrays.items():
        leaf = "weight" if path == "output.weight" else path.rpartition(".")[2]
        expected = leaf_of_blocks(blocks, found, leaf) if found.form else floats_of_blocks(blocks, found)
        assert np.array(array).tobytes() == expected.tobytes(), path


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system doesn't list threads")
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_reading_leaves_no_threads(tmp_path: Path, name: str) -> None:
    large_tensor(tmp_path / "a.gguf", GGMLQuantizationType[name])
    arrays = open_gguf(tmp_path / "a.gguf", "float16")
    with on_cores(2):
        dict(arrays)
        before = len(os.listdir("/proc/self/task"))
        dict(arrays)
    # The system may list a thread for a moment after its end.
    assert soon(lambda: len(os.listdir("/proc/self/task")) <= before)


@pytest.mark.parametrize("stop", [MemoryError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_ends_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    large_tensor(tmp_path / "a.gguf", GGMLQuantizationType.Q8_0)
    arrays, calls, before = open_gguf(tmp_path / "a.gguf"), count(), threading.active_count()

    def fails(blocks: NDArray[np.uint8], kind: BlockType, leaf: str) -> NDArray[Any]:
        time.sleep(0.02)
        if next(calls) == 2:
            if stop is MemoryError:
                raise MemoryError("no room")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return leaf_of_blocks(blocks, kind, leaf)

    monkeypatch.setattr(gguf_file, "leaf_of_blocks", fails)
    with on_cores(2), pytest.raises(stop):
        arrays["output.weight"]
    # Ctrl-C may come while a thread starts: then nobody joins it, but it ends.
    assert soon(lambda: threading.active_count() == before)
    # There are nine pieces.
    assert next(calls) < 7


def test_the_newest_types_have_the_values_that_ggml_gives_them() -> None:
    """`dequantize_row_q1_0` and `dequantize_row_q2_0` of ggml's src/ggml-quants.c."""
    scale = np.array([0.75], np.float16)
    one = np.frombuffer(scale.tobytes() + bytes([0b00000110] + [0] * 15), np.uint8)[None]
    assert of_format(one, TYPES[41])[0].tolist() == [-0.75, 0.75, 0.75] + [-0.75] * 125
    two = np.frombuffer(scale.tobytes() + bytes([0b11100100] + [0] * 15), np.uint8)[None]
    assert of_format(two, TYPES[42])[0].tolist() == [-0.75, 0, 0.75, 1.5] + [-0.75] * 60


@every_quantized_type
def test_a_model_of_this_type_is_loaded_with_its_values(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    values = written(tmp_path, kind)
    file = tmp_path / "model.gguf"
    assert gguf_config(file).dtype == "float16"
    params, config = load(file, dtype="float32")
    leaves: dict[str, mx.array] = dict(tree_flatten(dequantize(params, config)))
    for path, source in open_checkpoint(file).sources.items():
        if path in leaves:
            assert same(np.array(leaves[path]), values[source.names[0]]), path


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K", "MXFP4", "Q6_K"])
def test_stacks_are_read_matrix_by_matrix(tmp_path: Path, name: str) -> None:
    written(tmp_path, GGMLQuantizationType[name])
    arrays = open_gguf(tmp_path / "model.gguf")
    for name, tensor in gguf_headers(tmp_path / "model.gguf").items():
        if "_exps." in name:
            whole, dtype = arrays[name], getattr(mx, tensor.dtype)
            matrices = mx.stack([of_raw(matrix, dtype) for matrix in arrays.matrices(name)])
            assert str(whole.dtype).endswith(tensor.dtype)
            assert mx.array_equal(whole, matrices, equal_nan=True)


def test_floats_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    values = written(tmp_path, GGMLQuantizationType.Q6_K)
    for dtype in ("float16", "bfloat16", "float32"):
        params, _ = load(tmp_path / "model.gguf", dtype=dtype)
        head = params["lm_head"]["weight"]
        expected = mx.array(values["output.weight"]).astype(getattr(mx, dtype))
        assert mx.array_equal(head, expected, equal_nan=True)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="GPUs compute in what is stored")
def test_a_cpu_computes_in_float32_although_norms_have_another_dtype(tmp_path: Path) -> None:
    written(tmp_path, GGMLQuantizationType.Q4_0)
    assert computing_dtype(tmp_path / "model.gguf") == "float32"


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K", "IQ2_XS"])
def test_a_conversion_writes_the_values(tmp_path: Path, name: str) -> None:
    values = written(tmp_path, GGMLQuantizationType[name])
    source = open_checkpoint(tmp_path / "model.gguf")
    convert(plan_conversion(source, Request("stacked", dtype="float32")), tmp_path / "new")
    params, config = load(tmp_path / "new")
    leaves: dict[str, mx.array] = dict(tree_flatten(dequantize(params, config)))
    for path, origin in source.sources.items():
        if path in leaves:
            assert same(np.array(leaves[path]), values[origin.names[0]]), path


def test_without_the_package_a_type_that_needs_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a", GGMLQuantizationType.Q6_K)
    written(tmp_path / "b", GGMLQuantizationType.Q5_K)
    monkeypatch.setitem(sys.modules, "gguf", None)
    file = tmp_path / "a" / "model.gguf"
    with pytest.raises(
        CheckpointError,
        match=rf"^{file} has the tensor 'token_embd\.weight' as Q6_K, which the package gguf reads: pip install"
        r" 'dbrx-fn\[gguf\]'\.$",
    ):
        load(file)
    # Headers can be described all the same, and the other types are read without it.
    assert open_checkpoint(file).problems == ()
    load(tmp_path / "b" / "model.gguf")


def parts(folder: Path) -> list[Path]:
    written(folder, GGMLQuantizationType.Q8_0, most=4)
    return sorted(folder.glob("*.gguf"))


def test_a_file_in_parts_is_read_as_if_it_were_whole(tmp_path: Path) -> None:
    first, *others = parts(tmp_path / "parts")
    assert first.name == "model-00001-of-00003.gguf"
    assert len(others) == 2
    written(tmp_path / "whole", GGMLQuantizationType.Q8_0)
    whole = tmp_path / "whole" / "model.gguf"
    assert gguf_config(first) == gguf_config(whole)
    assert {tensor.file for tensor in gguf_headers(first).values()} == {first, *others}
    found, expected = (dict(tree_flatten(load(file)[0])) for file in (first, whole))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[path], expected[path], equal_nan=True) for path in found)


def damaged_parts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files in parts that can't be read, each with a part of the error."""
    first, second, third = parts(folder / "another")
    yield second, "is one of 3 parts: name the first of them, model-00001-of-00003.gguf."
    third.unlink()
    yield first, "is one of 3 parts, and model-00003-of-00003.gguf isn't beside it: copy all parts there."
    third.write_bytes(second.read_bytes())
    yield first, "model-00003-of-00003.gguf says that it is part 1 of 3 where part 2 of 3 is expected"
    third.write_bytes(second.read_bytes()[:100])
    yield first, "model-00003-of-00003.gguf is damaged or cut short"
    first, second, third = parts(folder / "renamed")
    first = first.rename(first.with_name("model.gguf"))
    yield first, "is one of 3 parts, which must be named like model-00001-of-00003.gguf"
    first, second, third = parts(folder / "of another model")
    content = first.read_bytes()
    place = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
    first.write_bytes(content[:place] + b"\x14" + content[place + 1 :])
    yield first, "hold 11 tensors where it says 20"


def test_parts_that_disagree_are_refused(tmp_path: Path) -> None:
    for file, expected in damaged_parts(tmp_path):
        for read in (gguf_headers, gguf_config, load):
            with pytest.raises(CheckpointError) as caught:
                read(file)
            assert expected in str(caught.value)


def test_leaves_can_be_read_in_any_dtype(tmp_path: Path) -> None:
    written(tmp_path, GGMLQuantizationType.Q3_K)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    path = "transformer.blocks.0.ffn.experts.mlp.w2.weight"
    for dtype in ("float16", "float32"):
        (matrices,) = [list(LeafReader(checkpoint).matrices(path, dtype))]
        whole = LeafReader(checkpoint, dtype).read(path)
        stacked = mx.stack([of_raw(matrix, getattr(mx, dtype)) for matrix in matrices])
        assert mx.array_equal(whole.astype(getattr(mx, dtype)), stacked, equal_nan=True)
