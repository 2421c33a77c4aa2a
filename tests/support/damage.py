"""Ways of damaging a checkpoint folder, each drawn from a generator, and what may come of it.

A way gets a whole checkpoint in a folder of its own and leaves it damaged.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.hub import SMALL
from tests.support import checkpoints

Outcome = Literal["refused", "same", "other config", "other weights", "other tokenizer"]
Base = Literal["fused", "split", "quantized"]
BASES: tuple[Base, ...] = ("fused", "split", "quantized")
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 20,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 3, "moe_top_k": 2},
}


@dataclass(frozen=True)
class Damage:
    """What was done to a folder.

    `what`: in words, for whoever reads of a failure.
    `culprits`: names of which an error must have at least one.
    `outcomes`: what may come of it.
    `spoilt`: leaves of the tree that hold NaN or infinities.
    """

    what: str
    culprits: tuple[str, ...]
    outcomes: tuple[Outcome, ...] = ("refused",)
    spoilt: tuple[str, ...] = field(default=())


Way = Callable[[Path, np.random.Generator], Damage]


def write_base(folder: Path, base: Base) -> None:
    """Writes a whole checkpoint of some 50 KB, with a tokenizer: one float32 file, or shards with an index."""
    tensors = checkpoints.random_tensors(_RAW, np.random.default_rng(0))
    if base == "fused":
        checkpoints.write_fused(folder, _RAW, tensors)
    elif base == "split":
        checkpoints.write_split(folder, _RAW, tensors, shards=3, dtype="bfloat16")
    else:
        checkpoints.write_split(folder, _RAW, tensors, shards=2, dtype="float16")
        for file in _files(folder):
            _quantize(file)
    for name in _TOKENIZER_FILES:
        (folder / name).write_bytes((SMALL / name).read_bytes())


def _quantize(file: Path) -> None:
    """Quantizes the experts of one shard, and names what that adds in the index."""
    arrays: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
    index = json.loads((file.parent / INDEX).read_bytes())
    for name in [name for name in arrays if ".experts." in name]:
        names = [name.removesuffix("weight") + leaf for leaf in ("weight", "scales", "biases")]
        arrays |= zip(names, mx.quantize(arrays[name], 32, 4), strict=True)
        index["weight_map"] |= dict.fromkeys(names, file.name)
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    (file.parent / INDEX).write_text(json.dumps(index))


# What is in a file


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _a_file(folder: Path, rng: np.random.Generator) -> Path:
    files = _files(folder)
    return files[rng.integers(len(files))]


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _a_tensor(header: Mapping[str, Any], rng: np.random.Generator) -> str:
    names = sorted(header.keys() - {"__metadata__"})
    return names[rng.integers(len(names))]


def _pick(rng: np.random.Generator, values: list[Any]) -> Any:
    return values[rng.integers(len(values))]


def _flip(content: bytes, start: int, stop: int, rng: np.random.Generator) -> bytes:
    """From one to three bytes of a range replaced by others."""
    changed = bytearray(content)
    for place in rng.integers(start, stop, rng.integers(1, 4)):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


_SCRAPS: list[object] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e308, 10**30, 10**400, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**64,
    float("nan"), float("inf"), "", "x", "32", "a\nb", "\x1b[2J", "\ud800", "\0", "y" * 10**5, [], {}, [1], [[[]]],
    {"a": 1}, {"name": "silu"}, {"name": "nope"}, "float16", "linear", {"rope_type": "yarn"}, {"rope_theta": "x"},
]  # fmt: skip


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# The ways


def truncated(folder: Path, rng: np.random.Generator) -> Damage:
    """A download that broke off, or went on with something else."""
    file = _a_file(folder, rng)
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    size = int(rng.integers(header if rng.random() < 0.5 else 0, len(content)))
    more = rng.bytes(int(rng.integers(1, 100))) if rng.random() < 0.2 else b""
    file.write_bytes(content + more if more else content[:size])
    return Damage(f"{file.name} ends at byte {size}, or has {len(more)} more", (file.name,))


def flipped_header(folder: Path, rng: np.random.Generator) -> Damage:
    """Bytes of the header's length or text are others."""
    file = _a_file(folder, rng)
    content = file.read_bytes()
    stop = 8 + struct.unpack("<Q", content[:8])[0]
    file.write_bytes(_flip(content, 0, 8 if rng.random() < 0.2 else stop, rng))
    return Damage(f"bytes of {file.name}'s header", (file.name, "transformer.", "lm_head."), ("refused", "same"))


