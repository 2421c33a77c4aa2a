"""Adapters that can't be used: every command refuses them in one sentence, with status 2, and writes nothing."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn import bench, chat, convert, evaluate, fuse, generate, serve, train
from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.adapter_names import SETTINGS, TENSORS
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support.adapters import with_random_adapters
from tests.support.tiny_runs import names

CONFIG = Config(
    d_model=32, n_heads=2, n_layers=2, vocab_size=264, max_seq_len=2048, ffn=FFNConfig(16, 4, 2), dtype="float32"
)
OTHERS = {
    "of-another-model": Config(
        d_model=64, n_heads=2, n_layers=3, vocab_size=264, max_seq_len=2048, ffn=FFNConfig(16, 4, 2), dtype="float32"
    ),
    "of-another-width": Config(
        d_model=64, n_heads=2, n_layers=2, vocab_size=264, max_seq_len=2048, ffn=FFNConfig(16, 4, 2), dtype="float32"
    ),
}
# What each command is given before the adapters. None of them gets far.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "generate": (generate.main, ["--model", "model", "--prompt", "a"]),
    "chat": (chat.main, ["--model", "model"]),
    "serve": (serve.main, ["--model", "model", "--port", "0"]),
    "evaluate": (evaluate.main, ["perplexity", "model", "--data", "text.txt"]),
    "bench": (bench.main, ["inference", "--model", "model"]),
    "fuse": (fuse.main, ["--model", "model", "--out", "out"]),
    "convert": (convert.main, ["model", "out", "--layout", "peft"]),
}
commands = pytest.mark.parametrize("command", COMMANDS)


def with_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["lora_parameters"] |= changes
    (folder / SETTINGS).write_text(json.dumps(settings))


def cut_in_half(folder: Path) -> None:
    file = folder / TENSORS["mlx-lm"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "of-another-rank": lambda folder: with_settings(folder, rank=8),
    "half-a-file": cut_in_half,
    "of-targets-that-do-not-exist": lambda folder: with_settings(folder, keys=["self_attn.q_proj"]),
    "without-settings": lambda folder: (folder / SETTINGS).unlink(),
}
WORDS = {
    "of-another-model": "give the model that",
    "of-another-width": "give the model that they were made for",
    "of-another-rank": "where [32, 8] is expected",
    "half-a-file": "damaged or cut short",
    "of-targets-that-do-not-exist": "names 'self_attn.q_proj', which is no linear of the model",
    "without-settings": "is missing, which gives adapters their scale",
    "model": "is a model where adapters are expected",
    "n" * 300: "can't be read (File name too long) where a folder with adapters is expected",
    "nowhere": "doesn't exist where a folder with adapters is expected",
    "text.txt": "is a file where a folder with adapters is expected",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters for it, and others that can't be used."""
    folder = tmp_path_factory.mktemp("adapters")
    write_random_checkpoint(folder / "model", CONFIG, mx.random.key(0))
    params, config = load(folder / "model")
    save_adapters(folder / "adapters", with_random_adapters(params, config, ("attention", "experts")), config)
    for name, other in OTHERS.items():
        write_random_checkpoint(folder / "other" / name, other, mx.random.key(0))
        params, config = load(folder / "other" / name)
        save_adapters(folder / name, with_random_adapters(params, config, ("attention", "experts")), config)
    for name, damage in DAMAGE.items():
        shutil.copytree(folder / "adapters", folder / name)
        damage(folder / name)
    (folder / "text.txt").write_text("When shall we three meet again? " * 20)
    return folder


@pytest.fixture
def refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[list[str]], int], list[str]], str]:
    """What a command says before it ends with status 2, in one line."""

    def run(main: Callable[[list[str]], int], arguments: list[str]) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
        before = names(place)
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith(".\n")
        assert err.count("\n") == 1
        assert names(place) == before
        return err

    return run


Refused = Callable[[Callable[[list[str]], int], list[str]], str]


@commands
@pytest.mark.parametrize("adapters", WORDS)
def test_adapters_that_cannot_be_used(command: str, adapters: str, refused: Refused) -> None:
    main, given = COMMANDS[command]
    assert WORDS[adapters] in refused(main, [*given, "--adapter-path", adapters])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
def test_a_second_adapter_where_one_is_loaded(command: str, refused: Refused) -> None:
    main, given = COMMANDS[command]
    said = refused(main, [*given, "--adapter-path", "adapters", "--adapter-path", "of-another-rank"])
    assert "--adapter-path is given twice, as adapters and of-another-rank, where one folder is expected" in said


def test_adapters_in_a_gguf_file(refused: Refused) -> None:
    said = refused(convert.main, ["model", "out.gguf", "--adapter-path", "adapters", "--layout", "mlx-lm"])
    assert "out.gguf is the name of a GGUF file, and --layout mlx-lm writes a folder" in said


def test_one_of_several_adapters_of_a_server(refused: Refused) -> None:
    given = [*COMMANDS["serve"][1], "--adapter-path", "good=adapters", "--adapter-path", "bad=half-a-file"]
    assert "damaged or cut short" in refused(serve.main, given)


@commands
def test_adapters_given_as_the_model(command: str, refused: Refused) -> None:
    main, given = COMMANDS[command]
    given = ["adapters" if word == "model" else word for word in given]
    said = refused(main, [*given, "--adapter-path", "adapters"])
    assert "holds adapters and no model: give their model, and this folder with --adapter-path" in said


@pytest.mark.parametrize("options", [[], ["--lora", "2"]])
def test_adapters_given_as_the_model_to_train(options: list[str], refused: Refused) -> None:
    said = refused(train.main, ["--model", "adapters", "--data", "text.txt", "--out", "run", *options])
    assert "holds adapters and no model" in said
