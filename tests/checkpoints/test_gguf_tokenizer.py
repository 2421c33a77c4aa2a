"""A GGUF file's own tokenizer makes the tokens of the tokenizer that it was made from, or is refused by name."""

import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbrx_fn.checkpoints.gguf_vocabulary import vocabulary_metadata
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load_tokenizer
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.errors import CheckpointError, TokenizerError
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.text.chat import render_chat
from dbrx_fn.text.tokenizer import Tokenizer
from tests.support.checkpoints import QUANTIZABLE
from tests.support.gguf_tokenizers import CONTROL, UNUSED, USER_DEFINED, small_metadata, tiny_metadata, write_tokenizer

CONFIG = QUANTIZABLE | {"vocab_size": 4096}
SMALL_TOKENIZER = load_tokenizer(SMALL)
TEXTS = [
    "To be, or not to be",
    " \n\n  x\t",
    "1234567 ٣٤٥",
    "don't DON'T",
    "naïve 日本語 🤷🏽‍♀️",
    "<|im_end|>\r\n<|pad|>",
    "\0\x7f",
]


def written(folder: Path, changes: dict[str, Any]) -> Path:
    return write_tokenizer(folder / "dbrx.gguf", CONFIG, small_metadata() | changes)


def same_tokens(found: Tokenizer, expected: Tokenizer) -> bool:
    return all(found.encode(text) == expected.encode(text) for text in TEXTS)


def test_the_small_model_s_tokenizer_comes_back_from_what_llama_cpp_s_converter_writes(tmp_path: Path) -> None:
    found = load_tokenizer(written(tmp_path, {"tokenizer.chat_template": "{{ messages[0].content }}!" + " " * 2000}))
    assert found.fingerprint() == SMALL_TOKENIZER.fingerprint()
    assert found.stop_tokens == SMALL_TOKENIZER.stop_tokens == {4092, 4095}
    assert found.control_tokens == SMALL_TOKENIZER.control_tokens
    assert found.end_of_text == SMALL_TOKENIZER.end_of_text
    assert found.chat_format.special_tokens == SMALL_TOKENIZER.chat_format.special_tokens
    assert render_chat([{"role": "user", "content": "Ho"}], found.chat_format).startswith("Ho!")


def test_an_error_in_the_template_names_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, {"tokenizer.chat_template": "{{ 1 / 0 }}"})
    with pytest.raises(TokenizerError, match=rf"^The chat template in {file}"):
        render_chat([{"role": "user", "content": "Ho"}], load_tokenizer(file).chat_format)


