"""PEFT on transformers loads the adapters that are written here, and its own are loaded here: the same logits."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.tuner.utils import load_adapters as load_adapters_in_mlx_lm

from dbrx_fn import convert
from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.params import Kind
from dbrx_fn.model.transformer import forward
from tests.peers import reference
from tests.support.adapters import with_random_adapters, without_first_layer
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

peft: Any = pytest.importorskip("peft")
# PEFT reads a property of transformers' that is renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CASE = case_of(QUANTIZABLE, np.random.default_rng(1))
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "model", CASE.params, CASE.config, layout="fused")
    return tmp_path / "model"


def ours(model: Path, adapters: Path | None) -> Any:
    params, config = load(model, adapter_path=adapters)
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return as_float64(logits[0])


def logits_of(theirs: Any) -> Any:
    with torch.no_grad():
        return theirs(torch.tensor([TOKENS]), use_cache=False).logits[0].double().numpy()


@pytest.mark.parametrize("targets", [("attention",), ("attention", "router", "embedding", "head")], ids="-".join)
def test_peft_loads_what_is_written_here(targets: tuple[Kind, ...], model: Path, tmp_path: Path, measured: Any) -> None:
    params, config = load(model)
    save_adapters(tmp_path / "adapters", with_random_adapters(params, config, targets), config, style="peft")
    theirs = peft.PeftModel.from_pretrained(reference.transformers_model_from(model), str(tmp_path / "adapters"))
    theirs.eval()
    here = ours(model, tmp_path / "adapters")
    assert measured("adapters written here, float32 to PEFT", relative_error(logits_of(theirs), here)) <= 5e-6
    # The adapters change what is compared.
    assert relative_error(ours(model, None), here) > 0.01


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_what_peft_writes_is_loaded_here(rank_stabilized: bool, model: Path, tmp_path: Path, measured: Any) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rank_stabilized,
        target_modules=["Wqkv", "out_proj", "ffn.router.layer", "wte"],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(reference.transformers_model_from(model), settings)
    theirs.eval()
    theirs.save_pretrained(str(tmp_path / "adapters"))
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    here = ours(model, tmp_path / "adapters")
    assert measured("adapters of PEFT, float32", relative_error(logits_of(theirs), here)) <= 5e-6
    assert relative_error(ours(model, None), here) > 0.01


@pytest.mark.parametrize("layers", ["all", "last"])
def test_adapters_converted_by_the_command_say_the_same_in_all_three(
    layers: str, model: Path, tmp_path: Path, measured: Any
) -> None:
    """From here to PEFT, and from PEFT to mlx-lm."""
    params, config = load(model)
    adapted = with_random_adapters(params, config, ("attention", "router", "embedding", "head"))
    if layers == "last":
        adapted = without_first_layer(adapted, config)
    save_adapters(tmp_path / "mlx-lm", adapted, config)
    command = [str(model), str(tmp_path / "peft"), "--adapter-path", str(tmp_path / "mlx-lm"), "--layout", "peft"]
    assert convert.main(command) == 0
    here = ours(model, tmp_path / "mlx-lm")
    theirs = peft.PeftModel.from_pretrained(reference.transformers_model_from(model), str(tmp_path / "peft"))
    theirs.eval()
    assert measured("adapters converted for PEFT, float32", relative_error(logits_of(theirs), here)) <= 5e-6

    theirs.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    command = [str(model), str(tmp_path / "back"), "--adapter-path", str(tmp_path / "saved"), "--layout", "mlx-lm"]
    assert convert.main(command) == 0
    save(tmp_path / "split", params, config, layout="split")
    beside = load_adapters_in_mlx_lm(reference.mlx_lm_model(tmp_path / "split"), str(tmp_path / "back"))
    beside.eval()
    logits = reference.mlx_lm_logits(beside, TOKENS)
    assert measured("PEFT's adapters converted for mlx-lm, float32", relative_error(logits, here)) <= 5e-6
