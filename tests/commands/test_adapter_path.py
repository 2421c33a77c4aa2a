"""`--adapter-path` in the commands that load a model."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn import bench, chat, evaluate, generate
from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.adapters import fuse_adapters
from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.serving.fingerprint import weights_fingerprint
from tests.support.adapters import with_random_adapters

CONFIG = Config(
    d_model=32, n_heads=2, n_layers=2, vocab_size=264, max_seq_len=2048, ffn=FFNConfig(16, 4, 2), dtype="float32"
)
Answers = Callable[..., str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters for it, and the model with these merged."""
    path = tmp_path_factory.mktemp("adapters")
    write_random_checkpoint(path / "model", CONFIG, mx.random.key(0))
    params, config = load(path / "model")
    adapted = with_random_adapters(params, config, ("attention", "experts", "head"))
    save_adapters(path / "adapters", adapted, config)
    save(path / "merged", fuse_adapters(adapted, config), config, tokenizer_files=path / "model")
    return path


def _generated(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    words = ["--prompt", "Who goes there?", "--max-tokens", "24", "--temp", "0", *map(str, options)]
    assert generate.main(words) == 0
    return capsys.readouterr().out


def test_generate_and_chat_answer_as_the_merged_model_does(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _generated(capsys, "--model", folders / "model")
    adapted = _generated(capsys, "--model", folders / "model", "--adapter-path", folders / "adapters")
    assert adapted == _generated(capsys, "--model", folders / "merged") != plain

    def chatted(*options: object) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who goes there?\n")))
        assert chat.main(["--max-tokens", "24", "--temp", "0", *map(str, options)]) == 0
        return capsys.readouterr().out

    adapted = chatted("--model", folders / "model", "--adapter-path", folders / "adapters")
    assert adapted == chatted("--model", folders / "merged") != chatted("--model", folders / "model")


def test_a_model_in_place_of_adapters_and_the_reverse(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a", "--model", str(folders / "model"), "--adapter-path", str(folders / "merged")]
    assert generate.main(words) == 2
    assert "is a model where adapters are expected" in capsys.readouterr().err
    assert generate.main(["--prompt", "a", "--model", str(folders / "adapters")]) == 2
    assert "error: " in capsys.readouterr().err


def test_cached_prompts_of_the_plain_model_are_not_taken_for_those_with_adapters(folders: Path) -> None:
    plain, config = load(folders / "model")
    adapted, _ = load(folders / "model", adapter_path=folders / "adapters")
    assert weights_fingerprint(plain, config) != weights_fingerprint(adapted, config)


def test_evaluate_measures_the_first_model_with_adapters_as_one_more_row(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("When shall we three meet again? " * 8)
    words = ["perplexity", str(folders / "model"), str(folders / "merged"), "--data", str(tmp_path / "text.txt")]
    words += ["--sequence-length", "64", "--json", "--adapter-path", str(folders / "adapters")]
    assert evaluate.main(words) == 0
    _, merged, adapted = json.loads(capsys.readouterr().out)["models"]
    assert adapted["model"].startswith(f"{folders / 'model'} with ")
    assert adapted["perplexity"] == pytest.approx(merged["perplexity"], rel=1e-5)
    assert adapted["kl_divergence"] == pytest.approx(merged["kl_divergence"], rel=1e-3) != 0


def test_bench_measures_the_model_with_adapters(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inference", "--model", str(folders / "model"), "--adapter-path", str(folders / "adapters"), "--json"]
    words += ["--prompt", "16", "--context", "16", "--batch-size", "1", "--tokens", "2", "--repeats", "1"]
    assert bench.main(words) == 0
    assert json.loads(capsys.readouterr().out)["figures"]
    assert bench.main([*words, "--peer", "mlx-lm"]) == 2
    assert "--adapter-path can't be combined with" in capsys.readouterr().err
    words[4] = str(folders / "merged")
    assert bench.main(words) == 2
    assert "is a model where adapters are expected" in capsys.readouterr().err


def test_bench_serving_measures_a_server_with_the_adapters(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serving", "--model", str(folders / "model"), "--capacity", "1024", "--decode-concurrency", "2", "--json"]
    words += ["--clients", "1", "--requests", "2", "--prompt", "8", "--tokens", "4", "--adapter-path"]
    assert bench.main([*words, str(folders / "adapters")]) == 0
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert (figure["failures"], figure["requests"]) == ({}, 2)
    # The server that is started takes them, or says why not. A name would leave the measured model without them.
    for value, said in (
        (folders / "merged", "is a model where adapters are expected"),
        (f"lear={folders / 'adapters'}", "doesn't exist where a folder with adapters is expected"),
    ):
        assert bench.main([*words, str(value)]) == 2
        assert said in capsys.readouterr().err
