"""What a checkpoint's `generation_config.json` says about sampling, alone and under the command's options."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.errors import CheckpointError
from dbrx_fn.generate import main
from dbrx_fn.generation.generation_config import GenerationConfig, read_generation_config
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint


def written(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, Sampling()),
        ({"eos_token_id": [1, 2]}, Sampling()),
        # What acts on greedy decoding does so without do_sample; filters wait for a temperature.
        ({"repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3)),
        ({"do_sample": False, "temperature": 0.7}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 40}, Sampling(top_p=0.9, top_k=40)),
        ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": 0}, Sampling(temperature=1.0)),
        ({"top_k": 10**400}, Sampling(top_k=10**400)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.01},
            Sampling(temperature=0.7, top_p=0.95, top_k=40, repetition_penalty=1.01),
        ),
        ({"do_sample": True, "temperature": None, "min_p": 0.1}, Sampling(temperature=1.0, top_k=50, min_p=0.1)),
    ],
)
def test_what_the_file_says(content: dict[str, Any], expected: Sampling, tmp_path: Path) -> None:
    assert read_generation_config(written(tmp_path, content)) == GenerationConfig(expected, None, ())


def test_limits_that_the_file_sets(tmp_path: Path) -> None:
    for stops, expected in (("x", ("x",)), (["x", "yy"], ("x", "yy")), ([], ()), (None, ())):
        config = read_generation_config(written(tmp_path, {"max_new_tokens": 7, "stop_strings": stops}))
        assert config == GenerationConfig(Sampling(), 7, expected)


def test_no_file_takes_the_likeliest(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig(Sampling(), None, ())


UNSUPPORTED: dict[str, Any] = {
    **{"no_repeat_ngram_size": 3, "suppress_tokens": [5], "num_beams": 4, "bad_words_ids": [[7]], "min_length": 9},
    **{"min_new_tokens": 9, "begin_suppress_tokens": [5], "sequence_bias": [[[5], -9.0]], "forced_eos_token_id": 3},
    **{"exponential_decay_length_penalty": [2, 1.5], "guidance_scale": 2.0, "encoder_repetition_penalty": 1.5},
}
NEUTRAL: dict[str, Any] = {
    **{"no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0, "suppress_tokens": None, "guidance_scale": 1.0},
    **{"bos_token_id": 1, "pad_token_id": 2, "use_cache": True, "transformers_version": "5", "length_penalty": 2.0},
    **{"early_stopping": True, "_from_model_config": True, "encoder_repetition_penalty": 1.0, "max_length": 4096},
}
UNSUPPORTED_DRAWS: dict[str, Any] = {"typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.4}


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_is_not_supported_is_warned_of_by_name(do_sample: bool, tmp_path: Path) -> None:
    draws = UNSUPPORTED | (UNSUPPORTED_DRAWS if do_sample else {})
    for name, value in draws.items():
        with pytest.warns(UserWarning, match=rf"generation_config\.json asks for {name}, which is not supported here"):
            read_generation_config(written(tmp_path, NEUTRAL | {"do_sample": do_sample, name: value}))
    with pytest.warns(UserWarning, match="are not supported here") as caught:
        read_generation_config(written(tmp_path, {"do_sample": do_sample, **draws}))
    [warning] = caught
    assert all(name in str(warning.message) for name in draws)


def test_what_has_no_effect_is_not_warned_of(tmp_path: Path) -> None:
    """Warnings are errors here."""
    for content in (NEUTRAL, NEUTRAL | UNSUPPORTED_DRAWS, {"do_sample": True, **NEUTRAL, "typical_p": 1.0}):
        read_generation_config(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("{", CheckpointError, ["generation_config.json", "JSON"]),
        ([1], CheckpointError, ["generation_config.json", "[1]", "object"]),
        ({"do_sample": "false"}, CheckpointError, ["do_sample", "'false'", "true or false"]),
        ({"repetition_penalty": 0}, CheckpointError, ["repetition_penalty", "0"]),
        ({"max_new_tokens": 0}, CheckpointError, ["max_new_tokens", "0", "at least 1"]),
        ({"max_new_tokens": 1.5}, CheckpointError, ["max_new_tokens", "1.5"]),
        ({"stop_strings": [""]}, CheckpointError, ["stop_strings", "['']"]),
        ({"stop_strings": 5}, CheckpointError, ["stop_strings", "5"]),
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
        read_generation_config(written(tmp_path, content))
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
    # Filters apply to who asks for a temperature, penalties and limits to all.
    written(folder, settings | {"temperature": 3.0, "top_k": 90})
    assert tokens() == likeliest
    assert tokens("--temp", "1") == drawn
    written(folder, settings | {"repetition_penalty": 5.0})
    assert tokens() != likeliest
    assert tokens() == tokens("--repetition-penalty", "5")
    assert tokens("--repetition-penalty", "1") == likeliest


def test_the_file_limits_the_text_where_no_option_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    config = Config(d_model=16, n_heads=2, n_layers=1, vocab_size=264, ffn=FFNConfig(8, 2, 1), dtype="float32")
    write_random_checkpoint(folder, config, mx.random.key(0))
    always_a = ["--logit-bias", "64:inf"]

    def report(*options: str) -> dict[str, Any]:
        assert main(["--model", str(folder), "-p", "a", "--json", *always_a, *options]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    a = report("-m", "1")["text"]
    assert len(report()["tokens"]) == 100
    written(folder, {"max_new_tokens": 7})
    assert len(report()["tokens"]) == 7
    assert len(report("-m", "9")["tokens"]) == 9
    written(folder, {"stop_strings": [3 * a]})
    assert (report()["finish_reason"], len(report()["tokens"])) == ("stop", 3)
    assert len(report("--stop", 5 * a)["tokens"]) == 5
