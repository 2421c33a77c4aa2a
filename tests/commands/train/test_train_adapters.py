"""`train --lora` and `--train-only`: what is trained, what stays as it is, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.quantization import Quantization, quantize, tree_formats
from dbrx_fn.ops.formats import Format
from dbrx_fn.runs.folder import RunFolder
from tests.support.tiny_runs import arguments, contents, metrics, names, write_conversations

Trained = Callable[..., str]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def quantized(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's model in 4 bits, with its tokenizer."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    params, config = load(finished / "model")
    form = Format(4, 32)
    save(
        out, quantize(params, config, Quantization(form, form, form, form)), config, tokenizer_files=finished / "model"
    )
    return out


def leaves(checkpoint: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load(checkpoint)[0]))


def held_out(run: Path) -> list[float]:
    return [line["held_out_nats_per_token"] for line in metrics(run) if "held_out_nats_per_token" in line]


@pytest.mark.parametrize("bits", ["dense", "quantized"])
def test_adapters_learn_beside_any_weights(
    bits: str, finished: Path, quantized: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    model = finished / "model" if bits == "dense" else quantized
    before, run = contents(model), tmp_path / "run"
    options = {"lora": 4, "model": model, "steps": 30, "eval_every": 10, "learning_rate": 0.02, "warmup": 2}
    said = trained(arguments(run, None, [text], **options))
    # Two matrices of attention and three of each expert, in two layers.
    attention = 4 * (32 + 64) + 4 * (32 + 32)
    assert f"{2 * (attention + 4 * 3 * 4 * (32 + 32)):,} trained" in said
    assert held_out(run)[-1] < held_out(finished)[-1] - 0.05
    assert contents(model) == before
    assert names(run / "adapters") == ["adapter_config.json", "adapters.safetensors"]
    assert names(RunFolder(run).checkpoint(30)) == [*names(run / "tokenizer"), "training"]
    assert {"loss.png", "expert_load.png"} <= set(names(run))
    assert not (run / "model").exists()


def test_the_adapter_folder_holds_the_pairs_of_mlx_lm_s_modules(
    finished: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    options = {"lora": 3, "lora_alpha": 6, "lora_targets": "embedding,experts,head", "model": finished / "model"}
    trained([*arguments(tmp_path / "run", None, [text], **options), "--lora-rank-stabilized"])
    tensors: Any = mx.load(str(tmp_path / "run" / "adapters" / "adapters.safetensors"))
    assert len(tensors) == 2 * (2 + 2 * 4 * 3)
    assert tensors["transformer.blocks.1.ffn.experts.3.w1.lora_a"].shape == (32, 3)
    assert tensors["transformer.blocks.1.ffn.experts.3.w1.lora_b"].shape == (3, 32)
    assert tensors["lm_head.lora_b"].shape == (3, 300)
    assert tensors["transformer.wte.lora_a"].shape == (300, 3)
    assert tensors["transformer.wte.lora_b"].shape == (3, 32)
    settings = json.loads((tmp_path / "run" / "adapters" / "adapter_config.json").read_text())["lora_parameters"]
    assert (settings["rank"], settings["scale"]) == (3, pytest.approx(6 / 3**0.5))
    assert {"lm_head", "transformer.wte", "ffn.experts.0.w1"} <= set(settings["keys"])


@pytest.mark.parametrize("bits", ["dense", "quantized"])
@pytest.mark.parametrize("parts", ["routers", "norms", "experts,head"])
def test_only_the_named_parts_change(
    bits: str, parts: str, finished: Path, quantized: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    """And only they are dequantized."""
    model = finished / "model" if bits == "dense" else quantized
    trained(arguments(tmp_path / "run", None, [text], model=model, train_only=parts, steps=3))
    before, after = leaves(model), leaves(tmp_path / "run" / "model")
    marks = {
        "routers": (".router.",),
        "norms": (".norm_1.", ".norm_2.", ".norm_f."),
        "experts,head": (".experts.", "lm_head."),
    }
    chosen = {path for path in after if any(mark in path for mark in marks[parts])}
    for path, leaf in after.items():
        if path not in chosen:
            np.testing.assert_array_equal(np.array(leaf), np.array(before[path]))
        else:
            assert leaf.dtype == mx.float32
            assert leaf.shape != before[path].shape or not mx.array_equal(leaf, before[path])
    formats = tree_formats(*load(tmp_path / "run" / "model"))
    assert set(formats) == {path for path in tree_formats(*load(model)) if path not in chosen}


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(quantized: Path, tmp_path: Path, trained: Trained) -> None:
    """To the last bit, with masks, micro-batches, recomputing and bfloat16."""
    data = write_conversations(tmp_path / "chats.jsonl")
    options = {"lora": 4, "model": quantized, "micro_batches": 2, "dtype": "bfloat16", "save_every": 2, "eval_every": 4}
    options |= {"lora_targets": "attention,experts,router", "schedule": "constant"}
    trained([*arguments(tmp_path / "whole", None, [data], steps=8, **options), "--recompute"])
    trained([*arguments(tmp_path / "parts", None, [data], steps=4, **options), "--recompute"])
    assert "resumed after step 4" in trained(["--out", str(tmp_path / "parts"), "--resume", "--steps", "8"])
    for part in ("adapters", "checkpoints/step-00000008"):
        assert contents(tmp_path / "parts" / part) == contents(tmp_path / "whole" / part)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_run_is_resumed_only_beside_the_model_that_it_began_with(
    quantized: Path, text: Path, tmp_path: Path, trained: Trained, refused: Refused
) -> None:
    model = Path(shutil.copytree(quantized, tmp_path / "model"))
    trained(arguments(tmp_path / "run", None, [text], lora=2, model=model))
    again = ["--out", str(tmp_path / "run"), "--resume", "--steps", "9"]
    tensors = model / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(again, "isn't made of what run.json notes", "model.safetensors")
    tensors.unlink()
    refused(again, "isn't made of what run.json notes", "model.safetensors")
    (model / "config.json").unlink()
    refused(again, str(model), "can't be read", "the model that it was started from")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": 0}, ("--lora: rank is 0", "at least 1")),
        ({"lora": -1}, ("--lora: rank is -1", "at least 1")),
        ({"lora": 40}, ("rank is 40", "Wqkv", "at most 32")),
        ({"lora": 5, "lora_targets": "router"}, ("rank is 5", "router", "at most 4")),
        ({"lora": 2, "lora_alpha": 0}, ("--lora: alpha is 0",)),
        ({"lora": 2, "lora_alpha": "nan"}, ("--lora: alpha is nan",)),
        ({"lora": 2, "lora_targets": "mlp"}, ("--lora-targets names 'mlp'", "experts, attention")),
        ({"lora": 2, "lora_targets": ""}, ("--lora-targets names ''",)),
        ({"lora": 2, "lora_targets": "norms"}, ("--lora-targets names 'norms'",)),
        ({"train_only": "heads"}, ("--train-only names 'heads'", "norms")),
        ({"lora": 2, "train_only": "head"}, ("--lora and --train-only",)),
        ({"lora_alpha": 2}, ("--lora-alpha needs --lora",)),
        ({"lora_targets": "head"}, ("--lora-targets needs --lora",)),
    ],
)
def test_adapters_that_cannot_work(
    options: dict[str, Any], words: tuple[str, ...], finished: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    refused(arguments(tmp_path / "run", None, [text], model=finished / "model", **options), *words)
    assert names(tmp_path) == []


def test_parts_of_a_fresh_model_are_refused(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    refused(arguments(tmp_path / "run", config, [text], lora=2), "--lora needs --model")
    refused(arguments(tmp_path / "run", config, [text], train_only="head"), "--train-only needs --model")
    assert names(tmp_path) == []


def test_a_foreign_file_in_the_adapters_way_is_kept(
    finished: Path, text: Path, tmp_path: Path, trained: Trained, refused: Refused
) -> None:
    trained(arguments(tmp_path / "run", None, [text], lora=2, model=finished / "model"))
    (tmp_path / "run" / "adapters" / "notes.txt").write_text("mine")
    refused(["--out", str(tmp_path / "run"), "--resume", "--steps", "9"], "notes.txt is in the way")
    assert (tmp_path / "run" / "adapters" / "notes.txt").read_text() == "mine"


def test_the_shipped_model_takes_adapters_as_it_is(tmp_path: Path, trained: Trained) -> None:
    data = write_conversations(tmp_path / "chats.jsonl", count=40)
    options = {"lora": 4, "model": SMALL, "steps": 2, "batch_size": 2, "sequence_length": 32}
    assert "dequantized" not in trained(arguments(tmp_path / "run", None, [data], **options))
    assert names(tmp_path / "run" / "adapters") == ["adapter_config.json", "adapters.safetensors"]
