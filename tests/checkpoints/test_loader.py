"""Checkpoint folders: every form that is read gives the same model, and every way of being wrong says so."""

import json
import os
import re
import resource
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.layouts import LAYOUTS, Layout, sources
from dbrx_fn.checkpoints.loader import computing_dtype, load, load_tokenizer
from dbrx_fn.errors import CheckpointError, ConfigError, TokenizerError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import DBRX, Config, Dtype
from dbrx_fn.model.params import check_params, param_count, param_spec
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from tests.support import checkpoints, oracle

RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 12,
    "n_heads": 3,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 20,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 5, "moe_num_experts": 3, "moe_top_k": 2},
}
TENSORS = checkpoints.random_tensors(RAW, np.random.default_rng(0))
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
INDEX = "model.safetensors.index.json"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
ROUTER = "transformer.blocks.1.ffn.router.layer.weight"
W1 = "transformer.blocks.0.ffn.experts.mlp.w1"

Writer = Callable[..., None]
both_layouts = pytest.mark.parametrize("write", [checkpoints.write_fused, checkpoints.write_split])


def logits(params: Params, config: Config) -> NDArray[np.float32]:
    """In float32 and without a cache, whatever the model's dtype."""
    out, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return np.array(out[0].astype(mx.float32))


def leaves(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def assert_same(params: Params, other: Params) -> None:
    found, expected = leaves(params), leaves(other)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        assert mx.array_equal(leaf, expected[path]), path


def refused(folder: Path | str, *words: str, **options: Any) -> str:
    """Loading must fail with one sentence that has these words, and leave the folder as it was."""
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    for word in words:
        assert word in text
    assert snapshot(folder) == before
    return text


def snapshot(folder: Path | str) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).rglob("*")}


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "dbrx", RAW, TENSORS)
    return tmp_path / "dbrx"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "dbrx", RAW, TENSORS, shards=3)
    return tmp_path / "dbrx"


def write_tensors(folder: Path, tensors: Mapping[str, mx.array], file: str = "model.safetensors") -> None:
    mx.save_safetensors(str(folder / file), dict(tensors), {"format": "pt"})


def as_arrays(tensors: Mapping[str, NDArray[Any]]) -> dict[str, mx.array]:
    return {name: mx.array(tensor) for name, tensor in tensors.items()}


# What is read