def flipped_data(folder: Path, rng: np.random.Generator) -> Damage:
    """Bytes of tensors are others, which nothing can tell."""
    file = _a_file(folder, rng)
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    file.write_bytes(_flip(content, start, len(content), rng))
    return Damage(f"bytes of {file.name}'s data", (), ("other weights",))


def lying_offsets(folder: Path, rng: np.random.Generator) -> Damage:
    """A tensor lies over another, past the end, backwards or nowhere."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name, other = _a_tensor(header, rng), _a_tensor(header, rng)
    start, stop = header[name]["data_offsets"]
    size = stop - start
    shift = int(_pick(rng, [-4, -1, 1, 2, 4, 64, size, -size, len(data), 2**31, 2**40, 2**63 - size, 2**64 - size]))
    offsets: list[Any] = [
        [start + shift, stop + shift],
        [start, stop + shift],
        [start + shift, stop],
        [stop, start],
        [start, start],
        [start],
        [],
        [start, stop, stop],
        [float(start), float(stop)],
        [str(start), str(stop)],
        [start, None],
        [start, True],
        None,
        {"start": start, "stop": stop},
        header[other]["data_offsets"] if other != name else [0],
    ]
    header[name]["data_offsets"] = found = _pick(rng, offsets)
    _write(file, header, data)
    return Damage(f"{name} in {file.name} lies at {found}", (file.name, name))


def lying_shapes(folder: Path, rng: np.random.Generator) -> Damage:
    """A tensor's sizes are zero, negative, enormous, or no sizes; sometimes with offsets that fit."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name = _a_tensor(header, rng)
    shape = header[name]["shape"]
    size = int(np.prod(shape))
    shapes: list[Any] = [
        [*shape, 1],
        [1, *shape],
        [size, 1, 1],
        [],
        [0],
        [0, *shape],
        [*shape, 0],
        [-size for size in shape],
        [-1, -size],
        [2**31, *shape],
        [2**32 + shape[0], *shape[1:]],
        [2**63, 2, *shape],
        [2**64 + shape[0], *shape[1:]],
        [0, 2**63],
        [10**400],
        [shape[0] + 1, *shape[1:]],
        [float(size) for size in shape],
        [str(size) for size in shape],
        [True for _ in shape],
        [shape],
        [1] * 10_000 + shape,
        None,
        size,
        {"0": 1},
        "x" * 10**5,
    ]
    header[name]["shape"] = found = _pick(rng, shapes)
    empty = isinstance(found, list) and 0 in found
    if empty and rng.random() < 0.5:
        # Nothing of it is left, and all others lie where they are said to.
        start, stop = header[name]["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] > start:
                entry["data_offsets"] = [place - (stop - start) for place in entry["data_offsets"]]
        header[name]["data_offsets"] = [start, start]
        data = data[:start] + data[stop:]
    _write(file, header, data)
    return Damage(f"{name} in {file.name} is {str(found)[:80]}", (file.name, name))


def oversized(folder: Path, rng: np.random.Generator) -> Damage:
    """The last tensor of a file is said to be huge, and a sparse file of that size is there."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name = max(header.keys() - {"__metadata__"}, key=lambda name: int(header[name]["data_offsets"][1]))
    start, stop = header[name]["data_offsets"]
    times = int(_pick(rng, [2**10, 2**20, 2**24]))
    header[name]["shape"][0] *= times
    header[name]["data_offsets"] = [start, start + times * (stop - start)]
    _write(file, header, data)
    os.truncate(file, file.stat().st_size + (times - 1) * (stop - start))
    return Damage(f"{name} in {file.name} has {times} times its rows", (file.name, name))


def wrong_dtypes(folder: Path, rng: np.random.Generator) -> Damage:
    """A tensor's dtype is another, with the same or another size, or none at all."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name = _a_tensor(header, rng)
    known = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"]
    known += [*known, "C64", "F64", "I64", "U64", "F4", "F6_E2M3"]
    dtypes: list[Any] = [dtype for dtype in known if dtype != header[name]["dtype"]]
    dtypes += ["float32", "f32", "", "F32 ", "Q4_0", "z" * 10**5, "\x1b[31m", None, 7, ["F32"], {"F32": 1}, True]
    header[name]["dtype"] = found = _pick(rng, dtypes)
    _write(file, header, data)
    return Damage(f"{name} in {file.name} is {str(found)[:80]!r}", (file.name, name))


def wrong_names(folder: Path, rng: np.random.Generator) -> Damage:
    """A tensor has a name that isn't the model's, or can't be printed, or means a place in the file system."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name, other = _a_tensor(header, rng), _a_tensor(header, rng)
    new = _pick(
        rng,
        [
            f"../{name}", f"/etc/{name}", f"../../../tmp/{name}.safetensors", name.replace(".", "/"), f"{name}\\..\\x",
            "..", ".", "/", "", f"{name}\0", f"{name}\n", f"\n{name}", "\x1b[2J\x1b[H", "\ud800", "\ud83d",
            "\u202e" + name, name.upper(), name + " ", name.replace("w", "\uff57"), "q" * 10**5, "é" * 200,
            name.replace("0", "1", 1) + "0", name + ".weight", name.removesuffix(".weight") or "x", "__metadata__",
            "__metadata__ ", "%s%n", "{0.__class__}",
            f"{other}.scales", "model.layers.0.self_attn.q_proj.weight", "transformer.blocks.99999999999999999999.x",
            "transformer.blocks.-1.ffn.experts.mlp.w1", "transformer.blocks.0.ffn.experts.99999999999.w1.weight",
        ],
    )  # fmt: skip
    if new == name:
        new = name + "x"
    entry = header.pop(name)
    header[new] = entry
    if rng.random() < 0.3 and (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_bytes())
        index["weight_map"][new] = index["weight_map"].pop(name)
        (folder / INDEX).write_text(json.dumps(index))
    _write(file, header, data)
    return Damage(f"{name} in {file.name} is called {new[:80]!r}", (file.name, name, INDEX))


def duplicates(folder: Path, rng: np.random.Generator) -> Damage:
    """Something is there twice, and readers would take one or the other."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name, other = _a_tensor(header, rng), _a_tensor(header, rng)
    if rng.random() < 0.2:
        copy = folder / f"model-{rng.integers(10**5):05d}.safetensors"
        _write(copy, {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_bytes())
            index["weight_map"]["more"] = copy.name
            (folder / INDEX).write_text(json.dumps(index))
        return Damage(f"{name} is in {copy.name} too", (name,))
    text = _json(header)
    key, entry = _json(name), _json(header[other])
    inner = _pick(rng, [b'"dtype": "F32"', b'"shape": [1]', b'"data_offsets": [0, 4]', b'"dtype": "F32", "shape": [4]'])
    twice = _pick(
        rng,
        [
            b"{" + key + b": " + entry + b", " + text[1:],
            text[:-1] + b", " + key + b": " + entry + b"}",
            text[:-1] + b', "__metadata__": {}}' if b"__metadata__" in text else text[:-1] + b"," + text[1:],
            text[:-1] + b"," + text[1:],
            text.replace(key + b": {", key + b": {" + inner + b", "),
            text.replace(key + b": {", key + b": {" + _json(header[name])[1:-1] + b", "),
            text.replace(b'"__metadata__": {', b'"__metadata__": {"format": "mlx", "format": "pt", '),
        ],
    )
    _write(file, twice, data)
    return Damage(f"{name} or a part of it is in {file.name} twice", (file.name,))


def odd_headers(folder: Path, rng: np.random.Generator) -> Damage:
    """A header that is deep, huge, in another encoding, no object, or of another length than it says."""
    file = _a_file(folder, rng)
    header, data = _read(file)
    name = _a_tensor(header, rng)
    text = _json(header)
    deep = _nested(int(_pick(rng, [5, 100, 500, 950, 5_000, 200_000])))
    padded = text + b" " * int(rng.integers(1, 1000))
    if rng.random() < 0.15:
        _write(file, padded, data)
        return Damage(f"{file.name}'s header is padded", (file.name,), ("same",))
    if rng.random() < 0.35:
        length = _pick(rng, [0, 1, 2, len(text) - 1, len(text) + 1, 10**8 - 1, 10**8, 10**9, 2**31, 2**62, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", length) + text + data)
        if length < 2**31 and rng.random() < 0.5:
            os.truncate(file, length + 8 + len(data))
        return Damage(f"{file.name}'s header is said to have {length} bytes", (file.name,))
    texts = [
        deep, b'{"a": ' + deep + b"}", text[:-1] + b', "x": ' + deep + b"}",
        text.replace(b'"dtype"', b'"x": ' + deep + b', "dtype"', 1), b'{"a":' * 10**5,
        b'{"__metadata__": ' + deep + b"}",
        text.decode().encode("utf-16"), text.decode().encode("utf-16-le"), text.decode().encode("utf-32"),
        b"\xef\xbb\xbf" + text, b" " + text, text + b"\0", text + b"\0" * 1000, text + b"x", text + text,
        text[1:], text[:-1],
        b"[" + text + b"]", b"null", b"[]", b'""', b"1" * 10**5, b"NaN", b"{}", b'{"__metadata__": {}}', b"", b"{",
        b'{"',
        b"{" + b" " * 10**6, b"{" + b'"a":1,' * 10**5 + b'"b":1}', text.replace(b"}", b",}", 1), b"//\n" + text,
        text.replace(b"[0,", b"[00,", 1), text.replace(b"[0,", b"[NaN,", 1),
        text.replace(b"[0,", b"[" + b"9" * 5000 + b",", 1),
        text.replace(_json(name) + b": {", _json(name) + b': {"more": 1, '), text.replace(b'"shape"', b'"sizes"', 1),
        _json(header | {"__metadata__": {"format": 1}}), _json(header | {"__metadata__": ["pt"]}),
        _json(header | {"__metadata__": "pt"}), _json(header | {name: None}), _json(header | {name: []}),
        _json(header | {name: list(header[name])}), text.replace(b"transformer", b"\xff\xfe", 1),
        b"\x80\x02}q\x00.", b"PK\x03\x04", b"GGUF", rng.bytes(200),
    ]  # fmt: skip
    number = int(rng.integers(len(texts)))
    _write(file, texts[number], data)
    return Damage(f"{file.name}'s header is the odd one {number}", (file.name,))


def wrong_index(folder: Path, rng: np.random.Generator) -> Damage:
    """An index that names what isn't there, isn't so, isn't a file's name, or is no index."""
    path = folder / INDEX
    if not path.exists():
        files = _files(folder)
        names = _read(files[0])[0].keys() - {"__metadata__"}
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, files[0].name)}))
    text = path.read_bytes()
    index = json.loads(text)
    weight_map = index["weight_map"]
    culprits = (INDEX, ".safetensors", "transformer.", "lm_head.")
    kind = rng.integers(6)
    name = _pick(rng, sorted(weight_map))
    if kind == 0:
        path.write_bytes(_flip(text, 0, len(text), rng) if rng.random() < 0.5 else text[: rng.integers(len(text))])
        return Damage("bytes of the index", culprits, ("refused", "same"))
    if kind == 1:
        del weight_map[name]
        index["metadata"] = _pick(rng, [None, [], "x", {"total_size": -1}, {"total_size": 10**400}])
        path.write_text(json.dumps(index))
        return Damage(f"the index lacks {name}, and its metadata are odd", culprits, ("same",))
    if kind == 2:
        new = _pick(
            rng, ["nowhere.weight", "../x", "", "\0", "\x1b[2J", "\ud800", "n" * 10**5, "a\nb", name + ".scales"]
        )
        weight_map[new] = weight_map[name]
        path.write_text(json.dumps(index))
        return Damage(f"the index names the tensor {new[:80]!r}", culprits)
    if kind == 3:
        texts = [
            b"", b"{", b"null", b"[]", b"3", b'"x"', b"{}", _nested(10**5), b'{"weight_map":' * 10**5, rng.bytes(100),
            b'{"weight_map": ' + _nested(900) + b"}", b'{"weight_map": {"a": ' + _nested(900) + b"}}", text + b"\0",
            text + text,
            b'{"weight_map": {}}', b'{"weight_map": {"a": {}}}', text.decode().encode("utf-16"), b"\xff" * 10**5,
            text[:1] + b'"weight_map": {},' + text[1:],
            text.replace(b'"weight_map": {', b'"weight_map": {"a": "b", "a": "c", '),
        ]  # fmt: skip
        number = int(rng.integers(len(texts)))
        path.write_bytes(texts[number])
        return Damage(f"the index is the odd one {number}", culprits)
    if kind == 4 and rng.random() < 0.3:
        os.truncate(path, int(_pick(rng, [2**25, 2**30, 2**40])))
        return Damage("the index is a huge file", culprits)
    file = weight_map[name]
    new = _pick(
        rng,
        [
            *_SCRAPS, "/etc/passwd", f"../{folder.name}/{file}", f"./{file}", f"/{file}", f"{file}/", f"{file}/.", ".",
            "..", "../outside.safetensors", f"{file}\0", f"{file}.npz", "model.npy", "model.gguf", "pytorch_model.bin",
            CONFIG, file.upper(), "m" * 300 + ".safetensors", "é" * 130 + ".safetensors", "C:\\model.safetensors",
            "..\\model.safetensors", "~/model.safetensors", "$HOME.safetensors", "file:///etc/passwd",
            "a\nb.safetensors",
            *(other.name for other in _files(folder) if other.name != file),
        ],
    )  # fmt: skip
    weight_map[name] = new
    path.write_text(json.dumps(index))
    if isinstance(new, str) and new.startswith("../outside"):
        (folder.parent / "outside.safetensors").write_bytes((folder / file).read_bytes())
    return Damage(f"the index has {name} in {str(new)[:80]!r}", culprits)


