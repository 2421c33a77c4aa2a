"""`python -m dbrx_fn.train` as a user meets it: what it leaves in its folder, and what it prints."""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn import generate
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.data.token_file import read_token_file
from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.text.bpe import save_tokenizer, train_bpe
from dbrx_fn.text.tokenizer import read_tokenizer
from dbrx_fn.train import main, parser
from dbrx_fn.training.step import Recipe
from tests.support.tiny_runs import (
    TINY,
    arguments,
    contents,
    metrics,
    names,
    parameters,
    write_config,
    write_conversations,
    write_text,
)

Trained = Callable[..., str]
Refused = Callable[..., str]


# What it leaves


def test_a_run_leaves_what_it_says(finished: Path) -> None:
    assert names(finished) == [
        *("checkpoints", "data", "expert_load.png", "loss.png", "metrics.jsonl", "model", "run.json", "tokenizer")
    ]
    assert names(finished.parent) == ["run"]
    assert names(finished / "checkpoints") == ["step-00000008", "step-00000012"]
    assert names(finished / "data") == ["held_out", "train"]
    for picture in (finished / "loss.png", finished / "expert_load.png"):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        width, height = (int.from_bytes(content[place : place + 4]) for place in (16, 20))
        assert min(width, height) >= 300
        assert max(width, height) <= 3000