@both_layouts
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_logits_are_the_oracles(write: Writer, shards: int, tmp_path: Path) -> None:
    write(tmp_path, RAW, TENSORS, shards=shards)
    params, config = load(tmp_path)
    check_params(params, config)
    expected = oracle.forward(RAW, TENSORS, TOKENS)
    np.testing.assert_allclose(logits(params, config), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_forms_give_the_same_tree(dtype: Dtype, tmp_path: Path) -> None:
    """To the last bit, so that the oracle's word on one form holds for all."""
    expected = checkpoints.rounded(TENSORS, dtype)
    trees = []
    for number, (write, shards) in enumerate(
        (write, shards) for write in (checkpoints.write_fused, checkpoints.write_split) for shards in (1, 2, 3, 4, 5)
    ):
        folder = tmp_path / str(number)
        write(folder, RAW, TENSORS, shards=shards, dtype=dtype)
        params, config = load(folder)
        assert config.dtype == dtype
        trees.append(params)
    for params in trees[1:]:
        assert_same(params, trees[0])
    found = leaves(trees[0])
    for path, leaf in found.items():
        assert leaf.dtype == getattr(mx, dtype)
        name = path.removesuffix(".weight") if ".experts." in path else path
        tensor = expected[name]
        if ".experts." in path:
            tensor = tensor.reshape(3, 5, 12)
            tensor = tensor.swapaxes(1, 2) if ".w2." in path else tensor
        assert np.array_equal(np.array(leaf.astype(mx.float32)), tensor), path


@both_layouts
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_dtype_converts(write: Writer, lazy: bool, stored: Dtype, asked: Dtype, tmp_path: Path) -> None:
    write(tmp_path, RAW, TENSORS, dtype=stored)
    params, config = load(tmp_path, dtype=asked, lazy=lazy)
    assert config.dtype == asked
    check_params(params, config)
    wte = np.array(leaves(params)["transformer.wte.weight"].astype(mx.float32))
    twice = checkpoints.rounded(checkpoints.rounded(TENSORS, stored), asked)
    assert np.array_equal(wte, twice["transformer.wte.weight"])


@pytest.mark.parametrize("said", [{"torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": None}])
def test_the_tensors_dtype_counts_not_the_configs(said: dict[str, Any], fused: Path) -> None:
    (fused / "config.json").write_text(json.dumps(RAW | said))
    params, config = load(fused)
    assert config.dtype == "float32"
    check_params(params, config)


def test_shards_without_an_index(sharded: Path, tmp_path: Path) -> None:
    expected, _ = load(sharded)
    (sharded / INDEX).unlink()
    params, _ = load(sharded)
    assert_same(params, expected)


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    expected, _ = load(sharded)
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    params, _ = load(sharded)
    assert_same(params, expected)


def test_path_as_text(fused: Path) -> None:
    assert_same(load(str(fused))[0], load(fused)[0])


def test_progress_ends_at_the_total(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    params, _ = load(sharded, progress=lambda done, total: calls.append((done, total)))
    total = sum(leaf.nbytes for leaf in leaves(params).values())
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert len(done) > 10


LARGE = RAW | {"d_model": 600, "vocab_size": 10_000}
"""The embedding alone is 24 MB, far more than what else comes and goes while a test runs."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "large", LARGE, checkpoints.random_tensors(LARGE, np.random.default_rng(0)))
    return tmp_path / "large"


def test_lazy_reads_nothing_before_use(large: Path) -> None:
    mx.synchronize()
    before = mx.get_active_memory()
    calls: list[int] = []
    params, _ = load(large, lazy=True, progress=lambda done, total: calls.append(done))
    assert mx.get_active_memory() - before < 2**20
    assert calls == []
    norm = params["transformer"]["norm_f"]["weight"]
    mx.eval(norm)
    assert norm.shape == (600,)
    assert mx.get_active_memory() - before < 2**20
    mx.eval(params["transformer"]["wte"])
    assert mx.get_active_memory() - before >= 24_000_000


def test_all_is_read_unless_lazy(large: Path) -> None:
    """The files may go once `load` has returned."""
    mx.synchronize()
    before = mx.get_active_memory()
    params, config = load(large)
    assert mx.get_active_memory() - before >= 24_000_000
    for file in large.iterdir():
        os.truncate(file, 0)
    check_params(params, config)
    assert mx.isfinite(params["lm_head"]["weight"]).all()


@both_layouts
def test_reading_holds_no_tensor_twice(write: Writer, tmp_path: Path) -> None:
    raw = LARGE | {"ffn_config": {"ffn_hidden_size": 3000, "moe_num_experts": 4, "moe_top_k": 2}}
    write(tmp_path, raw, checkpoints.random_tensors(raw, np.random.default_rng(0), np.float32), dtype="float16")
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    params, _ = load(tmp_path)
    sizes = [leaf.nbytes for leaf in leaves(params).values()]
    # The leaf that is being put together, its tensors, and what stays of them.
    assert mx.get_peak_memory() - before < sum(sizes) + 2 * max(sizes) + 2**20


# What is not


def test_everything_that_is_wrong_is_told_together(fused: Path) -> None:
    arrays = as_arrays(TENSORS)
    del arrays["lm_head.weight"], arrays[f"{W1[:-2]}v1"]
    arrays["transformer.wpe.weight"] = mx.zeros((64, 12))
    arrays[W1] = mx.zeros((14, 12))
    arrays[ROUTER] = arrays[ROUTER].astype(mx.float16)
    arrays["transformer.norm_f.weight"] = mx.zeros(11, mx.int32)
    write_tensors(fused, arrays)
    refused(
        fused,
        f"{fused}: 7 of the weights don't fit config.json",
        "lm_head.weight [20, 12] is missing",
        "transformer.blocks.0.ffn.experts.mlp.v1 [15, 12] is missing",
        "transformer.wpe.weight [64, 12] in model.safetensors is unexpected",
        f"{W1} is [14, 12] where [15, 12] is expected",
        f"{ROUTER} is float16 where float32 is expected",
        "transformer.norm_f.weight is [11] where [12] is expected",
        "transformer.norm_f.weight is I32 where one of float32, bfloat16, float16 is expected",
    )


def test_misfits_of_the_split_layout_are_named_as_in_the_file(tmp_path: Path) -> None:
    tensors = checkpoints.split_tensors(RAW, TENSORS)
    name = "transformer.blocks.1.ffn.experts.2.w2.weight"
    write_tensors(tmp_path, as_arrays(tensors | {name: tensors[name].T}))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    refused(tmp_path, f"{name} is [5, 12] where [12, 5] is expected")


def test_many_problems_are_counted(fused: Path) -> None:
    write_tensors(fused, as_arrays({W1: TENSORS[W1]}) | {f"x{n}": mx.zeros(1) for n in range(100)})
    text = refused(fused, "118 of the weights don't fit", "and 78 more")
    assert len(text) < 6000


def test_integer_weights(fused: Path) -> None:
    write_tensors(fused, {name: array.astype(mx.int32) for name, array in as_arrays(TENSORS).items()})
    for dtype in (None, "float32"):
        refused(fused, "19 of the weights", f"{W1} is I32 where one of float32, bfloat16, float16", dtype=dtype)


def test_mixed_dtypes(fused: Path) -> None:
    arrays = as_arrays(TENSORS)
    write_tensors(fused, {name: a if name == ROUTER else a.astype(mx.bfloat16) for name, a in arrays.items()})
    refused(fused, f"1 of the weights don't fit config.json: {ROUTER} is float32 where bfloat16 is expected")
    params, config = load(fused, dtype="bfloat16")
    check_params(params, config)


def test_float64_is_refused_whatever_is_asked_for(fused: Path) -> None:
    write_raw(fused / "model.safetensors", {name: ("F64", tensor.shape) for name, tensor in TENSORS.items()}, 8)
    for dtype in (None, "float32"):
        refused(fused, f"{W1} is F64 where one of float32, bfloat16, float16 is expected", dtype=dtype)


def write_raw(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], itemsize: int) -> None:
    """A safetensors file of holes, which takes no room on disk: a truthful header and a size."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    write_header(path, header, end)


def write_header(path: Path, header: Mapping[str, Any], end: int) -> None:
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    os.truncate(path, 8 + len(content) + end)


def full_size(folder: Path) -> Config:
    """The released model's files, 245 GiB of holes, with more layers where a machine has room for that."""
    config = DBRX
    while 2 * param_count(config) < MEMORY:
        config = replace(config, n_layers=2 * config.n_layers)
    raw = {
        "model_type": "dbrx",
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    stored = [source.stored[0] for source in sources(config, "fused").values()]
    tensors = {tensor.name: ("BF16", tensor.shape) for tensor in stored}
    write_raw(folder / "model.safetensors", tensors, 2)
    return config


def test_more_than_the_memory_holds(tmp_path: Path) -> None:
    folder = tmp_path / "dbrx"
    size = 2 * param_count(full_size(folder))
    assert (folder / "model.safetensors").stat().st_size > size >= 245 * 2**30
    before, resident = mx.get_active_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mx.reset_peak_memory()
    has = f"and this machine has {MEMORY / 2**30:.1f} GiB"
    refused(folder, f"needs {size / 2**30:.1f} GiB in bfloat16 {has}")
    refused(folder, f"needs {2 * size / 2**30:.1f} GiB in float32 {has}", dtype="float32")
    params, config = load(folder, lazy=True)
    check_params(params, config)
    assert config.dtype == "bfloat16"
    assert mx.get_peak_memory() - before < 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 2**18


def test_full_size_that_does_not_fit_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "dbrx"
    layers = full_size(folder).n_layers
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": layers + 1}))
    refused(folder, "8 of the weights", f"transformer.blocks.{layers}.ffn.experts.mlp.w1 [172032, 6144] is missing")


# Layouts


def test_mixed_layouts(fused: Path) -> None:
    split = checkpoints.split_tensors(RAW, TENSORS)
    write_tensors(fused, as_arrays(TENSORS | {name: split[name] for name in split if ".blocks.1." in name}))
    refused(fused, "mix layouts", "experts.mlp.v1", "experts.0.v1.weight")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("ffn.experts.{e}.{w}.weight", "ffn.experts.{e}.{w}.qweight"),
        ("ffn.experts.{e}.{w}.weight", "block_sparse_moe.experts.{e}.{w}.weight"),
        ("ffn.experts.mlp.{w}", "ffn.experts.gate_up_proj_{w}"),
    ],
)
def test_unknown_layouts_are_told_from_known_ones(pattern: str, name: str, tmp_path: Path) -> None:
    """The first is as GPTQ names them, the second Mixtral's, the third nobody's."""
    tensors = checkpoints.split_tensors(RAW, TENSORS) if "{e}" in pattern else TENSORS
    expression = re.escape(pattern).replace(r"\{e\}", r"(?P<e>\d+)").replace(r"\{w\}", "(?P<w>[wv][12])") + "$"
    replacement = name.replace("{e}", r"\g<e>").replace("{w}", r"\g<w>")
    write_tensors(tmp_path, as_arrays({re.sub(expression, replacement, n): t for n, t in tensors.items()}))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    example = name.format(e=0, w="v1")
    refused(tmp_path, "No known layout", example, "ffn.experts.mlp.w1", "ffn.experts.0.w1.weight")


def test_file_without_tensors(fused: Path) -> None:
    write_raw(fused / "model.safetensors", {}, 4)
    refused(fused, "none at all")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_leaf_is_its_matrices(layout: Layout) -> None:
    """Read at once or one by one."""
    config = config_from_dict(RAW)
    for path, source in sources(config, layout).items():
        tensors = {stored.name: mx.random.normal(stored.shape) for stored in source.stored}
        leaf = source.join(list(tensors.values()))
        assert leaf.shape == param_spec(config)[path].shape
        matrices = list(source.matrices({name: np.array(tensor) for name, tensor in tensors.items()}.__getitem__))
        np.testing.assert_array_equal(np.stack(matrices) if source.leaf.is_expert else matrices[0], np.array(leaf))


# Quantized weights

WIDE: dict[str, Any] = RAW | {
    "d_model": 64,
    "n_heads": 4,
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3, "moe_top_k": 2},
}
WIDE_TENSORS = checkpoints.random_tensors(WIDE, np.random.default_rng(0))
EXPERT = "transformer.blocks.1.ffn.experts.2.w2"