def wrong_config(folder: Path, rng: np.random.Generator) -> Damage:
    """A config with other values, other types, or that is no config."""
    path = folder / CONFIG
    text = path.read_bytes()
    raw = json.loads(text)
    outcomes: tuple[Outcome, ...] = ("refused", "same", "other config")
    kind = rng.integers(4)
    if kind == 0:
        path.write_bytes(_flip(text, 0, len(text), rng) if rng.random() < 0.7 else text[: rng.integers(len(text))])
        return Damage("bytes of the config", (CONFIG,), outcomes)
    if kind == 1:
        texts = [
            b"", b"{", b"null", b"[]", b"3", b"{}", _nested(10**5), b'{"model_type":' * 10**5, rng.bytes(100),
            text + b"\0", text + text, b'{"model_type": ' + _nested(900) + b"}",
            text[:-2] + b', "attn_config": ' + _nested(900) + b"}",
            text[:-2] + b', "rope_scaling": ' + _nested(900) + b"}", text[:-2] + b', "dtype": ' + _nested(900) + b"}",
            text.replace(b"32", b"9" * 5000), text.decode().encode("utf-16"), b"\xff" * 10**5,
            text[:-2] + b', "model_type": "' + b"x" * 10**6 + b'", "architectures": 1}',
        ]  # fmt: skip
        number = int(rng.integers(len(texts)))
        path.write_bytes(texts[number])
        return Damage(f"the config is the odd one {number}", (CONFIG,), outcomes)
    if kind == 2 and rng.random() < 0.2:
        os.truncate(path, int(_pick(rng, [2**25, 2**30, 2**40])))
        return Damage("the config is a huge file", (CONFIG,))
    section = _pick(rng, [raw, raw, raw["attn_config"], raw["ffn_config"]])
    more = ["rope_parameters", "rope_scaling", "dtype", "tie_word_embeddings", "quantization", "resid_pdrop"]
    more += ["ffn_act_fn", "moe_normalize_expert_weights", "moe_jitter_eps", "moe_loss_weight", "initializer_range"]
    key = _pick(rng, [*section, *more])
    value = section[key] = _pick(rng, _SCRAPS)
    path.write_text(json.dumps(raw))
    return Damage(f"the config's {key} is {str(value)[:80]!r}", (CONFIG,), outcomes)