def test_padding_gaps_and_user_defined_tokens_are_as_the_file_says(tmp_path: Path) -> None:
    tokens, kinds = (small_metadata()[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    tokens = [*tokens[:4092], "[PAD0]", *tokens[4092:], "<think>", "[PAD1]"]
    kinds = [*kinds[:4092], UNUSED, *kinds[4092:], USER_DEFINED, UNUSED]
    changes = {"bos_token_id": 4093, "eos_token_id": 4093, "padding_token_id": 4094}
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    file = written(tmp_path, changes | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    found = load_tokenizer(file)
    assert found.vocab_size == 4098
    assert found.encode("<think><|im_end|>[PAD0]")[:2] == [4097, 4096]
    assert 4092 not in found.encode("[PAD0]")
    assert found.decode([4097, 4096]) == "<think>"
    assert found.stop_tokens == {4093, 4096}
    assert found.encode("To be") == SMALL_TOKENIZER.encode("To be")


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_with_bos_if_the_file_says_so(tmp_path: Path, adds: bool) -> None:
    found = load_tokenizer(
        written(tmp_path, {"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.add_eos_token": adds})
    )
    plain = SMALL_TOKENIZER.encode("To be")
    assert found.encode("To be") == ([4092, *plain, 4092] if adds else plain)
    assert found.encode("To be", add_special_tokens=False) == plain


def test_a_file_of_llama_3_s_kind_begins_with_bos_unless_it_says_otherwise(tmp_path: Path) -> None:
    plain = SMALL_TOKENIZER.encode("To be")
    assert load_tokenizer(written(tmp_path, {"tokenizer.ggml.pre": "llama-bpe"})).encode("To be") == [4092, *plain]


def test_numbers_are_cut_as_the_named_words_cut_them(tmp_path: Path) -> None:
    cut = {name: load_tokenizer(written(tmp_path, {"tokenizer.ggml.pre": name})) for name in ("dbrx", "qwen2", "gpt-2")}
    assert cut["dbrx"].encode("1234") == SMALL_TOKENIZER.encode("1234")
    assert cut["qwen2"].encode("1234") == [token for digit in "1234" for token in SMALL_TOKENIZER.encode(digit)]
    assert len({repr([one.encode(text) for text in TEXTS]) for one in cut.values()}) == 3


@pytest.mark.parametrize("name", [None, "default"])
def test_a_file_without_a_name_for_its_words_is_cut_as_dbrx_was_trained(tmp_path: Path, name: str | None) -> None:
    file = written(tmp_path, {"tokenizer.ggml.pre": name})
    with pytest.warns(UserWarning, match=rf"{file} doesn't say how its tokenizer cuts words .* as DBRX was trained"):
        assert same_tokens(load_tokenizer(file), SMALL_TOKENIZER)


def test_settings_for_drawing_are_read(tmp_path: Path) -> None:
    drawing = {"general.sampling.temp": 0.8, "general.sampling.top_p": 0.95, "general.sampling.top_k": 7}
    for changes, expected in ((drawing, (0.8, 0.95, 7)), ({}, (0.0, 1.0, 0))):
        with tokenizer_files(written(tmp_path, changes)) as files:
            sampling = read_generation_config(files.folder).sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected


def test_settings_that_are_not_followed_give_a_warning(tmp_path: Path) -> None:
    neutral = {"general.sampling.penalty_repeat": 1.0, "general.sampling.mirostat": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(written(tmp_path, neutral))
    with pytest.warns(UserWarning, match=r"asks for general\.sampling\.penalty_repeat: not supported here"):
        load_tokenizer(written(tmp_path, {**neutral, "general.sampling.penalty_repeat": 1.1}))


TOKENS = small_metadata()["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "holds no tokenizer: put the same model's tokenizer files beside it"),
        ({"model": "no_vocab"}, "holds no tokenizer"),
        ({"model": "llama"}, "holds a tokenizer of the kind 'llama', and only 'gpt2', byte-level BPE, can be followed"),
        ({"model": 7}, "of the kind 7"),
        ({"pre": "tekken"}, "cuts words in the way 'tekken' (tokenizer.ggml.pre), and only dbrx, "),
        ({"pre": "\x1b[2J"}, "in the way '\\x1b[2J'"),
        ({"tokens": None}, "as tokenizer.ggml.tokens where a list of texts"),
        ({"tokens": [1, 2]}, "as tokenizer.ggml.tokens where a list of texts"),
        ({"merges": None}, "as tokenizer.ggml.merges where a list of texts"),
        ({"merges": ["Ġt h", "th"]}, "'th' as tokenizer.ggml.merges where two parts with a space between"),
        ({"merges": ["Ġno zip"]}, "can't be read by the tokenizers library"),
        ({"token_type": [1, 2, 3]}, "has 3 numbers as tokenizer.ggml.token_type where 4096 numbers, one for each"),
        ({"token_type": [1] * 4095 + [6]}, "has 6 as the type of token 4095 where one of 1, 3, 4 and 5 is expected"),
        ({"tokens": [*TOKENS[:4095], "a"]}, "'a' twice as tokenizer.ggml.tokens where each token once"),
        ({"eos_token_id": 4096}, "has 4096 as tokenizer.ggml.eos_token_id where a token below 4096"),
        ({"eos_token_id": True}, "has True as tokenizer.ggml.eos_token_id"),
        ({"bos_token_id": None, "add_bos_token": True}, "has nothing as tokenizer.ggml.bos_token_id"),
        ({"eos_token_id": None, "token_type": [1] * 4096}, "has nothing as tokenizer.ggml.eos_token_id"),
    ],
)
def test_a_tokenizer_that_cannot_be_followed_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    file = written(tmp_path, {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    with pytest.raises(TokenizerError, match=re.escape(words)) as caught:
        load_tokenizer(file)
    assert str(caught.value).startswith(str(file))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([""] * (2**20 + 1), "claims 1048577 items"),
        (["x" * 2**20] * 65, "more than 67108864 bytes of vocabulary"),
        ([f"t{n}" for n in range(100_000)], "at most 65536 with 4194304 characters together"),
    ],
    ids=["many", "long", "many control tokens"],
)
def test_an_absurd_vocabulary_costs_little(tmp_path: Path, tokens: list[str], words: str) -> None:
    kinds = [CONTROL] * len(tokens)
    file = written(tmp_path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    start = time.process_time()
    with pytest.raises((TokenizerError, CheckpointError), match=words) as caught:
        load_tokenizer(file)
    assert time.process_time() - start < 20
    assert str(caught.value).startswith(str(file))


@pytest.mark.filterwarnings("ignore:.* doesn't say how its tokenizer cuts words")
def test_flipped_bytes_end_in_an_error_or_in_a_tokenizer(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "dbrx.gguf", QUANTIZABLE | {"vocab_size": 263}, tiny_metadata())
    assert load_tokenizer(file).encode("the then") == [260, 259, 258, 68, 77]
    content, rng = file.read_bytes(), np.random.default_rng(0)
    places = rng.integers(24, content.index(b"token_embd.weight"), 600)
    said: list[str] = []
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            load_tokenizer(file).encode("the <think> then 12345 \n\n")
        except (TokenizerError, CheckpointError) as error:
            said.append(str(error))
    assert len(places) / 2 < len(said) < len(places)
    assert all(str(file) in text and "\x1b" not in text for text in said)


def test_tiktoken_s_vocabulary_comes_back(tmp_path: Path) -> None:
    settings = '{"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "eos_token": "<|endoftext|>"}'
    (tmp_path / "tiktoken").mkdir()
    (tmp_path / "tiktoken" / "tokenizer_config.json").write_text(settings)
    config = QUANTIZABLE | {"vocab_size": 100_352, "d_model": 4}
    metadata = vocabulary_metadata(tmp_path / "tiktoken", config["vocab_size"])
    found, expected = (
        load_tokenizer(path)
        for path in (write_tokenizer(tmp_path / "dbrx.gguf", config, metadata), tmp_path / "tiktoken")
    )
    assert same_tokens(found, expected)
    assert found.vocab_size == expected.vocab_size
    assert found.stop_tokens == expected.stop_tokens
