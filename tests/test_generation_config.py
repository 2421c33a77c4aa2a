"""What a checkpoint's `generation_config.json` says about sampling, alone and under the command's options."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.config import Config, FFNConfig
from dbrx_fn.errors import CheckpointError
from dbrx_fn.generate import main
from dbrx_fn.generation_config import read_sampling
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.sampling import Sampling


def written(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, Sampling()),
        ({"eos_token_id": [1, 2]}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling()),
        ({"do_sample": False, "temperature": 0.7}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.01},
            Sampling(temperature=0.7, top_p=0.95, top_k=50, repetition_penalty=1.01),
        ),
        ({"do_sample": True, "temperature": None, "min_p": 0.1, "num_beams": 4}, Sampling(temperature=1.0, min_p=0.1)),
    ],
)
def test_what_the_file_says(content: dict[str, Any], expected: Sampling, tmp_path: Path) -> None:
    assert read_sampling(written(tmp_path, content)) == expected


def test_no_file_takes_the_likeliest(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == Sampling()


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("{", CheckpointError, ["generation_config.json", "JSON"]),
        ({"do_sample": True, "temperature": "warm"}, CheckpointError, ["temperature", "'warm'"]),
        ({"do_sample": True, "top_k": True}, CheckpointError, ["top_k", "True"]),
        ({"do_sample": True, "top_p": 2}, CheckpointError, ["generation_config.json", "top_p", "2"]),
        ({"do_sample": True, "temperature": -1}, CheckpointError, ["generation_config.json", "temperature", "-1"]),
        ({"do_sample": True, "top_k": 2.5}, CheckpointError, ["generation_config.json", "top_k", "2.5"]),
        ('{"do_sample": true, "top_k": 1e999}', CheckpointError, ["generation_config.json", "top_k"]),
    ],
)
def test_what_it_cannot_say(content: object, kind: type[Exception], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(kind) as raised:
        read_sampling(written(tmp_path, content))
    assert all(word in str(raised.value) for word in words)


def test_options_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    config = Config(d_model=16, n_heads=2, n_layers=1, vocab_size=264, ffn=FFNConfig(8, 2, 1), dtype="float32")
    write_random_checkpoint(folder, config, mx.random.key(0))

    def tokens(*options: str) -> list[int]:
        assert main(["--model", str(folder), "-p", "a", "-m", "12", "--seed", "1", "--json", *options]) == 0
        made: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return made

    likeliest, drawn = tokens(), tokens("--temp", "1", "--top-k", "90")
    settings = json.loads((folder / "generation_config.json").read_text())
    written(folder, settings | {"do_sample": True, "temperature": 1.0, "top_k": 90})
    assert likeliest != drawn
    assert tokens() == drawn
    assert tokens("--temp", "0", "--top-k", "0") == likeliest
