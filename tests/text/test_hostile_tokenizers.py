"""Hostile tokenizer folders, by the hundred: each is refused in one sentence, or read as the library reads it."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.regex_cost import RegexCostError, check_regex
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.hostile_tokenizers import WAYS, sound, token, write
from tests.support.load_hostile_tokenizers import TEXTS
from tests.support.tokenizer_folders import CL100K_WORDS, GPT2_WORDS, NEWER_CL100K_WORDS

CASES = 64
"""Of each way."""
LONGEST_TEXT = 2_000


def complaints(case: dict[str, Any], root: Path) -> list[str]:
    """What is wrong with how a case ended."""
    text = case["text"]
    if case["outcome"] == "read":
        return []
    if case["outcome"] != "refused":
        return [f"{case['outcome']}: {text[-1500:]}"]
    if text.isprintable() and text.endswith(".") and len(text) < LONGEST_TEXT and str(root) in text:
        return []
    return [f"not one short, printable sentence that names a file: {text[:500]!r}"]


def test_hostile_folders_are_refused_or_read_right(tmp_path: Path, measured: Callable[[str, float], float]) -> None:
    command = [sys.executable, "-m", "tests.support.load_hostile_tokenizers", str(CASES), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"ended in or after case {lines[-1] if lines else None}\n{ended.stderr[-3000:]}"
    # A panic is told on standard error even where it is caught.
    assert ended.stderr == ""
    cases = [line for line in lines if "outcome" in line]
    assert len(cases) == CASES * len(WAYS) >= 600
    wrong = [f"{case['way']} {case['number']}: {text}" for case in cases for text in complaints(case, tmp_path)]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong[:20])
    outcomes = Counter((case["way"], case["outcome"]) for case in cases)
    assert all(outcomes[way.__name__, "refused"] for way in WAYS)
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "read") >= 50
    measured("seconds for a hostile tokenizer folder and its texts", max(case["seconds"] for case in cases))
    measured("MiB for a hostile tokenizer folder and its texts", max(case["grown"] for case in cases) / 2**20)


def replaced(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def in_model(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update(fields)


def lost_token(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    content["added_tokens"] = [token("  ", 320, normalized=True)]


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
ONLY_B = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "B", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


YI = "".join(map(chr, range(0xA000, 0xA48D)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_model(continuing_subword_prefix="##"), "'continuing_subword_prefix' of the model must be null"),
        (in_model(dropout=0.1), "'dropout' of the model is 0.1, which makes encoding random; set it to null"),
        (in_model(unk_token="<unk>", vocab={"a": 0}, merges=[]), "'unk_token' of the model must be a token"),
        (in_model(type="WordLevel"), "the 'type' of the model must be BPE"),
        (in_model(vocab={"a": 2**31 - 1}, merges=[]), "the id of 'a' must be a whole number from 0 to 4194303"),
        (in_model(vocab={"a": 1, "b": 1}, merges=[]), "each id in the model's 'vocab' must be one token's"),
        (replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////"}), "the normalizer must be"),
        (replaced("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 8}), "times as long"),
        (replaced("post_processor", ONLY_B), "'single' of TemplateProcessing must be the sequence A once"),
        (replaced("added_tokens", [token("\ud800", 320)]), "'added_tokens' entry 0 must be a text"),
        (replaced("added_tokens", [token(YI, 320)]), "the added tokens use all letters"),
        (replaced("added_tokens", [token("<a>", 320, rstrip=True), token(" b", 321)]), "both can take the same"),
        (lost_token, "its normalizer leaves nothing of the added token '  '"),
    ],
)
def test_what_is_refused_at_load(change: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path) -> None:
    content = sound()
    change(content)
    write(tmp_path, content)
    with pytest.raises(TokenizerError, match=reason):
        read_tokenizer(tmp_path)


def test_an_error_of_the_library_at_encoding_is_one_sentence(tmp_path: Path) -> None:
    """The ids of the file are given to the library as they are, so nothing here can make it fail but its own faults."""
    write(tmp_path, sound())
    tokenizer = read_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "expression", [GPT2_WORDS, CL100K_WORDS, NEWER_CL100K_WORDS, r"\s+$", r"\p{N}{1,3}", ".+", "[A-Z]"]
)
def test_expressions_of_known_tokenizers_are_taken(expression: str) -> None:
    check_regex(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *(r"(a+)+$", r"(.*)*x", r"(x+x+)+y", r"a*a*b", r"[\s\S]*\x00", r"(a|a)*b", r"(?=.*x)", r"a?" * 30 + "a" * 30),
        *(r"(?=\p{L}+a++[a-z])", r"(a+)?.{2,9}[^x]{2,9}\s++", r"(?<n>a)\k<n>", r"\g<0>", r"a{1,60000}b"),
    ],
)
def test_expressions_that_take_too_long_are_refused(expression: str) -> None:
    with pytest.raises(RegexCostError):
        check_regex(expression)
