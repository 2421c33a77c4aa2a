"""Folders of tokenizers of both forms, and the tokenizers."""

import json
from pathlib import Path

import pytest

from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support.both_tokenizers import (
    DBRX_GENERATION,
    DBRX_OLDER_ADDED,
    DBRX_SETTINGS,
    JSON_SETTINGS,
    trained,
    write,
)


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    trained().save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config=JSON_SETTINGS, generation_config={"eos_token_id": 3})


@pytest.fixture(scope="module")
def gap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `json_folder`, with ten ids between the two last words of the vocabulary that stand for nothing."""
    folder = tmp_path_factory.mktemp("gap")
    content = json.loads(trained().to_str())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 10
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return write(folder, tokenizer_config=JSON_SETTINGS, generation_config={"eos_token_id": 3})


@pytest.fixture(scope="module")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("tiktoken"),
        tokenizer_config=DBRX_SETTINGS,
        generation_config=DBRX_GENERATION,
        added_tokens=DBRX_OLDER_ADDED,
    )


@pytest.fixture(scope="module")
def of_json(json_folder: Path) -> Tokenizer:
    return read_tokenizer(json_folder)


@pytest.fixture(scope="module")
def of_gap(gap_folder: Path) -> Tokenizer:
    return read_tokenizer(gap_folder)


@pytest.fixture(scope="module")
def of_tiktoken(tiktoken_folder: Path) -> Tokenizer:
    return read_tokenizer(tiktoken_folder)
