"""`convert --adapter-path`: adapters from mlx-lm's folder to PEFT's, and back."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.adapter_names import SETTINGS, Style
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.convert import main
from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.model.params import Kind
from dbrx_fn.model.tree import Params
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support.adapters import with_random_adapters
from tests.support.tiny_runs import contents, names

CONFIG = Config(
    d_model=32, n_heads=2, n_layers=2, vocab_size=264, max_seq_len=2048, ffn=FFNConfig(16, 4, 2), dtype="bfloat16"
)
TARGETS: tuple[Kind, ...] = ("attention", "router", "embedding", "head")


def leaves(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "model", CONFIG, mx.random.key(0))
    return tmp_path / "model"


def written(model: Path, folder: Path, style: Style, targets: tuple[Kind, ...] = TARGETS, rank: int = 4) -> Path:
    """Adapters in float32, as `train` writes them beside a model of any dtype."""
    params, config = load(model, dtype="float32")
    save_adapters(folder, with_random_adapters(params, config, targets, rank=rank), config, style=style)
    return folder


def converted(model: Path, folder: Path, adapters: Path, *options: str) -> int:
    return main([str(model), str(folder), "--adapter-path", str(adapters), *options])


@pytest.mark.parametrize(("style", "other"), [("mlx-lm", "peft"), ("peft", "mlx-lm")])
def test_there_and_back_every_number_is_the_same(
    style: Style, other: Style, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(model, tmp_path / "first", style)
    assert converted(model, tmp_path / "second", first, "--layout", other) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'second'}\nadapters of rank 4 and scale 1.5, for {other}\n"
    assert converted(model, tmp_path / "third", tmp_path / "second", "--layout", style) == 0
    assert contents(tmp_path / "third") == contents(first)
    assert names(tmp_path / "second") != names(first)
    wanted, found = (
        leaves(load(model, dtype="float32", adapter_path=tmp_path / name)[0]) for name in ("first", "second")
    )
    assert list(found) == list(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(np.array(found[path]), np.array(leaf), err_msg=path)


def test_a_scale_that_float32_cannot_hold_is_kept(model: Path, tmp_path: Path) -> None:
    adapters = written(model, tmp_path / "adapters", "peft", ("attention",), rank=3)
    settings: dict[str, Any] = json.loads((adapters / SETTINGS).read_text()) | {"lora_alpha": 4, "use_rslora": True}
    (adapters / SETTINGS).write_text(json.dumps(settings))
    assert converted(model, tmp_path / "out", adapters, "--layout", "mlx-lm") == 0
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["lora_parameters"]["scale"] == 4 / 3**0.5


def test_adapters_of_experts_are_refused_for_peft(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = written(model, tmp_path / "adapters", "mlx-lm", ("attention", "experts"))
    assert converted(model, tmp_path / "out", adapters, "--layout", "peft") == 2
    said = capsys.readouterr().err
    assert "is an expert's adapter, which PEFT can't have" in said
    assert said.count("\n") == 1
    assert names(tmp_path) == ["adapters", "model"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--adapter-path needs --layout mlx-lm or peft"),
        (["--layout", "gguf"], "--adapter-path needs --layout mlx-lm or peft"),
        (["--layout", "mlx-lm"], "is mlx-lm's folder already"),
        (["--layout", "peft", "--shard-size", "0"], "can't be combined with --shard-size"),
        (["--layout", "peft", "--dtype", "bfloat16"], "can't be combined with --dtype"),
        (["--layout", "peft", "--dry-run"], "can't be combined with --dry-run"),
        (["--layout", "peft", "--experts", "4"], "can't be combined with --quantize or its kin"),
    ],
)
def test_what_adapters_cannot_be_is_refused(
    options: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = written(model, tmp_path / "adapters", "mlx-lm", ("attention",))
    assert converted(model, tmp_path / "out", adapters, *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert names(tmp_path) == ["adapters", "model"]


def test_models_and_adapters_in_each_other_s_place_are_told_apart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters, out = written(model, tmp_path / "adapters", "mlx-lm", ("attention",)), str(tmp_path / "out")
    assert main([str(adapters), out, "--layout", "peft"]) == 2
    assert "--layout peft is for adapters: give their folder with --adapter-path" in capsys.readouterr().err
    assert main([str(adapters), out]) == 2
    assert "holds adapters and no model" in capsys.readouterr().err
    assert converted(adapters, tmp_path / "out", adapters, "--layout", "peft") == 2
    assert "holds adapters and no model" in capsys.readouterr().err
    assert converted(model, tmp_path / "out", model, "--layout", "peft") == 2
    assert "is a model where adapters are expected" in capsys.readouterr().err
    written(model, tmp_path / "out", "mlx-lm")
    before = contents(tmp_path / "out")
    assert converted(model, tmp_path / "out", adapters, "--layout", "peft") == 2
    assert "exists already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
