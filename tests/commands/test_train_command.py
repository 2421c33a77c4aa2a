"""`python -m dbrx_fn.train` as a user meets it: what it leaves in its folder, what it prints, and what it says when
asked for something that can't work."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn import generate
from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.data.token_file import read_token_file
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.ops.formats import Format
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
    write_config,
    write_conversations,
    write_text,
)

Trained = Callable[..., str]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "config.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.md")


@pytest.fixture(scope="module")
def finished(config: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to look at."""
    out = tmp_path_factory.mktemp("finished") / "run"
    given = arguments(out, config, [text], steps=12, save_every=4, eval_every=5, log_every=2, keep=2)
    assert main(given) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def trained(capsys: pytest.CaptureFixture[str]) -> Trained:
    """Runs the command, which must succeed, and returns what it printed on standard error."""

    def run(given: list[str]) -> str:
        status = main(given)
        err = capsys.readouterr().err
        assert status == 0, err
        return err

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must end with status 2 and one last sentence that has these words."""

    def run(given: list[str], *words: str) -> str:
        status = main(given)
        out, err = capsys.readouterr()
        return check_refused(status, out, err, *words)

    return run


def check_refused(status: int, out: str, err: str, *words: str) -> str:
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == err.splitlines()[-1:]
    assert errors[0].endswith(".")
    for word in words:
        assert word in errors[0]
    return errors[0]


def parameters(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    leaves: dict[str, mx.array] = dict(tree_flatten(load(checkpoint)[0]))
    return {path: np.array(array.astype(mx.float32)) for path, array in leaves.items()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


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
        [sys.executable, *command], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2], **more
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


# What can't work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, ("steps is 0", "at least 1")),
        ({"batch_size": 0}, ("--batch-size is 0", "at least 1")),
        ({"micro_batches": 0}, ("micro_batches is 0", "at least 1")),
        ({"micro_batches": 3}, ("--batch-size is 4", "multiple of --micro-batches, 3")),
        ({"sequence_length": 0}, ("--sequence-length is 0", "at least 1")),
        ({"sequence_length": 65}, ("--sequence-length is 65", "context holds 64")),
        ({"learning_rate": -1}, ("learning_rate is -1",)),
        ({"learning_rate": "nan"}, ("learning_rate is nan",)),
        ({"warmup": 7}, ("warmup is 7", "6")),
        ({"final_share": 2}, ("final_share is 2",)),
        ({"weight_decay": "nan"}, ("weight_decay is nan",)),
        ({"clip_norm": 0}, ("clip_norm is 0",)),
        ({"z_loss_weight": -1}, ("z_loss_weight is -1",)),
        ({"moe_loss_weight": "nan"}, ("moe_loss_weight is nan",)),
        ({"moe_jitter_eps": 1}, ("moe_jitter_eps is 1",)),
        ({"seed": -1}, ("seed is -1",)),
        ({"seed": 2**64}, ("seed is 18446744073709551616",)),
        ({"log_every": 0}, ("--log-every is 0",)),
        ({"eval_every": -1}, ("--eval-every is -1",)),
        ({"save_every": 0}, ("--save-every is 0",)),
        ({"keep": 0}, ("--keep is 0",)),
        ({"held_out_share": 1}, ("share to hold out is 1",)),
        ({"held_out_share": "nan"}, ("share to hold out is nan",)),
        ({"model": "nowhere"}, ("--model and --config",)),
        ({"tokenizer": "nowhere"}, ("nowhere doesn't exist",)),
        ({"held_out": "nowhere.md"}, ("nowhere.md doesn't exist",)),
    ],
)
def test_options_that_cannot_work(
    options: dict[str, Any], words: tuple[str, ...], config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    refused(arguments(tmp_path / "run", config, [text], **options), *words)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.md", b"", ("a.md holds no text",)),
        ("a.md", b" \n\n ", ("a.md holds no text",)),
        ("a.md", b"\xff\xfe", ("a.md isn't UTF-8 at byte 0",)),
        ("a.md", None, ("a.md doesn't exist",)),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ("a.jsonl, line 3", "isn't JSON")),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', ("a.jsonl, line 2", "JSON object")),
        ("a.jsonl", b'{"txt": "a"}\n', ("a.jsonl, line 1", "'txt'")),
        ("a.md", b"When shall we three meet again?", ("enough for", "a vocabulary of 300")),
    ],
)
def test_data_that_cannot_be_learned_from(
    name: str, content: bytes | None, words: tuple[str, ...], config: Path, tmp_path: Path, refused: Refused
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(arguments(tmp_path / "run", config, [tmp_path / name]), *words)
    assert not (tmp_path / "run").exists()


def test_a_text_shorter_than_one_sequence(finished: Path, config: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "a.md").write_text("When shall we three meet again?")
    given = arguments(tmp_path / "run", config, [tmp_path / "a.md"], tokenizer=finished / "model", sequence_length=60)
    refused(given, "tokens where one sequence of 60 needs 61")
    assert names(tmp_path) == ["a.md"]


def test_a_text_of_empty_completions(
    finished: Path, config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "When shall we meet?", "completion": ""}\n' * 2)
    for train, held_out in ((data, text), (text, data)):
        given = arguments(tmp_path / "run", config, [train], held_out=held_out, tokenizer=finished / "model")
        refused([*given, "--sequence-length", "4"], "nothing to predict")


def test_no_data(config: Path, tmp_path: Path, refused: Refused) -> None:
    refused(["--out", str(tmp_path / "run"), "--config", str(config)], "--data is missing")


def test_a_tokenizer_that_does_not_match_the_config(
    finished: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    small = write_config(tmp_path / "config.json", vocab_size=280)
    given = arguments(tmp_path / "run", small, [text], tokenizer=finished / "model")
    refused(given, "tokens go up to 299", "vocab_size is 280")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama"}'])
def test_a_config_that_is_none(content: str, text: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text(content)
    refused(arguments(tmp_path / "run", tmp_path / "config.json", [text]), "config.json")
    refused(
        arguments(tmp_path / "run", tmp_path / "nowhere.json", [text]), "nowhere.json doesn't exist: name a config.json"
    )


def test_a_model_that_is_too_large(text: Path, tmp_path: Path, refused: Refused) -> None:
    config = write_config(tmp_path / "config.json", d_model=8192, n_layers=400)
    refused(arguments(tmp_path / "run", config, [text]), "GiB for training", "smaller model")


def test_a_run_resumed_on_a_machine_that_is_too_small(copy: Path, refused: Refused) -> None:
    settings = json.loads((copy / "run.json").read_text())
    settings["config"] |= {"d_model": 8192, "n_layers": 400}
    (copy / "run.json").write_text(json.dumps(settings))
    refused(["--out", str(copy), "--resume"], "GiB for training", "larger machine")


def test_a_batch_that_is_too_large(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    given = arguments(tmp_path / "run", config, [text], batch_size=10**12)
    refused(given, "first step can't be computed", "--batch-size", "--micro-batches", "--recompute")


@pytest.mark.parametrize("lazily", [False, True])
def test_a_step_that_mlx_cannot_compute(
    lazily: bool, config: Path, text: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX says so in a RuntimeError, of a GPU's memory too, at once or when what it promised is computed."""

    def fail(state: Any, *_: Any, **__: Any) -> tuple[Any, mx.array]:
        if not lazily:
            raise RuntimeError("[metal::malloc] Unable to allocate.")
        file = tmp_path / "cut.npy"
        mx.save(str(file), mx.zeros(10_000))
        promised = mx.load(str(file))
        os.truncate(file, 200)
        assert isinstance(promised, mx.array)
        return state, promised

    monkeypatch.setattr("dbrx_fn.runs.loop.train_step", fail)
    said = "read" if lazily else "metal::malloc"
    refused(arguments(tmp_path / "run", config, [text]), "first step can't be computed", said, "--batch-size")


