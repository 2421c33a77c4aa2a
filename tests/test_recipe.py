"""The small model's recipe from texts to figures, on less text, a smaller model and three steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import dbrx_fn
from dbrx_fn.config import FFNConfig
from dbrx_fn.small import recipe

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate:\n" * 30


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for side, text in (("train", TEXT), ("held_out", TEXT.upper()[:900]), ("test", TEXT.lower()[:1000])):
        (tmp_path / "texts" / side).mkdir(parents=True)
        (tmp_path / "texts" / side / "sonnet.txt").write_text(text)
    ffn = FFNConfig(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2)
    small = replace(recipe.ARCHITECTURE, d_model=64, n_heads=4, n_layers=1, vocab_size=270, ffn=ffn)
    monkeypatch.setattr(recipe, "ARCHITECTURE", small)
    monkeypatch.setattr(recipe, "TRAINING", {"--batch-size": 2, "--sequence-length": 16, "--steps": 3, "--warmup": 1})
    monkeypatch.setattr(recipe, "SEQUENCE_LENGTH", 16)
    return tmp_path


def test_one_command_makes_model_and_figures(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--out", str(out)]) == 0
    figures = json.loads((out / "figures.json").read_text())
    assert figures["test_bytes"] == 1000
    assert figures["parameters"] > figures["active_parameters"]
    # The dense model's router is the only difference.
    assert figures["dense_parameters"] == figures["active_parameters"] - 2 * 64
    assert figures["packed_over_small_loss"] == pytest.approx(1, abs=1e-3)
    assert figures["packed_bytes"] == (out / "packed" / "model.safetensors").stat().st_size
    params, config = dbrx_fn.load(out / "packed")
    assert config == recipe.ARCHITECTURE
    assert {*params["lm_head"]} == {"weight", "scales", "biases"}
    assert (out / "samples.txt").read_text().count("seed 2]") == len(recipe.PROMPTS)
    for picture in ("loss.png", "expert_load.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in (out / "small" / "checkpoints").rglob("*.safetensors")}
    assert recipe.main(["--out", str(out)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "small" / "checkpoints").rglob("*.safetensors")}