def group_and_bits(linear: str) -> tuple[int, int] | None:
    """Something else for each kind of linear; the embedding and the first block's router stay dense."""
    sizes = {"w1": (64, 4), "v1": (32, 2), "w2": (32, 8), "Wqkv": (64, 3), "out_proj": (32, 5), "lm_head": (64, 6)}
    sizes["layer"] = (32, 8)
    dense = linear == "transformer.blocks.0.ffn.router.layer"
    return None if dense else sizes.get(linear.rpartition(".")[2])


def quantized_tensors(dtype: Dtype = "float32") -> dict[str, mx.array]:
    """As mlx-lm would write them, one linear at a time."""
    tensors: dict[str, mx.array] = {}
    for name, tensor in checkpoints.split_tensors(WIDE, WIDE_TENSORS).items():
        linear, array = name.removesuffix(".weight"), mx.array(np.ascontiguousarray(tensor)).astype(getattr(mx, dtype))
        how = group_and_bits(linear)
        if how is None:
            tensors[name] = array
        else:
            parts = mx.quantize(array, group_size=how[0], bits=how[1])
            tensors |= zip((f"{linear}.{leaf}" for leaf in ("weight", "scales", "biases")), parts, strict=True)
    return tensors


def dequantized(tensors: Mapping[str, mx.array]) -> dict[str, NDArray[np.float32]]:
    """The fused float32 tensors that quantized ones stand for."""
    dense: dict[str, NDArray[np.float32]] = {}
    for name, tensor in checkpoints.split_tensors(WIDE, WIDE_TENSORS).items():
        linear, weight = name.removesuffix(".weight"), tensors[name]
        how = group_and_bits(linear)
        if how is not None:
            scales, biases = (tensors[f"{linear}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, biases, group_size=how[0], bits=how[1])
        dense[name] = np.array(weight.astype(mx.float32)).reshape(tensor.shape)
    fused: dict[str, NDArray[np.float32]] = {}
    for name in WIDE_TENSORS:
        if ".experts." in name:
            parts = [dense[name.replace(".mlp.", f".{e}.") + ".weight"] for e in range(3)]
            fused[name] = np.concatenate([part.T if name.endswith(".w2") else part for part in parts])
        else:
            fused[name] = dense[name]
    return fused


def write_quantized(folder: Path, tensors: Mapping[str, mx.array], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WIDE | {"quantization": {"group_size": 64, "bits": 4}}))
    names = sorted(tensors)
    for n in range(shards):
        write_tensors(folder, {name: tensors[name] for name in names[n::shards]}, f"model-{n}.safetensors")
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_of_quantized_weights_are_the_oracles(shards: int, tmp_path: Path) -> None:
    tensors = quantized_tensors()
    params, config = load(write_quantized(tmp_path / "dbrx", tensors, shards))
    check_params(params, config)
    expected = oracle.forward(WIDE, dequantized(tensors), TOKENS)
    np.testing.assert_allclose(logits(params, config), expected, atol=1e-5 * np.abs(expected).max())


def test_quantized_leaves_are_the_files_tensors(tmp_path: Path) -> None:
    tensors = quantized_tensors("bfloat16")
    params, config = load(write_quantized(tmp_path / "dbrx", tensors))
    assert config.dtype == "bfloat16"
    found = leaves(params)
    for path, leaf in found.items():
        names = [path.replace(".mlp.", f".{e}.") for e in range(3)] if ".experts." in path else [path]
        expected = mx.stack([tensors.pop(name) for name in names]) if len(names) > 1 else tensors.pop(path)
        assert leaf.dtype == expected.dtype, path
        assert mx.array_equal(leaf, expected), path
    assert tensors == {}
    w1 = found["transformer.blocks.0.ffn.experts.mlp.w1.weight"]
    assert (w1.dtype, w1.shape) == (mx.uint32, (3, 96, 8))
    assert list(params["lm_head"]) == ["weight", "scales", "biases"]


@pytest.mark.parametrize("lazy", [False, True])
def test_dtype_converts_scales_and_biases_of_quantized_weights(lazy: bool, tmp_path: Path) -> None:
    tensors = quantized_tensors("float16")
    params, config = load(write_quantized(tmp_path / "dbrx", tensors), dtype="float32", lazy=lazy)
    assert config.dtype == "float32"
    check_params(params, config)
    assert mx.array_equal(params["lm_head"]["weight"], tensors["lm_head.weight"])
    assert mx.array_equal(params["lm_head"]["scales"], tensors["lm_head.scales"].astype(mx.float32))


def test_one_float_dtype_is_expected_of_scales_too(tmp_path: Path) -> None:
    tensors = quantized_tensors("float16")
    tensors["lm_head.biases"] = tensors["lm_head.biases"].astype(mx.float32)
    folder = write_quantized(tmp_path / "dbrx", tensors)
    refused(folder, "1 of the weights", "lm_head.biases is float32 where float16 is expected, as most are")
    load(folder, dtype="float16")


def test_progress_of_quantized_weights_counts_their_bytes(tmp_path: Path) -> None:
    tensors = quantized_tensors()
    calls: list[tuple[int, int]] = []
    load(write_quantized(tmp_path / "dbrx", tensors), progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total)
    assert total < 0.5 * sum(tensor.nbytes for tensor in WIDE_TENSORS.values())


def test_more_quantized_weights_than_the_memory_holds(tmp_path: Path) -> None:
    """4 bits in groups of 64, with 16-bit scales and biases: 4.5 bits a weight."""
    config = full_size(tmp_path / "dense")
    while 4.5 / 8 * param_count(config) < MEMORY:
        config = replace(config, n_layers=2 * config.n_layers)
    folder = tmp_path / "dbrx"
    folder.mkdir()
    raw = json.loads((tmp_path / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"n_layers": config.n_layers}))
    formats = {path: Format(4, 64) for path, leaf in param_spec(config).items() if not leaf.is_norm}
    header: dict[str, Any] = {}
    end = 0
    for source in sources(config, "split", formats).values():
        for stored in source.stored:
            start, end = end, end + (2 if source.leaf.dtype is None else 4) * int(np.prod(stored.shape))
            dtype = "BF16" if source.leaf.dtype is None else "U32"
            header[stored.name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
    write_header(folder / "model.safetensors", header, end)
    assert end < 0.29 * 2 * param_count(config)
    refused(folder, f"needs {end / 2**30:.1f} GiB in bfloat16 and this machine has")
    params, config = load(folder, lazy=True)
    check_params(params, config)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({f"{EXPERT}.scales": None}, [f"{EXPERT}.scales [64, 3] is missing"]),
        ({f"{EXPERT}.biases": None}, [f"{EXPERT}.biases [64, 3] is missing"]),
        ({f"{EXPERT}.weight": None}, [f"{EXPERT}.weight [64, 24] is missing"]),
        ({"lm_head.scales": None}, ["lm_head.scales is missing, which a quantized linear has"]),
        ({"lm_head.biases": None}, ["lm_head.biases [20, 1] is missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight is missing, which a quantized linear has"]),
        ({"lm_head.weight": (20, 13)}, ["lm_head.weight has 13 columns, which for an input width of 64 is none of 2,"]),
        ({"lm_head.weight": (20, 14)}, ["lm_head.weight has 14 columns"]),
        ({"lm_head.weight": (21, 12)}, ["lm_head.weight is [21, 12] where [20, 12] is expected"]),
        ({"lm_head.scales": (20, 4)}, ["lm_head.scales has 4 columns, which for an input width of 64 is none of the"]),
        ({"lm_head.scales": (20, 0)}, ["lm_head.scales has 0 columns"]),
        ({"lm_head.scales": (20, 2)}, ["lm_head.biases is [20, 1] where [20, 2] is expected"]),
        ({f"{EXPERT}.weight": (64, 12)}, [f"{EXPERT}.weight is [64, 12] where [64, 24] is expected"]),
        (
            {f"{EXPERT}.weight": (64, 12), f"{EXPERT}.scales": None, "lm_head.weight": (20, 13)},
            ["lm_head.weight has 13", f"{EXPERT}.weight is [64, 12]", f"{EXPERT}.scales [64, 3] is missing"],
        ),
    ],
)
def test_damaged_quantized_weights_are_named(
    changes: dict[str, tuple[int, ...] | None], problems: list[str], tmp_path: Path
) -> None:
    tensors = quantized_tensors()
    for name, shape in changes.items():
        old = tensors.pop(name)
        if shape is not None:
            tensors[name] = mx.zeros(shape, old.dtype)
    refused(write_quantized(tmp_path / "dbrx", tensors), f"{len(problems)} of the weights don't fit", *problems)


