"""Headers of safetensors files: what is sound is read as safetensors itself reads it, and nothing else is."""

import os
import resource
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open

from dbrx_fn.files.safetensors_header import checked_header
from tests.support.damaged_headers import damaged_file, our_reading, strictly_read


def test_thousands_of_damaged_headers_are_read_as_by_a_strict_reader(tmp_path: Path) -> None:
    file = tmp_path / "model"
    outcomes: Counter[str] = Counter()
    for number in range(4_000):
        content = damaged_file(number)
        file.write_bytes(content)
        found, expected = our_reading(file), strictly_read(content)
        if isinstance(found, str):
            assert expected is None, (number, found)
            assert found.isprintable()
            assert len(found) < 300
            outcomes["refused"] += 1
        else:
            assert found == expected, number
            outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 1_000


def test_what_is_read_is_what_safetensors_reads(tmp_path: Path) -> None:
    file = tmp_path / "model"
    read = 0
    for number in range(1_000):
        file.write_bytes(damaged_file(number))
        if isinstance(our_reading(file), str):
            continue
        read += 1
        header = checked_header(file)
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            assert header.texts == (opened.metadata() or {})
        assert {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()} == {
            name: (found.dtype, list(found.shape)) for name, found in header.tensors.items()
        }
    assert read > 200


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """No more of it than the process has and a bit."""
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system doesn't say how much a process has")
def test_a_file_larger_than_the_address_space_is_called_so(tmp_path: Path) -> None:
    file = tmp_path / "model"
    text = b'{"a":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,1073741824]}}'
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + 2**30)
    assert checked_header(file).tensors["a"].shape == (2**30,)
    with address_space(2**28), pytest.raises(OSError, match=r"can't be mapped within the limit of `ulimit -v`"):
        checked_header(file)
