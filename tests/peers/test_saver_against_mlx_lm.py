"""What is written here is read by mlx-lm, and what mlx-lm quantizes and writes is read here, to the same logits."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model, load_config, load_model, quantize_model, save_config, save_model
from numpy.typing import NDArray

from dbrx_fn.checkpoints.layouts import Written
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.quantization import Quantization, quantize, tree_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from tests.peers import reference
from tests.support.checkpoints import QUANTIZABLE, write_fused
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
TOKENS = np.random.default_rng(1).integers(40, size=30).tolist()
BAR = 5e-6

MIXED = Quantization(Format(3, 64), Format(8, 128), Format(6, 32), Format(5, 64), Format(8, 64))
FLOATS = Quantization(Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), None, Format(4, 16, "nvfp4"), None)


def our_logits(params: Params, config: Config) -> NDArray[np.float64]:
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return as_float64(logits[0])


@pytest.mark.parametrize(
    ("quantization", "layout"),
    [
        (None, "fused"),
        (None, "split"),
        (Quantization(), "split"),
        (MIXED, "split"),
        (FLOATS, "split"),
        (Quantization(experts=None), "fused"),
    ],
)
def test_mlx_lm_reads_what_is_written_here(
    quantization: Quantization | None, layout: Written, tmp_path: Path, measured: Any
) -> None:
    params = CASE.params if quantization is None else quantize(CASE.params, CASE.config, quantization)
    save(tmp_path / "dbrx", params, CASE.config, layout=layout)
    theirs = reference.mlx_lm_logits(reference.mlx_lm_model(tmp_path / "dbrx"), TOKENS)
    error = relative_error(theirs, our_logits(params, CASE.config))
    assert measured("saved here, float32 to mlx-lm", error) <= BAR


def uneven(path: str, module: Any) -> bool | dict[str, Any]:
    """Several bits in one model, and two kinds of matrix left as they are."""
    if "router" in path or "wte" in path:
        return False
    return {"group_size": 32, "bits": 8, "mode": "affine"} if path.endswith((".w2", "Wqkv")) else True


@pytest.mark.parametrize(
    ("arguments", "predicate", "format_of_w1"),
    [
        ({"group_size": 64, "bits": 4}, None, Format(4, 64)),
        ({"group_size": 32, "bits": 3}, uneven, Format(3, 32)),
        ({"group_size": None, "bits": None, "mode": "mxfp4"}, uneven, Format(4, 32, "mxfp4")),
    ],
)
def test_what_mlx_lm_quantizes_and_writes_is_read_here(
    arguments: dict[str, Any], predicate: Any, format_of_w1: Format, tmp_path: Path, measured: Any
) -> None:
    write_fused(tmp_path / "dense", QUANTIZABLE, CASE.tensors)
    model, config = load_model(tmp_path / "dense")
    model, config = quantize_model(model, config, quant_predicate=predicate, **arguments)
    save_model(tmp_path / "quantized", model)
    save_config(config, tmp_path / "quantized" / "config.json")
    theirs = reference.mlx_lm_logits(reference.mlx_lm_model(tmp_path / "quantized"), TOKENS)

    params, ours = load(tmp_path / "quantized")
    formats = tree_formats(params, ours)
    assert formats["transformer.blocks.0.ffn.experts.mlp.w1.weight"] == format_of_w1
    assert ("transformer.wte.weight" in formats) == (predicate is None)
    if predicate is uneven:
        assert formats["transformer.blocks.0.ffn.experts.mlp.w2.weight"] == Format(8, 32)
    assert measured("saved by mlx-lm, float32 to mlx-lm", relative_error(our_logits(params, ours), theirs)) <= BAR


def test_both_write_the_same_files(tmp_path: Path) -> None:
    """Tensors to the last bit, and what config.json says of their formats."""
    write_fused(tmp_path / "dense", QUANTIZABLE, CASE.tensors)
    model, config = load_model(tmp_path / "dense")
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(tmp_path / "theirs", model)
    save_config(config, tmp_path / "theirs" / "config.json")
    usual = Format(4, 64)
    save(tmp_path / "ours", quantize(CASE.params, CASE.config, Quantization(router=usual)), CASE.config)

    files = [tmp_path / name / "model.safetensors" for name in ("ours", "theirs")]
    ours, theirs = (cast(dict[str, mx.array], mx.load(str(file))) for file in files)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert mx.array_equal(tensor, theirs[name]), name
    for key in ("quantization", "quantization_config"):
        said = [json.loads((tmp_path / name / "config.json").read_text())[key] for name in ("ours", "theirs")]
        assert said[0] == said[1]
    assert load_config(tmp_path / "ours")["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_mlx_lm_dequantizes_what_is_written_here(tmp_path: Path) -> None:
    """So that its other tools, which work on dense models, can take it from there."""
    save(tmp_path / "dbrx", quantize(CASE.params, CASE.config), CASE.config)
    model = dequantize_model(reference.mlx_lm_model(tmp_path / "dbrx"))
    save_model(tmp_path / "dense", model)
    (tmp_path / "dense" / "config.json").write_text(json.dumps(QUANTIZABLE))
    params, config = load(tmp_path / "dense")
    assert not tree_formats(params, config)
    quantized = our_logits(quantize(CASE.params, CASE.config), CASE.config)
    assert relative_error(our_logits(params, config), quantized) <= BAR
