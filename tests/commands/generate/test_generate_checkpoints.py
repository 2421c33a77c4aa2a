"""`generate` of checkpoints that are missing, damaged, too large or another model's."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.generate import main
from tests.support.generating import ROUTER, Refused, edit_tensors, process, snapshot


def test_memory_that_runs_out(folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU says it; on a CPU, MLX ends the process where memory does."""

    def failing(*_: object, **__: object) -> Iterator[None]:
        raise RuntimeError(said)
        yield

    monkeypatch.setattr("dbrx_fn.generate.stream_text", failing)
    said = "cudaMallocAsync(&data, size, stream) failed: out of memory"
    refused(["--model", folder, "--prompt", "x"], f"({said})", "--prefill-step-size")
    said = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=said):
        main(["--model", str(folder), "--prompt", "x"])


def test_no_such_folder(tmp_path: Path, refused: Refused) -> None:
    refused(["--model", tmp_path / "nowhere", "-p", "x"], "nowhere doesn't exist", "owner/name")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_names_that_no_folder_can_have(name: str, refused: Refused) -> None:
    refused(["--model", name, "-p", "x"])


def test_file_in_place_of_a_folder(folder: Path, refused: Refused) -> None:
    refused(["--model", folder / "model.safetensors", "-p", "x"], "is a file", "the folder that holds")


def test_repository_out_of_reach(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = process("--model", "nobody/dbrx", "-p", "x", env=environment)
    out, err = ended.communicate(timeout=30)
    assert (ended.returncode, out) == (2, b"")
    assert err.decode().startswith("error: nobody/dbrx is not a folder here or in the Hub's cache")
    assert err.count(b"\n") == 1


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def shard(folder: Path) -> tuple[Path, Path]:
    """Turns the folder's one file into two shards with an index."""
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    names = sorted(tensors)
    files = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    weight_map: dict[str, str] = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        mx.save_safetensors(str(file), {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json can't be read as JSON"]),
        (lambda f: edit_config(f, model_type="llama", architectures=[]), ["model_type 'llama', not 'dbrx'"]),
        (lambda f: edit_config(f, n_heads=5), ["n_heads is 5", "divisor of d_model"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds no safetensors file"]),
        (lambda f: shard(f)[1].unlink(), ["lacks model-00002-of-00002.safetensors", "fetch the missing shards"]),
        (
            lambda f: os.truncate(shard(f)[1], 5000),
            ["model-00002-of-00002.safetensors is damaged or cut short at 5000"],
        ),
        (lambda f: shutil.copy(*shard(f)), ["lm_head.weight is there 2 times"]),
        (lambda f: edit_config(f, vocab_size=384), ["lm_head.weight is [320, 32] where [384, 32] is expected"]),
        (lambda f: edit_tensors(f, lambda t: t.pop(ROUTER)), [f"{ROUTER} [4, 32] is missing"]),
        (lambda f: edit_tensors(f, lambda t: t.update(more=mx.zeros(2))), ["more [2] in model.safetensors is unexpec"]),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROUTER: t[ROUTER].astype(mx.int8)})),
            [f"{ROUTER} is I8 where one of float32, bfloat16, float16 is expected"],
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROUTER: t[ROUTER].astype(mx.float16)})),
            [f"{ROUTER} is float16 where float32 is expected"],
        ),
        (lambda f: (f / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), ["'eos_token_id' must be"]),
    ],
)
def test_damaged_checkpoint(damage: Callable[[Path], object], words: list[str], copy: Path, refused: Refused) -> None:
    damage(copy)
    before = snapshot(copy)
    refused(["--model", copy, "-p", "x"], str(copy), *words)
    assert snapshot(copy) == before


@pytest.mark.parametrize("options", [[], ["--temp", "1"], ["--presence-penalty", "0.5"]])
def test_weights_that_are_not_finite(options: list[object], copy: Path, refused: Refused) -> None:
    edit_tensors(copy, lambda t: t.update({ROUTER: t[ROUTER] * float("nan")}))
    refused(["--model", copy, "-p", "x", *options], "After 1 tokens the model's numbers are no longer finite", "dtype")


def test_tokenizer_of_another_model(copy: Path, refused: Refused) -> None:
    edit_config(copy, vocab_size=16)
    edit_tensors(
        copy,
        lambda t: t.update({name: t[name][:16] for name in ("lm_head.weight", "transformer.wte.weight")}),
    )
    refused(["--model", copy, "-p", "x"], "past the model's vocabulary of 16", "belongs to another model")
