"""Weights that don't fit their config, each other, the memory or a layout are refused, and told as in the file."""

import json
import re
import resource
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.layouts import LAYOUTS, Layout, sources
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.model.params import check_params, param_count, param_spec
from tests.support import checkpoints
from tests.support.loading import (
    MEMORY,
    RAW,
    ROUTER,
    TENSORS,
    W1,
    as_arrays,
    full_size,
    refused,
    write_raw,
    write_tensors,
)


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