def test_metrics_are_lines_of_the_promised_figures(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    training = [line for line in lines if "cross_entropy" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    for line in training:
        assert all(np.isfinite(value) for value in line.values())
        assert line["tokens_per_second"] > 0
        assert 1 <= line["busiest_expert"] <= TINY["ffn_config"]["moe_num_experts"]
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.05 * line["load_balance"], rel=1e-5)
    evaluated = [line for line in lines if "held_out_bits_per_byte" in line]
    assert [line["step"] for line in evaluated] == [5, 10, 12]
    for line in evaluated:
        assert np.sum(line["expert_share"], axis=1) == pytest.approx(1)
    assert training[-1]["cross_entropy"] < training[0]["cross_entropy"]


def test_what_is_saved_is_a_plain_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (finished / "model", *(finished / "checkpoints").iterdir()):
        assert generate.main(["--model", str(folder), "-p", "When shall", "-m", "3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    last = parameters(finished / "checkpoints" / "step-00000012")
    for path, array in parameters(finished / "model").items():
        assert np.array_equal(array, last[path]), path


def test_progress_goes_to_standard_error_and_a_summary_to_standard_output(
    config: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", config, [text])) == 0
    out, err = capsys.readouterr()
    for words in ("parameters", "tokens/s", "busiest expert", "loss", "left", "bits/byte"):
        assert words in err
    assert [line.split("  ")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        *("steps", "tokens", "training", "held out", "busiest expert", "model")
    ]


def test_the_same_seed_makes_the_same_run_and_another_another(
    finished: Path, config: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    options = {"steps": 12, "save_every": 4, "eval_every": 5, "log_every": 2}
    for seed in (0, 1):
        trained(arguments(tmp_path / str(seed), config, [text], **options, seed=seed))
    assert metrics(tmp_path / "0") == metrics(finished)
    assert contents(tmp_path / "0" / "model") == contents(finished / "model")
    assert metrics(tmp_path / "1") != metrics(finished)


def test_one_trace_for_the_whole_run(
    text: Path, tmp_path: Path, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    # A new static value, for which nothing is traced yet.
    config = write_config(tmp_path / "config.json", initializer_range=0.021)
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        trained(arguments(tmp_path / "run", config, [text], steps=9, eval_every=2, held_out_share=0.3))
    traces = Counter(record.getMessage().split()[1] for record in caplog.records if record.name == "dbrx_fn.compile")
    assert (traces["gradients"], traces["update"], traces["_score"]) == (1, 1, 1)


# Going on


def test_a_finished_run_resumed_does_nothing(copy: Path, trained: Trained) -> None:
    before = contents(copy)
    assert "resumed after step 12" in trained(["--out", str(copy), "--resume"])
    assert contents(copy) == before


def test_a_run_that_lost_its_last_steps_does_them_again(copy: Path, finished: Path, trained: Trained) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    shutil.rmtree(copy / "model")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "cross_en')
    assert "resumed after step 8" in trained(["--out", str(copy), "--resume"])
    assert metrics(copy) == metrics(finished)
    for part in ("checkpoints", "model"):
        assert contents(copy / part) == contents(finished / part)


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(copy: Path, trained: Trained) -> None:
    leftovers = [
        copy / ".metrics.jsonl-0123abcd.unfinished",
        copy / "checkpoints" / ".step-00000016-0123abcd.unfinished",
    ]
    others = [
        *(copy / ".git", copy / ".run-20251123", copy / "checkpoints" / ".notes-20251123"),
        *(copy.parent / ".copy-0123abcd.unfinished", copy.parent / ".copy-set-up"),
    ]
    for folder in leftovers + others:
        folder.mkdir()
        (folder / "file").touch()
    trained(["--out", str(copy), "--resume"])
    assert [folder for folder in leftovers if folder.exists()] == []
    assert all((folder / "file").exists() for folder in others)


def test_resume_takes_no_other_option(copy: Path, refused: Refused) -> None:
    refused(["--out", str(copy), "--resume", "--learning-rate", "1"], "--learning-rate", "--resume with --out")


def test_a_run_is_not_begun_twice(copy: Path, config: Path, text: Path, refused: Refused) -> None:
    before = contents(copy)
    refused(arguments(copy, config, [text]), "holds a run already", "--resume")
    assert contents(copy) == before


def test_two_processes_are_not_let_into_one_run(copy: Path, refused: Refused) -> None:
    with RunFolder(copy).locked():
        refused(["--out", str(copy), "--resume"], "another process")


def test_defaults_are_the_recipes(
    config: Path, text: Path, tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    trained(arguments(out, config, [text], steps=1))
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert recipe == json.loads(json.dumps(asdict(Recipe(steps=1))))
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "highest learning rate (default: 0.001)",
        "after the warm-up (default: cosine)",
        "(default: float32)",
    ):
        assert words in said


# The data


def test_held_out_documents_are_the_named_ones(config: Path, tmp_path: Path, trained: Trained) -> None:
    """Copies of them, up to white space, are kept out of training and of the tokenizer."""
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    for folder in (train, held_out):
        folder.mkdir()
    write_text(train / "text.txt")
    secret = "QXJZ qxjz QXJZ qxjz. " * 1000
    (train / "copy.txt").write_text(secret.replace(" ", "\n"))
    (held_out / "secret.txt").write_text(secret)
    out = tmp_path / "run"
    err = trained(arguments(out, config, [train], held_out=held_out))
    assert "1 documents are held out" in err
    tokenizer = read_tokenizer(out / "tokenizer")
    tokens = {name: read_token_file(out / "data" / name).tokens.tolist() for name in ("train", "held_out")}
    assert tokenizer.decode(tokens["held_out"]).count("QXJZ") == 2000
    assert "qxjz" not in tokenizer.decode(tokens["train"]).lower()
    # As no merge of theirs was learned, they are spelled by bytes.
    assert len(tokenizer.encode("qxjz")) == 4


def test_a_share_is_held_out(config: Path, tmp_path: Path, trained: Trained) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    out = tmp_path / "run"
    trained(arguments(out, config, [data], held_out_share=0.25))
    train, held_out = (read_token_file(out / "data" / name) for name in ("train", "held_out"))
    assert train.documents + held_out.documents == 120
    assert 15 <= held_out.documents <= 45
    assert train.targets is not None
    assert 0 < train.target_count < len(train)


def test_nothing_is_held_out_if_so_asked(config: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "run"
    trained(arguments(out, config, [text], held_out_share=0))
    assert names(out / "data") == ["train"]
    assert not (out / "expert_load.png").exists()
    assert not any("held_out_nats_per_token" in line for line in metrics(out))


# The model


def test_training_goes_on_from_a_checkpoint(finished: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    """With its weights, config and tokenizer; at a rate of 0 it stays what it was."""
    model = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    out = tmp_path / "run"
    given = arguments(out, None, [text], model=model, learning_rate=0, save_every=3)
    trained(given)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / "model" / file).read_bytes() == (model / file).read_bytes()
    # From its first checkpoint on the run needs nothing but its folder.
    shutil.rmtree(model)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    assert "resumed after step 3" in trained(["--out", str(out), "--resume"])


def test_a_relative_model_is_found_from_elsewhere(
    finished: Path, text: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    out = tmp_path / "run"
    trained(arguments(out, None, [text], model=Path("model")))
    expected = contents(out / "model")
    monkeypatch.chdir(tmp_path)
    for part in ("checkpoints", "model"):
        shutil.rmtree(out / part)
    trained(["--out", str(out), "--resume"])
    assert contents(out / "model") == expected


def test_a_tokenizer_can_be_named(finished: Path, config: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "run"
    trained(arguments(out, config, [text], tokenizer=finished / "model", seed=3))
    assert contents(out / "tokenizer") == contents(finished / "tokenizer")


def test_a_tokenizer_that_is_not_the_models_is_warned_of(
    finished: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    other = tmp_path / "other"
    save_tokenizer(train_bpe([text.read_text() * 2 + "zebra quagga " * 50], 280), other)
    for tokenizer, warnings in ((other, 1), (finished / "tokenizer", 0)):
        out = tmp_path / f"run-{warnings}"
        err = trained(arguments(out, None, [text], model=finished / "model", tokenizer=tokenizer, steps=1))
        said = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert len(said) == warnings
        assert all(f"{other} makes other tokens than {finished / 'model'}" in line for line in said)


def test_stop_tokens_that_only_the_config_names_are_kept(
    finished: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    model = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 8]}))
    assert read_tokenizer(model).stop_tokens == {7, 8}
    out = tmp_path / "run"
    trained(arguments(out, None, [text], model=model, steps=1))
    for folder in (out / "tokenizer", out / "model", out / "checkpoints" / "step-00000001"):
        assert read_tokenizer(folder).stop_tokens == {7, 8}
        assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5


def test_tokens_per_second_leave_only_evaluations_and_checkpoints_out(
    config: Path, text: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of every step counts, also of those that a checkpoint's write waits for."""
    save, times = RunFolder.save, []

    def timed(self: RunFolder, state: Any, *arguments: Any, **more: Any) -> None:
        mx.eval(state)
        times.append(time.perf_counter())
        save(self, state, *arguments, **more)
        times.append(time.perf_counter())

    monkeypatch.setattr(RunFolder, "save", timed)
    # As on a GPU, whose work isn't done when this returns; the CPU's mostly is.
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    # Steps that take long enough to be told from what else is done.
    more = {"batch_size": 256, "log_every": 100, "save_every": 1, "held_out_share": 0}
    trained(arguments(tmp_path / "run", config, [text], **more))
    (line,) = metrics(tmp_path / "run", clock=True)
    seconds = 5 * 256 * 16 / line["tokens_per_second"]
    between = sum(begin - end for end, begin in zip(times[1:-1:2], times[2::2], strict=True))
    assert 0.5 * between < seconds < 1.1 * between


def test_bfloat16_is_computed_in_and_float32_kept(config: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "run"
    trained(arguments(out, config, [text], dtype="bfloat16"))
    model: dict[str, mx.array] = dict(tree_flatten(load(out / "model")[0]))
    kept: dict[str, mx.array] = dict(tree_flatten(load(out / "checkpoints" / "step-00000006")[0]))
    for path, array in model.items():
        assert (array.dtype, kept[path].dtype) == (mx.bfloat16, mx.float32)
        assert mx.array_equal(array, kept[path].astype(mx.bfloat16)), path


def test_weights_of_the_losses_go_into_the_config(config: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "run"
    trained(arguments(out, config, [text], moe_loss_weight=0.5, moe_jitter_eps=0))
    ffn = json.loads((out / "model" / "config.json").read_text())["ffn_config"]
    assert (ffn["moe_loss_weight"], ffn["moe_jitter_eps"]) == (0.5, 0)
    line = metrics(out)[0]
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.5 * line["load_balance"], rel=1e-5)


# Without matplotlib, and interrupted

WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from dbrx_fn.train import main
sys.exit(main())
"""


def process(*command: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[3], **more
    )


def test_without_matplotlib_there_are_no_pictures_but_a_warning(config: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = process("-c", WITHOUT_MATPLOTLIB, *arguments(out, config, [text]))
    assert ended.returncode == 0, ended.stderr
    assert "warning: Pictures need matplotlib" in ended.stderr
    assert (out / "model").exists()
    assert list(out.glob("*.png")) == []


def test_ctrl_c_before_the_run_began_keeps_nothing(
    config: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dbrx_fn.train.write_token_file", interrupt)
    assert main(arguments(tmp_path / "run", config, [text])) == 130
    assert "interrupted: nothing is kept." in capsys.readouterr().err
    assert names(tmp_path) == []
