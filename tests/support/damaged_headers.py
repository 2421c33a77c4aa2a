"""Safetensors files whose headers are damaged in thousands of ways, and a strict reader that shares no code with ours.

    python -m tests.support.damaged_headers COUNT

With a count it prints what of so many files the strict reader takes and ours doesn't, or the other way round.
"""

import copy
import json
import math
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from dbrx_fn.files.safetensors_header import checked_header

Read = dict[str, tuple[str, tuple[int, ...], int]]
"""Of each tensor its dtype, its shape, and in which byte of the file it begins."""

BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["F64", "I64", "U64"], 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def strictly_read(content: bytes) -> Read | None:
    """The tensors of a safetensors file of the strictest form; `None` for any other file."""
    try:
        length = int.from_bytes(content[:8], "little")
        text, data = content[8 : 8 + length], len(content) - 8 - length
        if len(content) < 8 or data < 0 or length > 16 * 2**20 or text[:1] != b"{":
            return None
        # Minus zero is no size, and half a surrogate pair no text.
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_int=_unsigned)
        json.dumps(header, ensure_ascii=False).encode()
        texts = header.pop("__metadata__", None)
        if texts is not None:
            assert isinstance(texts, dict)
            assert all(isinstance(value, str) for value in texts.values())
        found = {name: _strictly_read_tensor(name, entry) for name, entry in header.items()}
    except (ValueError, AssertionError, RecursionError, KeyError):
        return None
    end = 0
    for start, stop in sorted((start, stop) for _, _, start, stop in found.values()):
        if start != end:
            return None
        end = stop
    if end != data:
        return None
    return {name: (dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in found.items()}


def _strictly_read_tensor(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    assert name.isprintable()
    assert 0 < len(name.encode()) <= 256
    assert isinstance(entry, dict)
    assert entry.keys() == {"dtype", "shape", "data_offsets"}
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    assert isinstance(dtype, str)
    for sizes, most in ((shape, 2**31), (offsets, 2**64)):
        assert isinstance(sizes, list)
        assert all(type(size) is int and 0 <= size < most for size in sizes)
    assert len(shape) <= 8
    start, stop = offsets
    assert (stop - start) * 8 == math.prod(shape) * BITS[dtype]
    return dtype, tuple(shape), start, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def _unsigned(digits: str) -> int:
    assert digits[0] != "-"
    return int(digits)


_SCRAPS: list[Any] = [
    None, True, False, 0, 1, -1, -0.0, 2, 4, 8, 1.0, 4.0, 1e300, 10**30, 2**31, 2**31 - 1, 2**32 + 1, 2**63, 2**64,
    float("nan"), "", "x", "F32", "f32", "4", "\ud800", "\0", "a\nb", "\x1b[2J", "y" * 300, [], {}, [1], [0, 0], [[1]],
    {"F32": None}, {"a": 1}, {"format": "\ud800"}, ["F32", [1], [0, 4]], [0, 4, 4], [-0.0, 4], [1] * 9,
]  # fmt: skip

_TEXTS = [
    ("[0,", "[-0,"), ("[0,", "[0.0,"), ("[0,", "[00,"), ("[0,", "[0e0,"), ('"F32"', '{"F32":null}'),
    ('"F32"', '"\\u0046\\u0033\\u0032"'), ("{", "{ "), (":", " :\t"), ("}", ",}"), ("{", "{,"), ('"', "'"), ("]", ",]"),
    ('"dtype"', '"dtype":"U8","dtype"'), ('"shape"', '"shape":[2],"shape"'), ('"shape"', '"x":[],"shape"'),
    ('"data_offsets"', '"data_offsets":[0,4],"data_offsets"'), ('"__metadata__"', '"__metadata__":{},"__metadata__"'),
    ('"__metadata__":{', '"__metadata__":null,"b":{'), ('"__metadata__"', '"__metadata__ "'),
    ('"shape"', '"\\u0073hape"'), ('"format"', '"format":"x","format"'), ('"a0"', '"a1"'), ('"a1"', '"\\u0061\\u0030"'),
    ('"a0"', '"\\ud83d\\ude00"'),
    ('"a0"', '"\\ud83d"'), ('"pt"', '"\\udc00"'), ('"pt"', '"a\\nb"'), ('"pt"', '"a\tb"'), ('"pt"', '"\\q"'),
    ('"pt"', "null"), ('"pt"', "NaN"), ('{"format"', '[{"format"'), ('"a0"', '"a\x7f0"'), ('"a0"', '"a\u200b0"'),
    ('"a0"', '""'), ('"a0"', '"' + "n" * 256 + '"'), ('"a0"', '"' + "n" * 257 + '"'), ('"a0"', '"' + "é" * 129 + '"'),
]  # fmt: skip


def damaged_file(number: int) -> bytes:
    """A safetensors file's content, sound for one number of ten, and always the same for the same number."""
    rng = Random(number)
    header, end = _sound(rng)
    kind, more = rng.randrange(10), 0
    if kind in (1, 2, 3) and header:
        more = _change_entry(header, rng)
    if kind == 4 and header:
        _mix_entries(header, rng)
    if kind == 5:
        header["__metadata__"] = rng.choice([*copy.deepcopy(_SCRAPS), {"": ""}, {"a": None}, {"a": {"b": "c"}}])
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=(",", ":")).encode(errors="surrogatepass")
    if kind == 6:
        old, new = (piece.encode() for piece in rng.choice(_TEXTS))
        text = text.replace(old, new, rng.choice([1, 5]))
    if kind == 7:
        text = _change_bytes(text, rng)
    if kind == 8:
        text = _change_ends(text, rng)
    length = len(text)
    if kind == 9 and rng.random() < 0.5:
        lies = [length - 1, length + 1, length + 4, 0, 1, 7, 10**8, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1]
        length = max(0, rng.choice(lies))
    elif kind == 9:
        more = rng.choice([-(10**6), -4, -1, 1, 4, 100])
    content = struct.pack("<Q", length) + text + bytes(max(0, min(end + more, 10**5)))
    return content[: rng.randrange(len(content) + 1)] if kind == 9 and rng.random() < 0.3 else content


def _sound(rng: Random) -> tuple[dict[str, Any], int]:
    """A sound header, its entries in any order, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    end = 0
    for number in range(rng.randrange(6)):
        dtype = rng.choice(["F32", "BF16", "U32"] if rng.random() < 0.7 else list(BITS))
        # Whole bytes for all dtypes.
        shape = [*(rng.choice([0, 1, 2, 3, 8]) for _ in range(rng.randrange(4))), *([4] if BITS[dtype] < 8 else [])]
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        name = rng.choice(["transformer.blocks.{}.w", "a{}", "é{}"]).format(number)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if rng.random() < 0.6:
        header["__metadata__"] = rng.choice([{}, {"format": "pt"}, {"a": "b", "c": "é"}])
    names = list(header)
    rng.shuffle(names)
    return {name: header[name] for name in names}, end


def _change_entry(header: dict[str, Any], rng: Random) -> int:
    """Changes what is said of one tensor; returns by how many bytes the data is to be longer."""
    name = rng.choice(list(header))
    entry = header[name]
    scrap = copy.deepcopy(rng.choice(_SCRAPS))
    field = rng.choice(["dtype", "shape", "data_offsets", "data_offsets", "more", ""])
    if name == "__metadata__" or not field:
        header[name] = scrap
    elif field == "more" or rng.random() < 0.3:
        entry[field] = scrap
    elif field == "dtype":
        entry[field] = rng.choice([*BITS, "I4", "F128", "BF8", "F32 "])
    elif field == "shape":
        old, huge = entry[field], [[2**31], [2**31, 0], [2**63, 2, 0], [2**32, 2**32, 0], [0, 2**64], [-1], [1] * 9]
        changed = [[*old, 1], old[::-1], old[1:], [*old, 0], [*old, 2], [float(size) for size in old], *huge]
        entry[field] = rng.choice([*changed, [str(size) for size in old], [bool(size) for size in old]])
    else:
        start, stop = entry[field]
        shift = rng.choice([-4, -1, 1, 2, 4, 8, 2**31, 2**63, 2**64])
        offsets = [[start + shift, stop + shift], [start, stop + shift], [start + shift, stop], [stop, start]]
        entry[field] = rng.choice(offsets)
        return int(shift) if rng.random() < 0.3 else 0
    return 0


def _mix_entries(header: dict[str, Any], rng: Random) -> None:
    one, other = rng.choice(list(header)), rng.choice(list(header))
    what = rng.randrange(4)
    if what == 0:
        header[one] = header[other]
    elif what == 1:
        header[one], header[other] = header[other], header[one]
    elif what == 2:
        del header[one]
    else:
        header["more"] = header[one]


def _change_bytes(text: bytes, rng: Random) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(len(changed))
        what = rng.randrange(4)
        if what == 0:
            changed[place] = rng.randrange(256)
        elif what == 1:
            changed[place] = rng.choice(b'0123456789{}[]",: ')
        elif what == 2 and len(changed) > 1:
            del changed[place]
        else:
            changed.insert(place, rng.choice(b'0123456789{}[]",: \n\\-.e'))
    return bytes(changed)


def _change_ends(text: bytes, rng: Random) -> bytes:
    inner = b"," if len(text) > 2 else b""
    return rng.choice(
        [
            text + b" " * 9, text + b"\n\t ", b" " + text, text + b"\0", b"\xef\xbb\xbf" + text, text + text,
            text + b"x", b"[" + text + b"]", text[:-1], text[1:], text.decode(errors="replace").encode("utf-16"),
            b'{"a":' * 500 + b"}" * 500, text[:-1] + inner + b'"x":' + b"[" * 130 + b"]" * 130 + b"}",
        ]
    )  # fmt: skip


def our_reading(file: Path) -> Read | str:
    """What our reader says of a file, or why it refuses it."""
    try:
        header = checked_header(file)
    except ValueError as error:
        return str(error)
    return {name: (found.dtype, found.shape, found.start) for name, found in header.tensors.items()}


def main(count: int) -> None:
    """Compares the two readers on so many files."""
    outcomes: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile() as file:
        for number in range(count):
            content = damaged_file(number)
            Path(file.name).write_bytes(content)
            ours, strict = our_reading(Path(file.name)), strictly_read(content)
            outcomes["refused by both" if isinstance(ours, str) and strict is None else "read by both"] += 1
            if (None if isinstance(ours, str) else ours) != strict:
                outcomes["different"] += 1
                print(number, content[:300], ours, strict)
    print(dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
