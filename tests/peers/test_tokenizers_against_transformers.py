"""Generated tokenizer folders: transformers' tokens and text, or one sentence that names the setting."""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support.tokenizer_folders import Maker

PARTS, FOLDERS, LEAST_COMPARED, TEXTS = 4, 150, 90, 12
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()


def read(folder: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, or None where the files are refused; and what is said of the files."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            tokenizer = read_tokenizer(folder)
        except TokenizerError as error:
            return None, [str(error)]
    return tokenizer, [str(warning.message) for warning in told]


def take_the_file_as_it_stands(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")


def check_texts(ours: Tokenizer, folder: Path, maker: Maker) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert dict(ours.chat_format.special_tokens) == theirs.special_tokens_map, folder
    for _ in range(TEXTS):
        text = maker.text()
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens, (folder, text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), folder
        for skip in (True, False):
            decoded = theirs.decode(tokens, skip_special_tokens=skip)
            assert ours.decode(tokens, skip_special_tokens=skip) == decoded, (folder, text)


@pytest.mark.parametrize("part", range(PARTS))
def test_any_settings_give_transformers_tokens_and_text(part: int, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(part * FOLDERS, (part + 1) * FOLDERS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        maker = Maker(seed)
        ours, said = read(maker.write(folder))
        for sentence in said:
            assert any(f"{folder}/{name}" in sentence for name in FILES), sentence
            assert re.search(r"'\w+'|tokenizer_class|the token '|normalizer", sentence), sentence
        if said and ours is not None:
            # Only of GPT-2's class is it told that transformers does it in another way.
            assert all("the tokenizer_class is GPT2Tokenizer" in sentence for sentence in said)
            take_the_file_as_it_stands(folder)
        if ours is not None:
            check_texts(ours, folder, maker)
        outcomes["refused" if ours is None else "told and compared" if said else "compared"] += 1
    print(dict(outcomes))
    assert outcomes["compared"] >= LEAST_COMPARED, outcomes


def test_there_are_hundreds() -> None:
    assert PARTS * LEAST_COMPARED >= 300


def test_an_added_token_outside_ascii_is_decoded_to_itself(tmp_path: Path) -> None:
    """Here transformers is wrong: it takes the token's characters for the bytes that they stand for in other tokens."""
    content = Maker(0).tokenizer() | {"normalizer": None, "post_processor": None}
    token = {"content": "<é>", "special": False, "normalized": False}
    token |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    number = len(content["model"]["vocab"])
    content["added_tokens"] = [{"id": number, **token}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path).decode([number]) == "<\ufffd>"
    assert read_tokenizer(tmp_path).decode([number]) == "<é>"
