"""Tokenizer folders that a stranger made to do harm: to crash, hang, fill memory, or be read in another way."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tokenizer_folders import CL100K_WORDS, trained

Settings = dict[str, Any]
Way = Callable[[random.Random, Path, Settings], None]
"""Writes tokenizer.json, and what else it wants, into a folder; it gets the content of a sound one."""

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**32, 2**64, 10**400, "", "a", "\ud800", "\x00", "é" * 1000, [], {}, [[]]),
    *([1, 2], {"type": "Nope"}, {"content": "a"}, [None], {"a": {"b": []}}),
]
EXPRESSIONS = [
    *(r"(a+)+$", r"(.*)*x", r"(x+x+)+y", r"a*a*b", r"[\s\S]*\x00", r"(a|a)*b", r"(a?){30}a{30}", r"(?=.*x)"),
    *(r"(.*?,){11}P", r"(?<n>a)\k<n>", r"\g<0>", r"(?~ab)", r"(\w|\s)*x", r"([a-z ]+)*$", r"^(([a-z])+.)+[A-Z]$"),
    *(
        r"(?:a*)*b",
        r"(",
        r")",
        r"[",
        r"a{1,99999}",
        r"(?<=a+)b",
        r"\1",
        "",
        "a|" * 400,
        "(" * 400,
        "a?" * 40 + "a" * 40,
    ),
    *(r"\p{L}+", r"\s+$", r".+", r"\s*[\r\n]+", CL100K_WORDS, r"\w+!", r"(?i:ab)+", r"\p{Nope}", r"[z-a]", r"(?x: a)"),
]
ATOMS = ["a", r"\s", r"\w", ".", "[a-z]", r"\p{L}", "[^x]", "(?:ab)", "(a|b)", r"[\s\S]", "(a+)", r"(\s|a)"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def sound() -> Settings:
    """The content of a tokenizer.json that all ways start from."""
    model = json.loads(trained())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": CL100K_WORDS}, "behavior": "Isolated", "invert": False}
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(name, len(model["vocab"]) + n) for n, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def token(content: object, number: object, **flags: object) -> Settings:
    return {"id": number, "content": content} | dict.fromkeys(FLAGS, False) | {"special": True} | flags


def write(folder: Path, content: object, **others: object) -> None:
    others = {"generation_config": {"eos_token_id": 5}} | others
    for name, value in ({"tokenizer": content} | others).items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def expression(chooser: random.Random) -> str:
    if chooser.random() < 0.5:
        return chooser.choice(EXPRESSIONS)
    parts = [chooser.choice(ATOMS) + chooser.choice(["", "*", "+", "?", "+?", "{2,9}", "++"]) for _ in range(4)]
    inner = "".join(parts)
    return chooser.choice([inner, f"({inner})*", f"(?:{inner})+b", f"{inner}|{parts[0]}", f"(?={inner})", f"{inner}$"])


def expressions(chooser: random.Random, folder: Path, content: Settings) -> None:
    pattern = {"Regex": expression(chooser)}
    if chooser.random() < 0.7:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = pattern
    else:
        content["normalizer"] = {"type": "Replace", "pattern": pattern, "content": chooser.choice(["", "a", "é" * 8])}
    write(folder, content)


def growth(chooser: random.Random, folder: Path, content: Settings) -> None:
    steps: list[Settings] = [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * chooser.choice([1, 2, 50])},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "aa"},
        {"type": "Replace", "pattern": {"Regex": "a?"}, "content": "aaaa"},
        {"type": "Prepend", "prepend": "a" * chooser.choice([1, 10**4])},
        {"type": "ByteLevel"},
        {"type": "NFKD"},
    ]
    count = chooser.choice([1, 8, 31, 200, 1000])
    kind = chooser.choice(["normalizer", "mixed", "pre_tokenizer", "nested"])
    if kind == "pre_tokenizer":
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [byte_level] * count}
    elif kind == "nested":
        step: Settings = chooser.choice(steps)
        for _ in range(min(count, 200)):
            step = {"type": "Sequence", "normalizers": [step, step][: chooser.choice([1, 2]) if count < 10 else 1]}
        content["normalizer"] = step
    else:
        chosen = [chooser.choice(steps)] * count if kind == "normalizer" else chooser.choices(steps, k=count)
        content["normalizer"] = {"type": "Sequence", "normalizers": chosen}
    write(folder, content)


def models(chooser: random.Random, folder: Path, content: Settings) -> None:
    vocabulary = content["model"]["vocab"]
    content["model"] = chooser.choice(
        [
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
            {"type": "WordLevel", "vocab": {"a": 0}},
            {
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 2**62,
            },
            {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7, "byte_fallback": False},
            {"type": "Unigram", "vocab": [], "unk_id": None},
            {"vocab": vocabulary, "merges": []},
            {"type": "BPE", "vocab": [], "merges": []},
            {"type": "BPE", "vocab": {}, "merges": []},
            *({"type": "BPE", "vocab": vocabulary, "merges": junk} for junk in JUNK),
        ]
    )
    write(folder, content)


def model_fields(chooser: random.Random, folder: Path, content: Settings) -> None:
    model = content["model"]
    key = chooser.choice(
        [
            *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
            *("ignore_merges", "type", "vocab", "merges", "cache_capacity"),
        ]
    )
    model[key] = chooser.choice([*JUNK, 0.5, 1.0, 2.0, "##", "<unk>", "Ġ"])
    if chooser.random() < 0.3:
        # Fewer bytes than there are, so that some characters are unknown.
        model["vocab"] = {"a": 0, "b": 1}
        model["merges"] = []
    write(folder, content)


def ids(chooser: random.Random, folder: Path, content: Settings) -> None:
    model = content["model"]
    names = [*model["vocab"]]
    if chooser.random() < 0.5:
        content["added_tokens"] = []
    for _ in range(chooser.choice([1, 1, 1, 50])):
        kind = chooser.randrange(6)
        name = chooser.choice(names)
        if kind == 0:
            model["vocab"][name] = chooser.choice([-1, 2**31, 2**32 - 1, 2**32, 2**63, 1.5, None, "3", True, 2**31 - 1])
        elif kind == 1:
            model["vocab"][name] = chooser.randrange(len(names))
        elif kind == 2:
            model["merges"].insert(
                0, chooser.choice([["a", "zz"], ["a"], "a b c", [1, 2], ["", ""], "", ["a", "b", "c"]])
            )
        elif kind == 3:
            model["vocab"].pop(name, None)
        elif kind == 4:
            model["vocab"][f"<{len(names)}>"] = chooser.choice([len(names), 2**16, 2**20])
        else:
            model["vocab"][chooser.choice(["", "\x00", "日本", "a" * 10**5, "\ud800"])] = len(
                names
            ) + chooser.randrange(9)
    write(folder, content)


def steps(chooser: random.Random, folder: Path, content: Settings) -> None:
    """Normalizers, cutters and decoders of all kinds, some with what they need."""
    charsmap = chooser.choice(["", "AAAA", "////", "!!", "A" * 10**4])
    kinds: list[Settings] = [
        {"type": "Precompiled", "precompiled_charsmap": charsmap},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "CharDelimiterSplit", "delimiter": chooser.choice(["", "ab", "\ud800", "a"])},
        {"type": "FixedLength", "length": chooser.choice([0, -1, 2**63, 3])},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"String": "a" * 10**5}, "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"String": "a", "Regex": "b"}, "behavior": "Isolated", "invert": False},
        {"type": "Punctuation", "behavior": chooser.choice(["Isolated", "Nope", 3])},
        {"type": "Digits", "individual_digits": chooser.choice([True, "yes"])},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        {"type": "Strip", "strip_left": True, "strip_right": True, "content": "a", "start": 2**63, "stop": -1},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
        *({"type": kind} for kind in ("Fuse", "ByteFallback", "Nmt", "Lowercase", "StripAccents", "UnicodeScripts")),
        *({"type": kind} for kind in ("NFC", "Whitespace", "WhitespaceSplit", "ByteLevel", "BertPreTokenizer", "Nope")),
    ]
    part, key = chooser.choice(
        [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")]
    )
    chosen = chooser.choice([*kinds, *JUNK])
    content[part] = chooser.choice([chosen, {"type": "Sequence", key: [chosen]}, {"type": "Sequence", key: chosen}])
    write(folder, content)


def processors(chooser: random.Random, folder: Path, content: Settings) -> None:
    a, b, c = ({"Sequence": {"id": name, "type_id": 0}} for name in "ABC")
    special = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    number = chooser.choice([0, 321, 322, 10**6, 2**32 - 1, 2**40, -1, None])
    known = {"<|im_end|>": {"id": "<|im_end|>", "ids": [number] * chooser.choice([0, 1, 1, 5, 10**4]), "tokens": ["x"]}}
    template: Settings = {
        "type": "TemplateProcessing",
        "single": chooser.choice(
            [
                [a],
                [b],
                [],
                [a, a],
                [a, b],
                [c],
                [special],
                [special, a],
                [special] * 1000 + [a],
                [a, special] * 9,
                "$A",
                None,
            ]
        ),
        "pair": chooser.choice([[a, b], [], [a], None]),
        "special_tokens": chooser.choice([known, known, {}, {"x": {}}, None, []]),
    }
    pair = {"sep": ["x", number], "cls": ["y", chooser.choice([5, number])]}
    nested: Settings = template
    for _ in range(chooser.choice([1, 100, 400])):
        nested = {"type": "Sequence", "processors": [nested]}
    content["post_processor"] = chooser.choice(
        [
            *(template, template, template, nested),
            {"type": "BertProcessing", **pair},
            {"type": "RobertaProcessing", **pair, "trim_offsets": True, "add_prefix_space": True},
            {"type": "Sequence", "processors": [template, {"type": "BertProcessing", **pair}]},
            {"type": "Sequence", "processors": [{"type": "BertProcessing", **pair}] * chooser.choice([2, 9, 40])},
            chooser.choice(JUNK),
        ]
    )
    write(folder, content)


def strange_token(chooser: random.Random, number: object) -> Any:
    content = chooser.choice(
        [*JUNK, " ", "  ", "\n", " b", "a ", "a", "aa", "ab a", "<|x|>", "\u0301", "a" * 10**5, "\ufeff", "<|im_end|>"]
    )
    flags = {
        flag: chooser.choice([True, True, False, None, 3, "yes"] if chooser.random() < 0.1 else [True, False])
        for flag in FLAGS
    }
    entry = token(content, chooser.choice([number, number, number, *JUNK[:8], 5]), **flags)
    if chooser.random() < 0.1:
        entry.pop(chooser.choice([*entry]))
    return chooser.choice([entry] * 9 + [chooser.choice(JUNK)])


def added_tokens(chooser: random.Random, folder: Path, content: Settings) -> None:
    """Strange ones in any of the files, which the texts hold too."""
    start = len(content["model"]["vocab"]) + 3
    strange = [strange_token(chooser, start + n) for n in range(chooser.choice([1, 3, 8]))]
    kind = chooser.randrange(5)
    if kind == 0:
        content["added_tokens"] += strange
        write(folder, content)
    elif kind == 1:
        keys = [str(entry.get("id")) if isinstance(entry, dict) else "x" for entry in strange]
        entries = [
            {key: value for key, value in entry.items() if key != "id"} if isinstance(entry, dict) else entry
            for entry in strange
        ]
        write(folder, content, tokenizer_config={"added_tokens_decoder": dict(zip(keys, entries, strict=True))})
    elif kind == 2:
        contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in strange]
        found = {str(text): start + n for n, text in enumerate(contents)}
        write(folder, content, added_tokens=chooser.choice([found, {name: "x" for name in found}, strange]))
    elif kind == 3:
        names = ("eos_token", "pad_token", "own_token", "extra_special_tokens", "additional_special_tokens", "x")
        named = {chooser.choice(names): chooser.choice([entry, [entry], {"a": entry}]) for entry in strange}
        write(folder, content, special_tokens_map=named)
    else:
        many = chooser.choice([3, 5_000, 70_000])
        listed = {str(start + n): {"content": f"<|{n}|>", "special": True} for n in range(many)}
        write(folder, content, tokenizer_config={"added_tokens_decoder": listed})


def settings(chooser: random.Random, folder: Path, content: Settings) -> None:
    keys = [
        "tokenizer_class",
        "bos_token",
        "eos_token",
        "extra_special_tokens",
        "additional_special_tokens",
        "own_token",
    ]
    keys += [
        "added_tokens_decoder",
        "model_specific_special_tokens",
        "chat_template",
        "add_bos_token",
        "add_prefix_space",
    ]
    keys += [
        "split_special_tokens",
        "init_inputs",
        "fast_tokenizer_files",
        "post_processor",
        "tokenizer_object",
        "vocab",
    ]
    chosen = {key: chooser.choice([*JUNK, "<|im_end|>", "GPT2Tokenizer"]) for key in chooser.sample(keys, 3)}
    files: Settings = {chooser.choice(["tokenizer_config", "tokenizer_config", "special_tokens_map"]): chosen}
    if chooser.random() < 0.3:
        files[chooser.choice(["config", "generation_config", "tokenizer_config"])] = chooser.choice(JUNK)
    write(folder, content, **files)


def anywhere(chooser: random.Random, folder: Path, content: Settings) -> None:
    """Junk in the place of any value of tokenizer.json."""
    for _ in range(chooser.choice([1, 1, 1, 4])):
        place: Any = content
        while True:
            keys = [*place] if isinstance(place, dict) else range(len(place))
            key = chooser.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or chooser.random() < 0.2:
                break
            place = place[key]
        place[key] = copy.deepcopy(chooser.choice(JUNK))
    write(folder, content)


def written(chooser: random.Random, folder: Path, content: Settings) -> None:
    """Files that aren't JSON, have keys twice, are huge, or are no files."""
    write(folder, content)
    name = chooser.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
    path = folder / name
    text = path.read_text() if path.exists() else "{}"
    kind = chooser.randrange(8)
    if kind == 0:
        path.write_text(text[: chooser.randrange(len(text))])
    elif kind == 1:
        damaged = bytearray(text.encode())
        damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
        path.write_bytes(damaged)
    elif kind == 2:
        twice = '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}, "added_tokens_decoder": 3, '
        path.write_text("{" + twice + text[1:])
    elif kind == 3:
        path.write_text(text[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}")
    elif kind == 4:
        path.unlink(missing_ok=True)
        chooser.choice([os.mkfifo, os.mkdir])(path)
    elif kind == 5:
        path.unlink(missing_ok=True)
        path.symlink_to(chooser.choice(["/dev/zero", "/dev/null", name, "nowhere"]))
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(chooser.choice([2**26 + 1, 2**40, 0]))
    else:
        part = chooser.choice(["[],", "{},", '"ab",', "1.5,", '{"a":1},'])
        size = chooser.choice([2**20, 2**24 - 2**10, 2**26 - 2**10])
        path.write_text(text[:-1] + ', "x": [' + part * ((size - len(text)) // len(part)) + "0]}")


WAYS: tuple[Way, ...] = (
    *(expressions, growth, models, model_fields, ids, steps, processors, added_tokens, settings, anywhere, written),
)
ONE_FILE = {way.__name__ for way in (expressions, growth, models, model_fields, ids, steps, processors)}
"""Ways that write a tokenizer.json whose meaning no other file changes."""
