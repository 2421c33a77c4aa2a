"""Names of checkpoints, and what lies under them that isn't one: each is found, or refused by what it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dbrx_fn.checkpoints.hub import SMALL, checkpoint_folder, checkpoint_path, refusal
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.convert import main as convert
from dbrx_fn.errors import CheckpointError, DbrxError, TokenizerError
from dbrx_fn.generate import main as generate
from dbrx_fn.inspect import main as inspect
from tests.support import checkpoints
from tests.support.checkpoints import QUANTIZABLE
from tests.support.layouts_written import write_gguf
from tests.support.trees import as_float64

CONFIG = QUANTIZABLE | {"vocab_size": 4096}
TENSORS = checkpoints.random_tensors(CONFIG, np.random.default_rng(0))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 100\n"


def put_tokenizer(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((SMALL / name).read_bytes())


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "dbrx", CONFIG, TENSORS)
    put_tokenizer(tmp_path / "dbrx")
    return tmp_path / "dbrx"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file, with nothing beside it."""
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "dbrx.gguf", CONFIG, TENSORS, quantization="f32")
    return tmp_path / "gguf" / "dbrx.gguf"


# Names


@pytest.mark.parametrize(
    "name", ["./modle", "modle/", "../modle", "/nowhere/at/all", "a/b/c", "~/no such folder", "modle.gguf", "a/b.gguf/"]
)
def test_a_mistyped_folder_is_one_short_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for find in (checkpoint_path, checkpoint_folder):
        with pytest.raises(CheckpointError) as error:
            find(name)
        assert str(error.value) == (
            f"{name} doesn't exist: give a folder that holds a DBRX checkpoint, or a Hugging Face repository as"
            " owner/name."
        )


@pytest.mark.parametrize(
    ("name", "reason"), [("", "empty"), ("a\0b", "doesn't exist"), ("\ud800", "surrogates"), ("x" * 5000, "too long")]
)
def test_names_that_can_not_be_shown_as_they_are(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        checkpoint_path(name)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_a_mistyped_folder_that_looks_like_a_repository_is_one_short_sentence_offline(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dbrx_fn.generate", "--model", "models/dbxr", "-p", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    beginning = "error: models/dbxr is not a folder here, and the Hugging Face Hub can't be reached ("
    assert ended.stderr.startswith(beginning)
    assert ended.stderr.endswith("): check name and network.\n")
    assert len(ended.stderr) < 250


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            GatedRepoError,
            "someone/dbrx is gated: ask for access at https://huggingface.co/someone/dbrx, and log in with",
        ),
        (RepositoryNotFoundError, "someone/dbrx is not a folder here and no repository that you may see: check it, or"),
        (RevisionNotFoundError, "someone/dbrx has no revision 'v9': name a branch, tag or commit of it."),
        (HFValidationError, "someone/dbrx is not a folder here and can't be a repository's name: check it."),
        (
            LocalEntryNotFoundError,
            "someone/dbrx is not a folder here, and the Hugging Face Hub can't be reached (no route",
        ),
        (ConnectionError, "someone/dbrx can't be had from the Hugging Face Hub (no route to host): check the network"),
    ],
)
def test_what_the_hub_answers_is_one_short_sentence(error: Any, sentence: str) -> None:
    raised = error.__new__(error)
    raised.__cause__ = OSError("no route\nto host")
    text = str(refusal("someone/dbrx", "v9", raised))
    assert text.startswith(sentence)
    assert text.endswith(".")
    assert text.isprintable()
    assert len(text) < 200


# Files that are something else


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", *TOKENIZER_FILES])
def test_pointers_that_git_lfs_left_are_called_that(name: str, fused: Path) -> None:
    (fused / name).write_bytes(LFS)
    with pytest.raises(DbrxError) as caught:
        (load_tokenizer if name in TOKENIZER_FILES else load)(fused)
    assert str(caught.value) == (
        f"{fused / name} is a Git LFS pointer in place of the file: run `git lfs pull` in the folder that was cloned."
    )


def test_a_gguf_file_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "dbrx.gguf").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"dbrx\.gguf is a Git LFS pointer in place of the file: run `git lfs"):
        load(tmp_path / "dbrx.gguf")


def test_hidden_files_are_no_shards(fused: Path) -> None:
    """As macOS puts them beside others on disks of other systems."""
    whole, _ = load(fused)
    (fused / "._model.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    (fused / ".model.safetensors").write_bytes((fused / "model.safetensors").read_bytes())
    params, _ = load(fused)
    assert mx.array_equal(params["lm_head"]["weight"], whole["lm_head"]["weight"])


# GGUF files


def test_a_folder_of_a_gguf_file_alone(gguf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json but dbrx\.gguf: name the GGUF file itself\.$"):
        load(gguf.parent)


def test_a_gguf_file_takes_the_tokenizer_beside_it(gguf: Path, fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If its own can't be followed; in the commands that make text, that tell of it, and that write a checkpoint."""
    said = {}
    put_tokenizer(gguf.parent)
    for model in (gguf, fused):
        assert generate(["--model", str(model), "-p", "To be", "--max-tokens", "5", "--temp", "0", "--json"]) == 0
        said[model] = json.loads(capsys.readouterr().out)["tokens"]
        assert load_tokenizer(model).encode("To be") == load_tokenizer(SMALL).encode("To be")
    assert said[gguf] == said[fused]
    assert inspect([str(gguf), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokenizer"] == "tokenizer.json, which lies beside it"
    assert not any("tokenizer" in text for text in found["surprises"])
    assert convert([str(gguf), str(gguf.parent / "new")]) == 0
    assert load_tokenizer(gguf.parent / "new").encode("To be") == load_tokenizer(SMALL).encode("To be")


def test_a_gguf_file_alone_makes_the_text_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.gguf"
    assert convert([str(SMALL), str(file), "--layout", "gguf", "--type", "f32"]) == 0
    capsys.readouterr()
    said = {}
    for model in (SMALL, file):
        options = ["--chat", "-p", "Who goes there?", "--max-tokens", "12", "--temp", "0", "--json"]
        assert generate(["--model", str(model), *options]) == 0
        said[model] = json.loads(capsys.readouterr().out)["tokens"]
    assert said[file] == said[SMALL]
    assert inspect([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == "its own, with words as in dbrx"


def test_a_gguf_file_without_a_tokenizer_says_what_is_missing_and_how_to_get_it(
    gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        TokenizerError, match=r"as tokenizer\.ggml\.merges .*: put the same model's tokenizer files beside"
    ):
        load_tokenizer(gguf)
    assert generate(["--model", str(gguf), "-p", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {gguf} has something else or nothing as tokenizer.ggml.merges where a list of texts")
    assert "dbrx_fn.convert and --tokenizer." in err
    params, _ = load(gguf)
    assert as_float64(params["lm_head"]["weight"]).shape == (4096, 128)


def test_a_gguf_file_where_a_folder_is_needed(gguf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a GGUF file where a checkpoint's folder is needed: python -m"):
        checkpoint_folder(gguf)
