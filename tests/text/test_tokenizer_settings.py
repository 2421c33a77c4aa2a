"""What a tokenizer's files say of stop tokens and of chats."""

from pathlib import Path

import pytest

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.chat import render_chat
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support.both_tokenizers import DBRX_SETTINGS, write

# Stop tokens


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 1}, {7, 9}),
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": None}, {"eos_token_id": [1]}, {1}),
        ({}, {"eos_token_id": 1}, {1}),
        (None, {"eos_token_id": 1}, {1}),
        ({}, {"eos_token_id": None}, {100257, 100279}),
        (None, None, {100257, 100279}),
    ],
)
def test_stop_tokens(generation: object, config: object, expected: set[int], tmp_path: Path) -> None:
    files = {"generation_config": generation, "config": config, "tokenizer_config": DBRX_SETTINGS}
    write(tmp_path, **{name: content for name, content in files.items() if content is not None})
    assert read_tokenizer(tmp_path).stop_tokens == expected


def test_stop_token_of_the_settings_may_be_an_object(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"eos_token": {"content": "<|im_end|>"}})
    assert read_tokenizer(tmp_path).stop_tokens == {100279}


# Chat


def test_dbrx_settings_give_the_built_in_chat(of_tiktoken: Tokenizer) -> None:
    assert of_tiktoken.chat_format.template is None
    assert of_tiktoken.chat_format.default_system
    text = render_chat([{"role": "user", "content": "Hi"}], of_tiktoken.chat_format, system="Be brief.")
    tokens = of_tiktoken.encode(text)
    assert tokens[0] == 100278
    assert tokens.count(100278) == 3
    assert tokens[-3:] == [100278, *of_tiktoken.encode("assistant\n")]


def test_default_system_prompt_follows_the_settings(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"use_default_system_prompt": False})
    assert not read_tokenizer(tmp_path).chat_format.default_system


@pytest.mark.parametrize(
    "value",
    ["{{ bos_token }}A", [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "{{ bos_token }}A"}]],
)
def test_chat_template_of_the_settings(value: object, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"chat_template": value})
    chat_format = read_tokenizer(tmp_path).chat_format
    assert chat_format.template == "{{ bos_token }}A"
    assert render_chat([{"role": "user", "content": "Hi"}], chat_format) == "<|endoftext|>A"


def test_chat_template_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("é{{ eos_token }}{{ nothing }}", encoding="utf-8")
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"chat_template": "B"})
    chat_format = read_tokenizer(tmp_path).chat_format
    assert render_chat([{"role": "user", "content": "Hi"}], chat_format) == "é<|endoftext|>"


def test_template_errors_name_their_file(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"chat_template": "{% if %}"})
    with pytest.raises(TokenizerError, match=r"'chat_template' in .*tokenizer_config\.json can't be rendered"):
        render_chat([{"role": "user", "content": "Hi"}], read_tokenizer(tmp_path).chat_format)
