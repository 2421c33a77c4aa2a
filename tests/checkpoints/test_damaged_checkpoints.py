"""Damaged checkpoints, by the thousand: each is refused in one sentence, or gives what the whole one gives."""

import errno
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from dbrx_fn.checkpoints.safetensors_file import read_headers
from dbrx_fn.errors import CheckpointError
from tests.support.damage import WAYS

LOADED, CONVERTED = 132, 30
"""Cases of each way, over all bases."""

# A checkpoint here has 100 KB and its tokenizer 120 KB. The most goes to the names that 2**14 experts would have.
MOST_MEMORY = 64 * 2**20
NEVER_REFUSED = {"flipped_data", "no_numbers"}
# Forty problems, each with a tensor's name and what was expected of it.
LONGEST_TEXT = 10_000


def run(way: str, folder: Path, count: int, *options: str) -> list[dict[str, Any]]:
    """What came of each case, from a process of its own, which must live to the end."""
    command = [sys.executable, "-m", "tests.support.load_damaged", way, str(count), str(folder), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, (
        f"ended with {ended.returncode} in or after case {lines[-1] if lines else None}\n{ended.stderr[-3000:]}"
    )
    cases = [line for line in lines if "outcome" in line]
    assert len(cases) == count
    wrong = [
        f"{way} {case['number']} ({case['base']}: {case['what']}): {complaint}"
        for case in cases
        for complaint in complaints(case)
    ]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong[:20])
    return cases


def complaints(case: dict[str, Any]) -> list[str]:
    """What is wrong with how a case ended."""
    found = []
    if case["outcome"] not in case["allowed"]:
        found.append(f"{case['outcome']} where {case['allowed']} may be: {case['text'][-1500:]}")
    if case["outcome"] == "refused":
        text = case["text"]
        if not any(name in text for name in case["culprits"]):
            found.append(f"none of {case['culprits']} is named: {text[:500]}")
        if not text.isprintable() or not text.endswith(".") or len(text) > LONGEST_TEXT:
            found.append(f"not one short, printable sentence: {text[:500]!r} … {text[-50:]!r} ({len(text)})")
    if case["outcome"] == "other weights" and case["expected_spoilt"] not in ([], case["spoilt"]):
        found.append(f"NaN and infinities were found in {case['spoilt']} and are in {case['expected_spoilt']}")
    if os.strerror(errno.EFBIG) in case["text"]:
        found.append(f"wrote a file without end: {case['text']}")
    if case["grown"] > MOST_MEMORY:
        found.append(f"took {case['grown'] / 2**20:.0f} MiB")
    if case["wrote"]:
        found.append(f"changed files: {case['wrote']}")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_refused_or_changes_nothing(
    way: str, tmp_path: Path, measured: Callable[[str, float], float]
) -> None:
    cases = run(way, tmp_path, LOADED)
    outcomes = Counter(case["outcome"] for case in cases)
    assert (outcomes["refused"] == 0) == (way in NEVER_REFUSED)
    if way in NEVER_REFUSED:
        assert outcomes["other weights"] == LOADED
    measured("MiB taken while a damaged checkpoint of 100 KB is loaded", max(case["grown"] for case in cases) / 2**20)


@pytest.mark.parametrize("way", WAYS)
def test_damage_converted_is_refused_or_changes_nothing(way: str, tmp_path: Path) -> None:
    """And what holds NaN or infinities is refused when a check is asked for."""
    outcomes = Counter(case["outcome"] for case in run(way, tmp_path, CONVERTED, "convert"))
    assert (outcomes["refused"] == 0) == (way == "flipped_data")


def test_there_are_thousands() -> None:
    assert len(WAYS) * LOADED >= 2_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F64", "F4", "BOOL", "C64", "f32"]),
        "shape": st.lists(st.integers(-1, 3), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2),
    },
    optional={"x": JSON},
)
HEADER = st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3) | JSON


def accepted(content: bytes) -> bool:
    """Whether the headers of a folder with one such file are read; if so, safetensors' own reader agrees."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        file.write_bytes(content)
        try:
            found = read_headers(Path(name))
        except CheckpointError as error:
            text = str(error)
        else:
            text = ""
        if text:
            assert text.isprintable()
            assert str(file) in text
            return False
        with safe_open(file, framework="numpy") as opened:
            assert {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()} == {  # noqa: SIM118
                key: tensor.shape for key, tensor in found.items()
            }
        return True


@given(HEADER, st.integers(0, 24), st.integers(-2, 2))
def test_headers_of_any_content(header: object, data: int, lie: int) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) + lie)) + text + bytes(data)
    if accepted(content) and lie:
        assert text[len(text) + lie :].strip() == b""


@given(st.binary(max_size=64))
def test_files_of_any_content(content: bytes) -> None:
    accepted(content)


@given(
    st.lists(st.tuples(st.sampled_from(["F32", "F16", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4),
    st.integers(0, 9),
    st.binary(max_size=1),
)
def test_sound_headers_are_read(tensors: list[tuple[str, list[int]]], spaces: int, more: bytes) -> None:
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(tensors):
        start, size = end, {"F32": 4, "F16": 2, "U8": 1}[dtype]
        for axis in shape:
            size *= axis
        end += size
        header[f"tensor {number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode() + b" " * spaces
    assert accepted(struct.pack("<Q", len(text)) + text + bytes(end) + more) == (not more)


def test_headers_that_only_the_library_takes(tmp_path: Path) -> None:
    """Where two tensors have one name, it takes the last."""
    file = tmp_path / "model.safetensors"
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with safe_open(file, framework="numpy") as opened:
        assert list(opened.keys()) == ["a"]
    assert not accepted(file.read_bytes())


def test_gaps_are_refused_by_the_library_too(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    text = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(SafetensorError), safe_open(file, framework="numpy"):
        pass
    assert not accepted(file.read_bytes())