@pytest.mark.parametrize(
    ("name", "dtype", "problem"),
    [
        ("lm_head.weight", mx.int32, "lm_head.weight is I32 where uint32 is expected, since it is quantized"),
        ("lm_head.weight", mx.float32, "lm_head.weight is float32 where uint32 is expected, since it is quantized"),
        ("lm_head.scales", mx.uint32, "lm_head.scales is uint32 where one of float32, bfloat16, float16 is expected"),
        ("lm_head.scales", mx.uint8, "lm_head.weight has 12 columns and its uint8 scales 1, which"),
        (f"{EXPERT}.weight", mx.int32, f"{EXPERT}.weight is I32 where uint32 is expected"),
        ("transformer.wte.weight", mx.uint32, "transformer.wte.scales is missing, which a quantized linear has"),
    ],
)
def test_quantized_weights_of_wrong_dtypes_are_named(name: str, dtype: mx.Dtype, problem: str, tmp_path: Path) -> None:
    tensors = quantized_tensors()
    tensors[name] = tensors[name].astype(dtype)
    folder = write_quantized(tmp_path / "dbrx", tensors)
    refused(folder, "1 of the weights don't fit", problem)
    refused(folder, "1 of the weights don't fit", problem, dtype="float32")


def test_experts_of_one_layer_in_two_formats(tmp_path: Path) -> None:
    """They are one stack here, so they have one format: the others'."""
    tensors = quantized_tensors()
    weight = mx.random.normal((64, 96))
    names = [f"{EXPERT}.{leaf}" for leaf in ("weight", "scales", "biases")]
    tensors |= zip(names, mx.quantize(weight, 32, 4), strict=True)
    refused(write_quantized(tmp_path / "four", tensors), f"{EXPERT}.weight is [64, 12] where [64, 24] is expected")
    del tensors[f"{EXPERT}.scales"], tensors[f"{EXPERT}.biases"]
    refused(
        write_quantized(tmp_path / "dense", tensors | {f"{EXPERT}.weight": weight}),
        f"{EXPERT}.weight is float32 where uint32 is expected, since it is quantized",
        f"{EXPERT}.scales [64, 3] is missing",
    )