def test_a_model_without_weights(finished: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    model = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    refused(arguments(tmp_path / "run", None, [text], model=model), "safetensors")
    assert not (tmp_path / "run").exists()


def test_a_quantized_model_is_trained_as_the_floats_that_it_stands_for(
    finished: Path, text: Path, tmp_path: Path, trained: Trained
) -> None:
    """From the same floats, saved dense, comes the same run."""
    params, config = load(finished / "model")
    packed = quantize(params, config, Quantization(Format(4, 32), None, None, None, None))
    save(tmp_path / "packed", packed, config, tokenizer_files=finished / "model")
    save(tmp_path / "dense", dequantize(packed, config), config, tokenizer_files=finished / "model")
    for name in ("packed", "dense"):
        said = trained(arguments(tmp_path / f"{name}-run", None, [text], model=tmp_path / name))
        assert ("is quantized: its weights are dequantized, and trained as floats" in said) == (name == "packed")
    assert contents(tmp_path / "packed-run" / "model") == contents(tmp_path / "dense-run" / "model")
    # It begins again from the same floats where there is no checkpoint yet.
    shutil.rmtree(tmp_path / "packed-run" / "checkpoints")
    trained(["--out", str(tmp_path / "packed-run"), "--resume"])
    assert contents(tmp_path / "packed-run" / "model") == contents(tmp_path / "dense-run" / "model")


def test_the_small_model_that_ships_here_is_fine_tuned(text: Path, tmp_path: Path, trained: Trained) -> None:
    given = arguments(tmp_path / "run", None, [text], model=SMALL, steps=1, learning_rate=0)
    assert f"{SMALL} is quantized" in trained(given)
    params, config = load(SMALL)
    expected: dict[str, mx.array] = dict(tree_flatten(dequantize(params, config)))
    for path, array in parameters(tmp_path / "run" / "model").items():
        assert np.array_equal(array, np.array(expected[path])), path


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_out_that_is_something_else_is_left_alone(
    what: str, config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "data"
    if what == "file":
        out.write_text("precious")
    else:
        # What a user's own folder may hold, the names of a run's among it.
        for name in (".git", "held_out", "train"):
            (out / name).mkdir(parents=True)
            (out / name / "file").write_text("precious")
    before = contents(tmp_path)
    refused(arguments(out, config, [text]), "exists already")
    assert contents(tmp_path) == before


def test_an_empty_out_is_taken(config: Path, text: Path, tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "run").mkdir()
    trained(arguments(tmp_path / "run", config, [text]))
    assert names(tmp_path) == ["run"]


def test_an_out_that_cannot_be_made(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").touch()
    refused(arguments(tmp_path / "file" / "run", config, [text]), "can't be written")
    refused(arguments(Path("/proc/run"), config, [text]), "can't be written")
    refused(["--out", str(tmp_path / ("x" * 300)), "--resume"], "can't be read")


def test_nothing_to_resume(tmp_path: Path, refused: Refused) -> None:
    refused(["--out", str(tmp_path / "run"), "--resume"], "no run to resume")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "Expecting value"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[]", "where an object is expected"),
        (b'{"seed": 1, "seed": 2}', "'seed' is there twice"),
        (b"[" * 10**5, "nested too deeply"),
        (b"{}", "recipe"),
        (b'{"recipe": {"steps": "six"}}', "betas"),
        (b'{"recipe": {"steps": "six", "betas": []}, "config": {}}', "steps is 'six'"),
        (b'{"recipe": {"steps": 6, "warmup": 1.5, "betas": []}, "config": {}}', "warmup is 1.5"),
        (b'{"recipe": {"steps": 6, "warmup": 1, "betas": [], "eps": 1}, "config": {}}', "betas is ()"),
    ],
)
def test_damaged_settings(content: bytes, word: str, copy: Path, refused: Refused) -> None:
    (copy / "run.json").write_bytes(content)
    refused(["--out", str(copy), "--resume"], "run.json", "start the run again", word)


@pytest.mark.parametrize(("name", "value"), [("batch_size", "4"), ("keep", 0), ("seed", None), ("extra", 1)])
def test_settings_that_cannot_be(name: str, value: object, copy: Path, refused: Refused) -> None:
    settings = json.loads((copy / "run.json").read_text()) | {name: value}
    (copy / "run.json").write_text(json.dumps(settings))
    refused(["--out", str(copy), "--resume"], "run.json", name.replace("_", "-"), "start the run again")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "training/state.json", "training/state.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "noise", "a bit"])
def test_damaged_checkpoints(file: str, damage: str, copy: Path, finished: Path, trained: Trained) -> None:
    """The one before is gone on from, which is told, and the damaged one is made again; what is left of it stays."""
    checkpoint = copy / "checkpoints" / "step-00000012"
    damaged = checkpoint / file
    content = bytearray(damaged.read_bytes())
    if damage == "gone":
        damaged.unlink()
    elif damage == "cut":
        damaged.write_bytes(content[: len(content) // 2])
    else:
        content[-20:] = content[-20:-1] + bytes([content[-1] ^ 1]) if damage == "a bit" else b"\xff" * 20
        damaged.write_bytes(content)
    said = trained(["--out", str(copy), "--resume"])
    aside = [entry for entry in (copy / "checkpoints").iterdir() if entry.name.startswith("damaged-step-00000012-")]
    assert len(aside) == 1
    assert f"warning: The checkpoint {checkpoint} is damaged (" in said
    assert f"and is now called {aside[0].name}: the run goes on after step 8 instead." in said
    assert "resumed after step 8" in said
    shutil.rmtree(aside[0])
    for part in ("checkpoints", "model"):
        assert contents(copy / part) == contents(finished / part)
    assert metrics(copy) == metrics(finished)


def test_no_checkpoint_is_whole(copy: Path, finished: Path, refused: Refused, trained: Trained) -> None:
    """Nothing is moved; without them the run begins again, as is said."""
    for step in (8, 12):
        file = copy / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    said = refused(["--out", str(copy), "--resume"], "holds no whole checkpoint", "--resume begins with the first step")
    assert all(f"step-{step:08d}: " in said for step in (8, 12))
    assert names(copy / "checkpoints") == ["step-00000008", "step-00000012"]
    shutil.rmtree(copy / "checkpoints")
    trained(["--out", str(copy), "--resume"])
    for part in ("checkpoints", "model"):
        assert contents(copy / part) == contents(finished / part)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(copy: Path, finished: Path, trained: Trained) -> None:
    (copy / "checkpoints" / "step-00000012").rename(copy / "checkpoints" / "step-00000011")
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000011 is damaged (it is of step 12)" in said
    assert "resumed after step 8" in said
    assert contents(copy / "model") == contents(finished / "model")


def test_a_checkpoint_that_holds_nan_is_not_the_last_good(copy: Path, trained: Trained) -> None:
    """As an earlier version might have saved it, without sums."""
    checkpoint = copy / "checkpoints" / "step-00000012"
    weights = dict(mx.load(str(checkpoint / "model.safetensors")))  # type: ignore[arg-type]
    weights["lm_head.weight"][3, 3] = float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), weights, {"format": "pt"})
    note = json.loads((checkpoint / "training" / "state.json").read_text())
    (checkpoint / "training" / "state.json").write_text(json.dumps({key: note[key] for key in ("step", "tensors")}))
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000012 is damaged (params.lm_head.weight holds NaN or infinity)" in said
    assert "resumed after step 8" in said


def test_checkpoints_of_an_earlier_version_are_taken_with_a_warning(
    copy: Path, finished: Path, trained: Trained
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    shutil.rmtree(copy / "model")
    file = copy / "checkpoints" / "step-00000008" / "training" / "state.json"
    note = json.loads(file.read_text())
    file.write_text(json.dumps({key: note[key] for key in ("step", "tensors")}))
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000008 has no checksums, as an earlier version wrote it: damage isn't seen." in said
    assert contents(copy / "model") == contents(finished / "model")


def test_a_checkpoint_of_another_run(
    copy: Path, text: Path, tmp_path: Path, refused: Refused, trained: Trained
) -> None:
    other = write_config(tmp_path / "config.json", n_layers=1)
    trained(arguments(tmp_path / "other", other, [text], steps=16))
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000016", copy / "checkpoints" / "step-00000016")
    said = refused(["--out", str(copy), "--resume"], "step-00000016 belongs to another run")
    assert "config.n_layers is 2 here and 1 there" in said
    assert names(copy / "checkpoints") == ["step-00000008", "step-00000012", "step-00000016"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "n_heads"), 2),
        (("config", "attn_config", "kv_n_heads"), 4),
        (("config", "ffn_config", "moe_loss_weight"), 0.5),
        (("recipe", "learning_rate"), 0.5),
        (("recipe", "dtype"), "bfloat16"),
        (("batch_size",), 8),
        (("sequence_length",), 8),
        (("seed",), 1),
    ],
)
def test_settings_that_the_checkpoints_were_not_made_with(
    path: tuple[str, ...], value: object, copy: Path, refused: Refused
) -> None:
    settings = json.loads((copy / "run.json").read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (copy / "run.json").write_text(json.dumps(settings))
    before = contents(copy)
    said = refused(["--out", str(copy), "--resume"], "belongs to another run, or this one was changed")
    assert f"{'.'.join(path)} is {value!r} here and" in said
    assert contents(copy) == before


def test_what_decides_nothing_may_be_changed(copy: Path, finished: Path, trained: Trained) -> None:
    settings = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(settings | {"save_every": 3, "log_every": 1, "eval_every": 6, "keep": 1}))
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    trained(["--out", str(copy), "--resume"])
    assert contents(copy / "model") == contents(finished / "model")
    assert names(copy / "checkpoints") == ["step-00000012"]


