"""The training bench: how it counts operations, and that it prints what it measured. Its times decide nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dbrx_fn.bench import BILLION, main, training_operations
from dbrx_fn.config import AttnConfig, Config, FFNConfig, config_to_dict
from dbrx_fn.params import param_count

TINY = Config(
    d_model=8,
    n_heads=2,
    n_layers=3,
    vocab_size=20,
    attn=AttnConfig(kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=4, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(config_to_dict(TINY)))
    return tmp_path / "tiny.json"


def test_operations_are_those_of_every_product() -> None:
    time, d_model, layers = 6, 8, 3
    projections = d_model * (8 + 4 + 4) + d_model * 8 + d_model * 4 + 2 * 3 * d_model * 4
    scores_and_values = 2 * d_model * time / 2
    forward = layers * (projections + scores_and_values) + d_model * 20
    norms = (2 * layers + 1) * d_model
    assert training_operations(TINY, time) == 3 * 2 * (forward + norms)


def test_the_billion_is_that() -> None:
    assert 1.25e9 < param_count(BILLION) < 1.35e9


def test_json_and_table_say_the_same(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", str(config_file), "--batch-size", "2", "--sequence-length", "8", "--steps", "2"]
    assert main([*arguments, "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)
    assert speed["parameters"] == param_count(TINY)
    assert speed["tokens_per_second"] == pytest.approx(16 / speed["step"])
    done = speed["tokens_per_second"] * speed["operations_per_token"]
    assert speed["fraction_of_bound"] == pytest.approx(done / speed["matmul_rate"])
    assert main(arguments) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "of bound" in header
    assert str(config_file) in row


@pytest.mark.parametrize(
    ("options", "word"), [(["--steps", "0"], "--steps"), (["--shape", "nowhere.json"], "nowhere.json doesn't exist")]
)
def test_what_cannot_be_measured(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert word in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = replace(TINY, d_model=2**16, n_layers=400)
    (tmp_path / "huge.json").write_text(json.dumps(config_to_dict(huge)))
    assert main(["--shape", str(tmp_path / "huge.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: The model's ")
    assert "GiB to be trained" in err
    assert err.count("\n") == 1
