"""mlx-lm loads the adapters that are written here, and its own are loaded here: the same logits."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.tuner.utils import load_adapters as load_adapters_in_mlx_lm

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.params import Kind
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.formats import Format
from tests.peers import reference
from tests.support.adapters import with_random_adapters, without_first_layer
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(1))
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture(params=["dense", "quantized"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    form, params = Format(4, 32), CASE.params
    if request.param == "quantized":
        params = quantize(params, CASE.config, Quantization(form, form, form, form, form))
    save(tmp_path / "model", params, CASE.config, layout="split")
    return tmp_path / "model"


def ours(model: Path, adapters: Path | None) -> Any:
    params, config = load(model, adapter_path=adapters)
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return as_float64(logits[0])


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize(
    "targets", [("attention",), ("experts",), ("attention", "experts", "router", "embedding", "head")], ids="-".join
)
def test_mlx_lm_loads_what_is_written_here(
    targets: tuple[Kind, ...], layers: str, model: Path, tmp_path: Path, measured: Any
) -> None:
    params, config = load(model)
    adapted = with_random_adapters(params, config, targets)
    if layers == "last":
        adapted = without_first_layer(adapted, config)
    save_adapters(tmp_path / "adapters", adapted, config)
    theirs = load_adapters_in_mlx_lm(reference.mlx_lm_model(model), str(tmp_path / "adapters"))
    theirs.eval()
    logits = reference.mlx_lm_logits(theirs, TOKENS)
    here = ours(model, tmp_path / "adapters")
    assert measured("adapters written here, float32 to mlx-lm", relative_error(logits, here)) <= 5e-6
    # The adapters change what is compared.
    assert relative_error(ours(model, None), here) > 0.01


@pytest.mark.parametrize("num_layers", [1, -1])
@pytest.mark.parametrize("keys", [None, ["norm_attn_norm.attn.Wqkv", "lm_head"]], ids=["all", "named"])
def test_what_mlx_lm_writes_is_loaded_here(
    num_layers: int, keys: list[str] | None, model: Path, tmp_path: Path, measured: Any
) -> None:
    """As its trainer saves it: all options of the command, and the trainable parameters."""
    theirs = reference.mlx_lm_model(model)
    theirs.freeze()
    parameters = {"rank": 5, "scale": 3.0, "dropout": 0.1} | ({} if keys is None else {"keys": keys})
    linear_to_lora_layers(theirs, num_layers, parameters)
    rng = np.random.default_rng(2)
    trained: dict[str, mx.array] = dict(tree_flatten(theirs.trainable_parameters()))
    drawn = [(n, mx.array(rng.standard_normal(leaf.shape).astype(np.float32)) / 8) for n, leaf in trained.items()]
    theirs.load_weights(drawn, strict=False)
    theirs.eval()
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters())))
    options = SimpleNamespace(
        model=str(model),
        train=True,
        fine_tune_type="lora",
        optimizer="adam",
        seed=0,
        num_layers=num_layers,
        resume_adapter_file=None,
        lora_parameters=parameters,
    )
    (folder / "adapter_config.json").write_text(json.dumps(vars(options)))
    logits = reference.mlx_lm_logits(theirs, TOKENS)
    assert measured("adapters of mlx-lm, float32", relative_error(logits, ours(model, folder))) <= 5e-6