def test_data_of_another_run(copy: Path, config: Path, tmp_path: Path, refused: Refused, trained: Trained) -> None:
    """Whole files, which say that they are of another text."""
    other = tmp_path / "other"
    trained(arguments(other, config, [write_text(tmp_path / "other.md", seed=5)], tokenizer=copy / "tokenizer"))
    for name in ("train", "held_out"):
        shutil.rmtree(copy / "data" / name)
        shutil.copytree(other / "data" / name, copy / "data" / name)
        refused(["--out", str(copy), "--resume"], "isn't made of what run.json notes", "data.")


@pytest.mark.parametrize("what", ["changed", "gone", "added"])
def test_a_tokenizer_that_is_another(what: str, copy: Path, refused: Refused) -> None:
    file = copy / "tokenizer" / ("added_tokens.json" if what == "added" else "tokenizer.json")
    if what == "gone":
        file.unlink()
    else:
        file.write_text("{}")
    shutil.rmtree(copy / "checkpoints")
    refused(["--out", str(copy), "--resume"], "isn't made of what run.json notes", f"tokenizer.{file.name}")


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_metrics(line: bytes, copy: Path, refused: Refused) -> None:
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    (copy / "metrics.jsonl").write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    refused(["--out", str(copy), "--resume"], "metrics.jsonl, line 2")