def test_scales_that_belong_to_nothing(tmp_path: Path) -> None:
    tensors = quantized_tensors() | {"transformer.norm_f.scales": mx.zeros((2,)), "lm_head.global_scale": mx.zeros(1)}
    refused(
        write_quantized(tmp_path / "dbrx", tensors),
        "transformer.norm_f.scales [2] in model-0.safetensors is unexpected",
        "lm_head.global_scale [1] in model-0.safetensors is unexpected",
    )


def test_quantized_experts_under_fused_names(fused: Path) -> None:
    arrays = as_arrays(TENSORS) | {f"{W1}.scales": mx.zeros((15, 1))}
    write_tensors(fused, arrays)
    refused(fused, f"{W1}.scales [15, 1] in model.safetensors is unexpected")


# Files


def test_no_weights(fused: Path) -> None:
    """Pickles can run code when they are read, so none is."""
    (fused / "model.safetensors").rename(fused / "pytorch_model.bin")
    refused(fused, "holds no safetensors file", "only safetensors and GGUF files are read")


def test_missing_shards(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00003.safetensors", f"which {INDEX} names")
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00003.safetensors; model-00003-of-00003.safetensors")
    (sharded / INDEX).unlink()
    refused(sharded, "lm_head.weight [20, 12] is missing")


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_truncated_shard(size: int, sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    size = size if size >= 0 else file.stat().st_size + size
    os.truncate(file, size)
    refused(sharded, f"{file} is damaged or cut short at {size} bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"not a tensor in sight" * 10,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10) + b'{"a": {}}\n',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}\n' + bytes(4),
    ],
)
def test_header_that_is_garbage(content: bytes, fused: Path) -> None:
    (fused / "model.safetensors").write_bytes(content)
    refused(fused, f"{fused / 'model.safetensors'} is damaged or cut short at {len(content)} bytes")


def test_folder_named_as_a_file(fused: Path) -> None:
    (fused / "more.safetensors").mkdir()
    refused(fused, "more.safetensors")


def test_broken_link(fused: Path) -> None:
    (fused / "model.safetensors").unlink()
    (fused / "model.safetensors").symlink_to(fused / "blob")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors can't be read \(No such file or directory\): mend that"
    ):
        load(fused)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"",
        b"[]",
        b"{}",
        b"3",
        b"[" * 10**5,
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"lm_head.weight": 3}}',
        b'{"weight_map": {"lm_head.weight": ["model.safetensors"]}}',
        b'{"weight_map": {"lm_head.weight": "../model.safetensors"}}',
        b'{"weight_map": {"lm_head.weight": "/etc/passwd"}}',
        b'{"weight_map": {"lm_head.weight": "."}}',
    ],
)
def test_malformed_index(content: bytes, fused: Path) -> None:
    shutil.copy(fused / "model.safetensors", fused.parent)
    (fused / INDEX).write_bytes(content)
    text = refused(fused, f"{fused / INDEX} is not an index of shards")
    assert len(text) < 500


