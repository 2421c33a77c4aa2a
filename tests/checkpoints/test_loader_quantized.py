"""Quantized checkpoints: loaded leaf by leaf, computed as the oracle does, and refused where something is wrong."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dbrx_fn.checkpoints.layouts import sources
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import check_params, param_count, param_spec
from dbrx_fn.ops.formats import Format
from tests.support import checkpoints, oracle
from tests.support.loading import (
    MEMORY,
    RAW,
    TENSORS,
    TOKENS,
    W1,
    as_arrays,
    full_size,
    leaves,
    logits,
    refused,
    write_header,
    write_tensors,
)

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