def wrong_sizes(folder: Path, rng: np.random.Generator) -> Damage:
    """A config of a model of other sizes, some so large that naming all of its tensors would take gigabytes."""
    raw = json.loads((folder / CONFIG).read_bytes())
    top = ["d_model", "n_heads", "n_layers", "n_layers", "max_seq_len", "vocab_size"]
    experts = ["ffn_hidden_size", "moe_num_experts", "moe_num_experts", "moe_top_k"]
    places = [(raw, top), (raw["ffn_config"], experts), (raw["attn_config"], ["kv_n_heads"])]
    section, key = _pick(rng, [(section, key) for section, keys in places for key in keys])
    section[key] = _pick(rng, [1, 2, 3, 4, 100, 10_000, 10_000, 2**14, 2**15, 2**31 - 1])
    (folder / CONFIG).write_text(json.dumps(raw))
    return Damage(f"the config's {key} is {section[key]}", (CONFIG,), ("refused", "same", "other config"))


def wrong_files(folder: Path, rng: np.random.Generator) -> Damage:
    """Something else than a file where one is expected: nothing, a folder, a link to itself, a pipe, a device."""
    path = _pick(rng, [CONFIG, *(file.name for file in [*_files(folder), *folder.glob(INDEX)])])
    file = folder / path
    content = file.read_bytes()
    file.unlink()
    kinds = ["nothing", "empty", "folder", "full folder", "loop", "chain", "dangling", "pipe", "zero", "null", "link"]
    kind = _pick(rng, kinds)
    if kind == "empty":
        file.write_bytes(b"")
    elif kind.endswith("folder"):
        file.mkdir()
        if kind == "full folder":
            (file / file.name).write_bytes(content)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "chain":
        file.symlink_to("there.safetensors")
        (folder / "there.safetensors").symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("../blobs/nothing")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind in ("zero", "null"):
        file.symlink_to(f"/dev/{kind}")
    elif kind == "link":
        # As the Hub's cache keeps its files.
        (folder.parent / "blobs").mkdir()
        (folder.parent / "blobs" / "0123").write_bytes(content)
        file.symlink_to("../blobs/0123")
        return Damage(f"{path} is a link", (path,), ("same",))
    outcomes: tuple[Outcome, ...] = ("same",) if path == INDEX and kind == "nothing" else ("refused",)
    culprits = (path, INDEX) if path != "model.safetensors" else (path, "holds no safetensors file")
    return Damage(f"{path} is {kind}", culprits, outcomes)


