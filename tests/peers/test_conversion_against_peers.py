"""What is converted here loads in mlx-lm and transformers, and what mlx-lm wrote converts, to the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from numpy.typing import NDArray

from dbrx_fn.checkpoints.loader import load
from dbrx_fn.convert import main
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.quantization import tree_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.formats import Format
from tests.peers import reference
from tests.support import layouts_written, oracle
from tests.support.checkpoints import QUANTIZABLE, split_tensors, write_fused, write_split
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
TOKENS = np.random.default_rng(1).integers(40, size=30).tolist()
BAR = 5e-6

WRITERS: dict[str, Callable[..., None]] = {
    "fused": write_fused,
    "split": write_split,
    "stacked": layouts_written.write_stacked,
    "converted": layouts_written.write_converted,
    "nxd": layouts_written.write_nxd,
    "megablocks": layouts_written.write_megablocks,
}
Measured = Callable[[str, float], float]


def converted(source: Path, folder: Path, *options: str) -> Path:
    assert main([str(source), str(folder), *options]) == 0
    return folder


def our_logits(folder: Path) -> NDArray[np.float64]:
    params, config = load(folder)
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return as_float64(logits[0])


def mlx_lm_logits(folder: Path) -> NDArray[np.float32]:
    return reference.mlx_lm_logits(reference.mlx_lm_model(folder), TOKENS)


@pytest.mark.parametrize("name", WRITERS)
def test_both_peers_read_what_is_converted(name: str, tmp_path: Path, measured: Measured) -> None:
    WRITERS[name](tmp_path / "source", QUANTIZABLE, CASE.tensors)
    expected = oracle.forward(QUANTIZABLE, CASE.tensors, TOKENS)
    shards = ["--shard-size", "1e-3"]
    split = converted(tmp_path / "source", tmp_path / "split", "--layout", "split", *shards)
    fused = converted(tmp_path / "source", tmp_path / "fused", "--layout", "fused", *shards)
    assert len(list(fused.glob("*.safetensors"))) > 2
    ours = our_logits(split)
    assert relative_error(ours, expected) <= BAR
    assert measured("converted to split, mlx-lm", relative_error(mlx_lm_logits(split), ours)) <= BAR
    assert measured("converted to fused, mlx-lm", relative_error(mlx_lm_logits(fused), ours)) <= BAR
    theirs = reference.transformers_logits(reference.transformers_model_from(fused), TOKENS)
    assert measured("converted to fused, transformers", relative_error(theirs, ours)) <= BAR


@pytest.mark.parametrize(
    "options",
    [
        ["--quantize", "4"],
        ["--quantize", "3:32", "--router", "8"],
        ["--quantize", "mxfp4", "--attention", "mxfp8", "--embedding", "none", "--head", "nvfp4"],
        ["--experts", "2:128", "--attention", "6", "--head", "5:32"],
    ],
    ids=" ".join,
)
def test_mlx_lm_reads_what_is_quantized(options: list[str], tmp_path: Path, measured: Measured) -> None:
    write_fused(tmp_path / "source", QUANTIZABLE, CASE.tensors)
    folder = converted(tmp_path / "source", tmp_path / "quantized", *options, "--shard-size", "5e-4")
    assert measured("quantized here, mlx-lm", relative_error(mlx_lm_logits(folder), our_logits(folder))) <= BAR


def written_by_mlx_lm(folder: Path, dense: Path, predicate: Any = None, **arguments: Any) -> Path:
    model, config = load_model(dense)
    model, config = quantize_model(model, config, quant_predicate=predicate, **arguments)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def old_mlx_lm(folder: Path, dense: Path) -> Path:
    """As in 2024: float16, the router in 4 bits too, the embedding dense, and a config that knows no `mode`."""
    written_by_mlx_lm(folder, dense, lambda path, _: "wte" not in path, group_size=64, bits=4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def new_mlx_lm(folder: Path, dense: Path) -> Path:
    """With settings for each path, and twice."""

    def uneven(path: str, _: Any) -> bool | dict[str, Any]:
        if path.endswith("router.layer"):
            return {"group_size": 64, "bits": 8, "mode": "affine"}
        return {"group_size": 32, "bits": 6, "mode": "affine"} if path.endswith((".w2", "lm_head")) else True

    written_by_mlx_lm(folder, dense, uneven, group_size=64, bits=4)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert len(config["quantization"]) > 3
    return folder


@pytest.mark.parametrize("write", [old_mlx_lm, new_mlx_lm])
def test_what_mlx_lm_quantized_is_read_and_converted(
    write: Callable[[Path, Path], Path], tmp_path: Path, measured: Measured
) -> None:
    """float16 throughout; each step to the same bits, and the first to mlx-lm's own logits."""
    write_fused(tmp_path / "dense", QUANTIZABLE, CASE.tensors, dtype="float16")
    theirs = write(tmp_path / "theirs", tmp_path / "dense")
    params, config = load(theirs)
    formats = tree_formats(params, config)
    assert config.dtype == "float16"
    assert ("transformer.wte.weight" in formats) == (write is new_mlx_lm)
    assert formats["transformer.blocks.0.ffn.router.layer.weight"] == Format(4 if write is old_mlx_lm else 8, 64)

    wide = converted(theirs, tmp_path / "wide", "--dtype", "float32")
    # In float32, since products of float16 are rounded at other places there.
    expected = mlx_lm_logits(wide)
    assert measured("quantized by mlx-lm, converted here", relative_error(our_logits(wide), expected)) <= BAR
    stacked = converted(theirs, tmp_path / "stacked", "--layout", "stacked")
    np.testing.assert_array_equal(our_logits(stacked), our_logits(theirs))
    again = converted(stacked, tmp_path / "again")
    np.testing.assert_array_equal(mlx_lm_logits(again), mlx_lm_logits(theirs))

    fused = converted(theirs, tmp_path / "fused", "--dequantize", "--layout", "fused", "--dtype", "float32")
    logits = reference.transformers_logits(reference.transformers_model_from(fused), TOKENS)
    assert measured("dequantized here, transformers", relative_error(logits, expected)) <= BAR


def test_an_mlx_lm_tree_holds_every_tensor_that_is_converted(tmp_path: Path) -> None:
    write_fused(tmp_path / "source", QUANTIZABLE, CASE.tensors)
    folder = converted(tmp_path / "source", tmp_path / "split")
    assert mx.load(str(folder / "model.safetensors")).keys() == split_tensors(QUANTIZABLE, CASE.tensors).keys()  # type: ignore[union-attr]
