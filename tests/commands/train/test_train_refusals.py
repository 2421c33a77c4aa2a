"""What `python -m dbrx_fn.train` says when asked for what can't work."""

import json
import os
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
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.ops.formats import Format
from tests.support.tiny_runs import (
    arguments,
    contents,
    names,
    parameters,
    write_config,
)

Trained = Callable[..., str]
Refused = Callable[..., str]


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