# Numbers that leave their range


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "run"
    given = arguments(out, config, [text], steps=200, warmup=200, learning_rate=1e6, save_every=1, clip_norm=1e9)
    said = refused(given, "training stops", "the last good checkpoint is", "lower --learning-rate")
    run = RunFolder(out)
    last = run.saved_steps()[-1]
    assert str(run.checkpoint(last)) in said
    assert any(f"step {step}," in said for step in (last + 1, last + 2))
    assert all(np.isfinite(array).all() for array in parameters(run.checkpoint(last)).values())
    lines = (out / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert "Infinity" not in lines
    assert not (out / "model").exists()


def test_a_last_update_that_leaves_the_range_is_not_saved(
    config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    """Though loss and gradients were finite."""
    more = {"warmup": 0, "learning_rate": 1e38, "weight_decay": 1e3, "held_out_share": 0}
    given = arguments(tmp_path / "run", config, [text], steps=1, **more)
    refused(given, "holds NaN or infinity after step 1", "no checkpoint was saved yet")
    assert RunFolder(tmp_path / "run").saved_steps() == []


def test_held_out_text_whose_loss_leaves_the_range(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    more = {"warmup": 0, "learning_rate": 1e38, "weight_decay": 1e3}
    refused(
        arguments(tmp_path / "run", config, [text], steps=1, **more), "held-out text's loss became nan after step 1"
    )
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_weights_that_hold_nan(text: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    config = config_from_dict(TINY)
    params = init_params(config, mx.random.key(0))
    params["lm_head"]["weight"][3, 3] = float("nan")
    save(tmp_path / "model", params, config, tokenizer_files=finished / "model")
    given = arguments(tmp_path / "run", None, [text], model=tmp_path / "model")
    refused(given, "The loss became nan at step 1", "no checkpoint was saved yet")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mount"), reason="needs Linux's tmpfs")
@pytest.mark.parametrize("left", [0, 50_000, 300_000, 590_000])
def test_a_full_disk(
    left: int, copy: Path, finished: Path, small_disk: Path, refused: Refused, trained: Trained
) -> None:
    """However much of a checkpoint still fits: what was there stays, and with room the run ends as it should."""
    for part in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(copy / part)
    run = Path(shutil.copytree(copy, small_disk / "run"))
    filler = small_disk / "filler"
    # Room for the lines of metrics.jsonl, which are written before.
    size = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 8192 - left
    filler.write_bytes(bytes(size))
    refused(["--out", str(run), "--resume"], "No space left")
    assert names(run / "checkpoints") == ["step-00000008"]
    assert contents(run / "checkpoints") == {
        name: content for name, content in contents(finished / "checkpoints").items() if "-00000008" in name
    }
    filler.unlink()
    trained(["--out", str(run), "--resume"])
    assert metrics(run) == metrics(finished)
    for part in ("checkpoints", "model"):
        assert contents(run / part) == contents(finished / part)


def test_files_that_may_not_grow(copy: Path, finished: Path, refused: Refused, trained: Trained) -> None:
    """As of a quota: the same, on any machine."""
    for part in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(copy / part)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        refused(["--out", str(copy), "--resume"], "step-00000012 can't be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(copy / "checkpoints") == ["step-00000008"]
    trained(["--out", str(copy), "--resume"])
    assert contents(copy / "checkpoints") == contents(finished / "checkpoints")


def test_a_disk_that_is_full_before_the_run_begins(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        refused(arguments(tmp_path / "run", config, [text]), "can't be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
