"""`text_pieces`: cut where tokens end anyway."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from dbrx_fn.text.bpe import train_bpe
from dbrx_fn.text.text_pieces import text_pieces

LETTERS = list("aZ's09 \t\n\r.,#é日😀\u3000-/_’\u0301ก\u0e49½Ⅳ\u200d\u00ad\x1c\x85\u2028\u180e")  # noqa: RUF001
TRICKY = st.lists(st.sampled_from([*LETTERS, "\r\n", "'re", "  ", "\n\n"]), max_size=60).map("".join)
# Of cl100k and o200k as tiktoken has them, and of Qwen's tokenizers, whose digits stand alone.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace("{1,3}", "")
O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@given(text=TRICKY, size=st.integers(1, 12))
@example(text="a b", size=1)
@example(text="a\r\nb\r\nc", size=1)
def test_no_word_of_a_pattern_is_cut(text: str, size: int) -> None:
    regex = pytest.importorskip("regex")
    gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = list(text_pieces(text, size))
    assert "".join(pieces) == text
    assert all(pieces)
    for pattern in (CL100K, QWEN, O200K):
        assert [word for piece in pieces for word in regex.findall(pattern, piece)] == regex.findall(pattern, text)
    words = [word for piece in pieces for word, _ in gpt2.pre_tokenize_str(piece)]
    assert words == [word for word, _ in gpt2.pre_tokenize_str(text)]


def test_pieces_are_of_the_size() -> None:
    assert [len(piece) for piece in text_pieces("seven.\n" * 100, 70)] == [70] * 10
    for text in ("two words " * 100, "one\r\n" * 200, "a,b;c1d" * 100, "生存还是毁灭。" * 100):
        sizes = [len(piece) for piece in text_pieces(text, 70)]
        assert all(70 <= size < 90 for size in sizes[:-1])
    assert list(text_pieces("")) == []


def test_what_has_no_place_for_a_cut_is_cut_anywhere_in_the_end() -> None:
    for text in ("a" * 1000, "1" * 1000, " " * 1000, "!" * 1000, "é\u0301" * 500):
        assert [len(piece) for piece in text_pieces(text, 10, 100)] == [100] * 10
    assert [len(piece) for piece in text_pieces("a" * 95 + " b", 10, 100)] == [95, 2]


@given(
    text=st.lists(st.sampled_from(["<think>", "[a b]", "x", " ", "\n", ".", "<", "think"]), max_size=40).map("".join),
    size=st.integers(1, 8),
)
def test_added_tokens_stay_whole(text: str, size: int) -> None:
    """With all that their flags may take: the white space beside them, and words that they mustn't touch."""
    for flags in ({}, {"lstrip": True, "rstrip": True}, {"single_word": True}):
        tokenizer = train_bpe(["x. x think <"], 261)
        tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False, **flags) for name in ("<think>", "[a b]")])
        pieces = list(text_pieces(text, size, whole=("<think>", "[a b]")))
        tokens = [token for piece in pieces for token in tokenizer.encode(piece).ids]
        assert tokens == tokenizer.encode(text).ids


MEASURE = """
import resource, sys
from pathlib import Path
from dbrx_fn import SMALL, load_tokenizer
from dbrx_fn.data.corpus import Document
from dbrx_fn.data.token_file import write_token_file
part = sys.argv[1].encode().decode("unicode_escape")
text = part * (3_000_000 // len(part))
tokenizer = load_tokenizer(SMALL)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_token_file(Path(sys.argv[2]), [Document("x", ((text, True),), ((0, len(text)),))], tokenizer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("part", ["one line of words ", "words\\r\\n", "A paragraph.\\n\\n", "no,space;at.all-", "a"])
def test_long_texts_take_little_memory(part: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, part, str(tmp_path / "tokens")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 100 * 2**10
