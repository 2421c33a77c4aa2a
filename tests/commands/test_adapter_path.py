"""`--adapter-path` in the commands that load a model."""

import io
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn import chat, generate
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
