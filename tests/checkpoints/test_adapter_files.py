"""Adapters' folders, of mlx-lm and of PEFT: what is written is read, and what can't be followed is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.adapter_names import SETTINGS, TENSORS, Style
from dbrx_fn.checkpoints.adapter_reader import load_adapters
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.params import Kind
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.shard import Shard
from dbrx_fn.ops.formats import Format
from tests.support.adapters import with_random_adapters, without_first_layer
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import case_of

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
TARGETS: dict[Style, tuple[Kind, ...]] = {
    "mlx-lm": ("attention", "experts", "router", "embedding", "head"),
    "peft": ("attention", "router", "embedding", "head"),
}
styles = pytest.mark.parametrize("style", ["mlx-lm", "peft"])
Change = Callable[[dict[str, mx.array], dict[str, Any]], object]


def leaves(params: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def written(folder: Path, style: Style, targets: Sequence[Kind] | None = None) -> Path:
    adapted = with_random_adapters(PARAMS, CONFIG, targets or TARGETS[style], rank=3)
    save_adapters(folder, adapted, CONFIG, style=style)
    return folder


def changed(folder: Path, style: Style, change: Change) -> Path:
    """The folder with other tensors and settings."""
    file = written(folder, style, ("attention", "experts") if style == "mlx-lm" else None) / TENSORS[style]
    tensors: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
    settings = json.loads((folder / SETTINGS).read_text())
    mx.eval(tensors)
    change(tensors, settings)
    mx.save_safetensors(str(file), tensors)
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapters(folder, PARAMS, CONFIG)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@styles
@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_written_is_read(style: Style, bits: int | None, tmp_path: Path) -> None:
    """Beside weights of any format, with every leaf as it was."""
    form = Format(4, 32)
    params = PARAMS if bits is None else quantize(PARAMS, CONFIG, Quantization(form, form, form, form, form))
    adapted = with_random_adapters(params, CONFIG, TARGETS[style], rank=3)
    save_adapters(tmp_path / "adapters", adapted, CONFIG, style=style)
    found = leaves(load_adapters(tmp_path / "adapters", params, CONFIG))
    assert list(found) == list(leaves(adapted))
    for path, leaf in leaves(adapted).items():
        np.testing.assert_array_equal(np.array(found[path]), np.array(leaf), err_msg=path)


@styles
def test_a_checkpoint_loads_with_its_adapters_in_its_dtype(style: Style, tmp_path: Path) -> None:
    save(tmp_path / "model", PARAMS, CONFIG)
    folder = written(tmp_path / "adapters", style)
    params, config = load(tmp_path / "model", dtype="bfloat16", adapter_path=folder)
    assert {leaf.dtype for path, leaf in leaves(params).items() if path.endswith(("lora_a", "lora_b"))} == {mx.bfloat16}
    assert config == replace(CONFIG, dtype="bfloat16")


def test_adapters_of_the_last_layers_leave_the_others_alone(tmp_path: Path) -> None:
    def last_layer(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
        settings["num_layers"] = 1
        for name in [name for name in tensors if ".blocks.0." in name]:
            del tensors[name]

    found = leaves(load_adapters(changed(tmp_path / "adapters", "mlx-lm", last_layer), PARAMS, CONFIG))
    with_adapter = {path for path in found if "lora" in path}
    assert len(with_adapter) == 3 * 5
    assert all(".blocks.1." in path for path in with_adapter)


@styles
def test_adapters_of_the_last_layers_alone_are_written_and_read(style: Style, tmp_path: Path) -> None:
    adapted = without_first_layer(with_random_adapters(PARAMS, CONFIG, TARGETS[style], rank=3), CONFIG)
    save_adapters(tmp_path / "adapters", adapted, CONFIG, style=style)
    found = leaves(load_adapters(tmp_path / "adapters", PARAMS, CONFIG))
    assert list(found) == list(leaves(adapted))
    for path, leaf in leaves(adapted).items():
        np.testing.assert_array_equal(np.array(found[path]), np.array(leaf), err_msg=path)


def test_experts_are_refused_for_peft(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ffn.experts.mlp.v1.lora_a is an expert's adapter, which PEFT can't have"):
        written(tmp_path / "adapters", "peft", ("attention", "experts"))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    with pytest.raises(InputError, match="adapters"):
        written(tmp_path / "adapters", "mlx-lm")
    with pytest.raises(InputError, match="0 ranks"):
        save_adapters(tmp_path / "none", PARAMS, CONFIG)
    assert not list((tmp_path / "adapters").iterdir())


A = "transformer.blocks.0.norm_attn_norm.attn.Wqkv.lora_a"
EXPERT = "transformer.blocks.1.ffn.experts.2.w1.lora_b"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: t.pop(A), f"{A} [128, 3] is missing"),
        (lambda t, s: t.pop(EXPERT), f"{EXPERT} [3, 256] is missing"),
        (lambda t, s: t.clear(), "is missing"),
        (lambda t, s: t.update({A: mx.zeros((64, 3))}), f"{A} is [64, 3] where [128, 3] is expected"),
        (lambda t, s: t.update({A: mx.zeros((128, 3), mx.int32)}), f"{A} is I32 where one of float32"),
        (lambda t, s: t.update({A: mx.full((128, 3), float("nan"))}), f"{A} of"),
        (lambda t, s: t.update({"model.layers.0.q.lora_a": mx.zeros((1,))}), "belongs to no linear of the model"),
        (lambda t, s: t.update({"lm_head.lora_a": mx.zeros((128, 3))}), "isn't among adapter_config.json's targets"),
        (lambda t, s: s["lora_parameters"].update(rank=4), "where [128, 4] is expected"),
        (lambda t, s: s["lora_parameters"].update(rank=True), "rank True"),
        (lambda t, s: s["lora_parameters"].update(rank=10**30), "rank 1000"),
        (lambda t, s: s["lora_parameters"].pop("scale"), "scale None"),
        (lambda t, s: s["lora_parameters"].update(scale=float("nan")), "scale nan"),
        (lambda t, s: s["lora_parameters"].update(scale=10**400), "scale "),
        (lambda t, s: s["lora_parameters"].update(alpha=8), "'alpha' in lora_parameters"),
        (lambda t, s: s["lora_parameters"].update(keys=[3]), "keys [3]"),
        (lambda t, s: s["lora_parameters"]["keys"].remove("ffn.experts.2.w1"), "isn't among"),
        (lambda t, s: s["lora_parameters"]["keys"].append("self_attn.q_proj"), "names 'self_attn.q_proj', which is no"),
        (lambda t, s: s.update(lora_parameters=None), "lora_parameters None"),
        (lambda t, s: s.update(num_layers="all"), "num_layers 'all'"),
        (lambda t, s: s.update(num_layers=1), "isn't among"),
        (lambda t, s: s.update(fine_tune_type="dora"), "fine_tune_type 'dora'"),
        (lambda t, s: s.update(fine_tune_type="full"), "fine_tune_type 'full'"),
    ],
)
def test_what_mlx_lm_s_folder_says_is_followed_or_refused(change: Change, words: str, tmp_path: Path) -> None:
    assert words in refusal(changed(tmp_path / "adapters", "mlx-lm", change))


def test_adapters_of_some_experts_are_refused(tmp_path: Path) -> None:
    def without_one(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
        settings["lora_parameters"]["keys"].remove("ffn.experts.2.w1")
        for name in [name for name in tensors if ".experts.2.w1." in name]:
            del tensors[name]

    assert "w1.weight has adapters for 3 of its 4 experts" in refusal(changed(tmp_path / "a", "mlx-lm", without_one))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: s.update(use_dora=True), "use_dora True"),
        (lambda t, s: s.update(fan_in_fan_out=True), "fan_in_fan_out True"),
        (lambda t, s: s.update(modules_to_save=["lm_head"]), "modules_to_save ['lm_head']"),
        (lambda t, s: s.update(rank_pattern={"Wqkv": 2}), "rank_pattern {'Wqkv': 2}"),
        (lambda t, s: s.update(layers_to_transform=[0]), "layers_to_transform [0]"),
        (lambda t, s: s.update(target_parameters=["w1"]), "target_parameters ['w1']"),
        (lambda t, s: s.update(bias="lora_only"), "bias 'lora_only'"),
        (lambda t, s: s.update(of_next_year=1), "of_next_year 1"),
        (lambda t, s: s.update(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (lambda t, s: s.update(peft_type="IA3"), "peft_type 'IA3'"),
        (lambda t, s: s.update(target_modules=".*"), "target_modules '.*'"),
        (lambda t, s: s.update(r=4), "where [4, 128] is expected"),
        (lambda t, s: s["target_modules"].append("q_proj"), "names 'q_proj', which is no linear of the model"),
        (lambda t, s: s.update(use_rslora="no"), "use_rslora 'no'"),
        (lambda t, s: t.pop(f"base_model.model.{A[:-1].replace('lora_', 'lora_A.weight')}"), "is missing"),
    ],
)
def test_what_peft_s_folder_says_is_followed_or_refused(change: Change, words: str, tmp_path: Path) -> None:
    assert words in refusal(changed(tmp_path / "adapters", "peft", change))


def test_rank_stabilized_scales_of_peft(tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapters", "peft", lambda t, s: s.update(use_rslora=True, lora_alpha=6))
    found = leaves(load_adapters(folder, PARAMS, CONFIG))
    assert found["lm_head.lora_scale"].item() == pytest.approx(6 / 3**0.5)


def test_folders_of_another_kind(tmp_path: Path) -> None:
    save(tmp_path / "model", PARAMS, CONFIG)
    assert "is a model where adapters are expected" in refusal(tmp_path / "model")
    assert "doesn't exist" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(tmp_path / "model" / "config.json")
    (tmp_path / "empty").mkdir()
    assert "holds neither adapters.safetensors nor adapter_model.safetensors" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"")
    assert "a pickle can run code" in refusal(tmp_path / "empty")
    both = written(tmp_path / "both", "mlx-lm")
    shutil.copy(both / TENSORS["mlx-lm"], both / TENSORS["peft"])
    assert "keep the one that is meant" in refusal(both)
    with pytest.raises(CheckpointError, match=r"holds adapters and no model: .* --adapter-path"):
        open_checkpoint(written(tmp_path / "adapters", "mlx-lm"))


def test_damaged_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapters", "mlx-lm")
    whole, settings = (folder / TENSORS["mlx-lm"]).read_bytes(), (folder / SETTINGS).read_bytes()
    (folder / TENSORS["mlx-lm"]).write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refusal(folder)
    (folder / TENSORS["mlx-lm"]).write_bytes(whole)
    for damaged in (settings[:9], b"[]", b"\xff", b'{"a": 1, "a": 2}'):
        (folder / SETTINGS).write_bytes(damaged)
        assert SETTINGS in refusal(folder)
    (folder / SETTINGS).unlink()
    assert "is missing" in refusal(folder)


def test_adapters_beside_adapters_and_in_shared_models_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapters", "mlx-lm")
    with pytest.raises(InputError, match="merge the tree's adapters"):
        load_adapters(folder, load_adapters(folder, PARAMS, CONFIG), CONFIG)
    save(tmp_path / "model", PARAMS, CONFIG)
    with pytest.raises(InputError, match="several processes"):
        load(tmp_path / "model", shard=Shard(0, 2), adapter_path=folder)
