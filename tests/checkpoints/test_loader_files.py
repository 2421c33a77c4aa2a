"""Checkpoint folders whose files are missing, damaged or foreign, and names that lead to no folder."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.errors import CheckpointError, ConfigError, TokenizerError
from tests.support.loading import (
    INDEX,
    TENSORS,
    W1,
    as_arrays,
    refused,
    write_tensors,
)


def test_no_weights(fused: Path) -> None:
    """Pickles can run code when they are read, so none is."""
    (fused / "model.safetensors").rename(fused / "pytorch_model.bin")
    refused(fused, "holds no safetensors file", "only safetensors and GGUF files are read")


def test_missing_shards(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00003.safetensors", f"which {INDEX} names")
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00003.safetensors; model-00003-of-00003.safetensors")
    (sharded / INDEX).unlink()
    refused(sharded, "lm_head.weight [20, 12] is missing")


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_truncated_shard(size: int, sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    size = size if size >= 0 else file.stat().st_size + size
    os.truncate(file, size)
    refused(sharded, f"{file} is damaged or cut short at {size} bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"not a tensor in sight" * 10,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10) + b'{"a": {}}\n',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}\n' + bytes(4),
    ],
)
def test_header_that_is_garbage(content: bytes, fused: Path) -> None:
    (fused / "model.safetensors").write_bytes(content)
    refused(fused, f"{fused / 'model.safetensors'} is damaged or cut short at {len(content)} bytes")


def test_folder_named_as_a_file(fused: Path) -> None:
    (fused / "more.safetensors").mkdir()
    refused(fused, "more.safetensors")


def test_broken_link(fused: Path) -> None:
    (fused / "model.safetensors").unlink()
    (fused / "model.safetensors").symlink_to(fused / "blob")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors can't be read \(No such file or directory\): mend that"
    ):
        load(fused)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"",
        b"[]",
        b"{}",
        b"3",
        b"[" * 10**5,
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"lm_head.weight": 3}}',
        b'{"weight_map": {"lm_head.weight": ["model.safetensors"]}}',
        b'{"weight_map": {"lm_head.weight": "../model.safetensors"}}',
        b'{"weight_map": {"lm_head.weight": "/etc/passwd"}}',
        b'{"weight_map": {"lm_head.weight": "."}}',
    ],
)
def test_malformed_index(content: bytes, fused: Path) -> None:
    shutil.copy(fused / "model.safetensors", fused.parent)
    (fused / INDEX).write_bytes(content)
    text = refused(fused, f"{fused / INDEX} is not an index of shards")
    assert len(text) < 500


@pytest.mark.parametrize("name", ["..", "", "a\0b"])
def test_index_that_names_what_is_no_file(name: str, fused: Path) -> None:
    (fused / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match=INDEX):
        load(fused)


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["nowhere.weight"] = "model-00002-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(
        sharded,
        f"lm_head.weight is not in model-00001-of-00003.safetensors, where {INDEX} says it is",
        f"nowhere.weight is not in model-00002-of-00003.safetensors, where {INDEX} says it is",
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_tensors_that_are_there_twice(indexed: bool, sharded: Path) -> None:
    file = "model-00003-of-00003.safetensors"
    arrays = cast(dict[str, mx.array], mx.load(str(sharded / file)))
    mx.eval(arrays)
    wte = "transformer.wte.weight"
    write_tensors(sharded, arrays | as_arrays({wte: TENSORS[wte], W1: TENSORS[W1]}), file)
    if not indexed:
        (sharded / INDEX).unlink()
    refused(sharded, f"{wte} is there 2 times", f"{W1} is there 2 times")


def test_no_such_folder(tmp_path: Path) -> None:
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"nowhere doesn't exist: give a folder .* owner/name\."):
            read(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"nowhere doesn't exist"):
            read(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_a_folder(fused: Path) -> None:
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"config\.json is a file: give the folder"):
            read(fused / "config.json")


def test_folder_without_config_or_tokenizer(fused: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(fused)
    (fused / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load(fused)


def test_repository_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for read in (load, load_tokenizer):
        with pytest.raises(CheckpointError) as caught:
            read("nobody/dbrx")
        text = str(caught.value)
        assert text.startswith("nobody/dbrx is not a folder here or in the Hub's cache, and HF_HUB_OFFLINE forbids")


@pytest.mark.parametrize("name", ["dbrx", "a/b/c", "../dbrx", "a/.", "-a/b", "a b/c", "https://huggingface.co/a/b"])
def test_names_that_no_repository_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="doesn't exist"):
        load(name)