@pytest.mark.parametrize("name", ["..", "", "a\0b"])
def test_index_that_names_what_is_no_file(name: str, fused: Path) -> None:
    (fused / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match=INDEX):
        load(fused)


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["nowhere.weight"] = "model-00002-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(
        sharded,
        f"lm_head.weight is not in model-00001-of-00003.safetensors, where {INDEX} says it is",
        f"nowhere.weight is not in model-00002-of-00003.safetensors, where {INDEX} says it is",
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_tensors_that_are_there_twice(indexed: bool, sharded: Path) -> None:
    file = "model-00003-of-00003.safetensors"
    arrays = cast(dict[str, mx.array], mx.load(str(sharded / file)))
    mx.eval(arrays)
    wte = "transformer.wte.weight"
    write_tensors(sharded, arrays | as_arrays({wte: TENSORS[wte], W1: TENSORS[W1]}), file)
    if not indexed:
        (sharded / INDEX).unlink()
    refused(sharded, f"{wte} is there 2 times", f"{W1} is there 2 times")


# Folders


def test_no_such_folder(tmp_path: Path) -> None:
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"nowhere doesn't exist: give a folder .* owner/name\."):
            read(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"nowhere doesn't exist"):
            read(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_a_folder(fused: Path) -> None:
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"config\.json is a file: give the folder"):
            read(fused / "config.json")


def test_folder_without_config_or_tokenizer(fused: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(fused)
    (fused / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load(fused)


def test_repository_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError) as caught:
            read("nobody/dbrx")
        text = str(caught.value)
        assert text.startswith("nobody/dbrx is not a folder here or in the Hub's cache, and HF_HUB_OFFLINE forbids")


@pytest.mark.parametrize("name", ["dbrx", "a/b/c", "../dbrx", "a/.", "-a/b", "a b/c", "https://huggingface.co/a/b"])
def test_names_that_no_repository_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="doesn't exist"):
        load(name)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="GPUs compute in what is stored")
def test_a_cpu_computes_in_float32_where_that_fits(tmp_path: Path) -> None:
    checkpoints.write_fused(tmp_path / "small", RAW, TENSORS, dtype="bfloat16")
    assert computing_dtype(tmp_path / "small") == "float32"
    config = full_size(tmp_path / "large")
    assert 4 * param_count(config) > MEMORY
    assert computing_dtype(tmp_path / "large") is None