class _Bomb:
    """Unpickled, this makes a folder beside the checkpoint."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.trace,)


def pickles(folder: Path, rng: np.random.Generator) -> Damage:
    """Weights as a pickle, which would leave a trace if it were read; under its own name or another."""
    content = pickle.dumps(_Bomb(folder.parent / "trace"), protocol=int(rng.integers(0, 6)))
    name = _pick(
        rng,
        ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.PTH", "last.ckpt", "weights.pkl"],
    )
    if rng.random() < 0.2:
        (folder / name).write_bytes(content)
        return Damage(f"{name} lies beside the weights", (), ("same",))
    if rng.random() < 0.3:
        file = _a_file(folder, rng)
        file.write_bytes(content)
        return Damage(f"{file.name} is a pickle", (file.name,))
    for file in [*_files(folder), folder / INDEX]:
        file.unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    if rng.random() < 0.3:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    return Damage(f"{name} is all there is", (name,))


def no_numbers(folder: Path, rng: np.random.Generator) -> Damage:
    """NaN and infinities among the weights, which only a look at all of them finds."""
    leaves = set()
    for _ in range(rng.integers(1, 4)):
        file = _a_file(folder, rng)
        header, data = _read(file)
        floats = {name: entry for name, entry in header.items() if entry.get("dtype") in ("F32", "BF16", "F16")}
        name = _a_tensor(floats, rng)
        start, stop = floats[name]["data_offsets"]
        words: NDArray[Any] = np.frombuffer(data[start:stop], "<u4" if floats[name]["dtype"] == "F32" else "<u2").copy()
        exponent = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[floats[name]["dtype"]]
        words[rng.integers(len(words))] |= exponent
        _write(file, header, data[:start] + words.tobytes() + data[stop:])
        leaves.add(_leaf(name))
    return Damage(f"no numbers in {sorted(leaves)}", (), ("other weights",), tuple(sorted(leaves)))


def _leaf(name: str) -> str:
    """The path in the tree of what a tensor is a part of."""
    before, experts, after = name.partition(".experts.")
    if not experts:
        return name
    number, _, matrix = after.partition(".")
    return f"{before}.experts.mlp.{matrix if number.isdigit() else after.removeprefix('mlp.') + '.weight'}"


def wrong_tokenizers(folder: Path, rng: np.random.Generator) -> Damage:
    """Tokenizer files with other bytes or values, or that are no such files."""
    name = _pick(rng, [*_TOKENIZER_FILES, "added_tokens.json", "chat_template.jinja"])
    path = folder / name
    text = path.read_bytes() if path.exists() else b'{"<|x|>": 5000}'
    outcomes: tuple[Outcome, ...] = ("refused", "same", "other tokenizer")
    kind = rng.integers(4)
    if kind == 0:
        path.write_bytes(_flip(text, 0, len(text), rng) if rng.random() < 0.7 else text[: rng.integers(len(text))])
        return Damage(f"bytes of {name}", (name,), outcomes)
    if kind == 1:
        path.unlink(missing_ok=True)
        what = _pick(rng, ["pipe", "zero", "loop", "folder", "huge"])
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "huge":
            path.touch()
            os.truncate(path, 2**40)
        else:
            path.symlink_to("/dev/zero" if what == "zero" else name)
        return Damage(f"{name} is {what}", (name, "tokenizer.json", "eos_token"), outcomes)
    if kind == 2:
        deep = b'{"model": ' + _nested(900) + b"}"
        path.write_bytes(_pick(rng, [b"", b"{", b"[]", b"{}", _nested(10**5), b'{"a":' * 10**5, deep, b"\xff" * 10]))
        return Damage(f"{name} is odd", (name, "tokenizer.json"), outcomes)
    values = json.loads(text)
    keys = [*values, "eos_token", "eos_token_id", "added_tokens_decoder", "bos_token", "add_bos_token", "chat_template"]
    key = _pick(rng, keys)
    tokens: list[object] = [{"5": {"content": "\ud800"}}, {"1": {"content": "x" * 10**5}}, {"-1": 0}]
    value = values[key] = _pick(rng, [*_SCRAPS, *tokens])
    path.write_text(json.dumps(values))
    return Damage(f"{name}'s {key} is {str(value)[:80]!r}", (name, "tokenizer", "added_tokens"), outcomes)


WAYS: Mapping[str, Way] = {
    way.__name__: way
    for way in (
        truncated,
        flipped_header,
        flipped_data,
        lying_offsets,
        lying_shapes,
        oversized,
        wrong_dtypes,
        wrong_names,
        duplicates,
        odd_headers,
        wrong_index,
        wrong_config,
        wrong_sizes,
        wrong_files,
        pickles,
        no_numbers,
        wrong_tokenizers,
    )
}
