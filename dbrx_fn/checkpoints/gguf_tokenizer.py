"""The tokenizer in a GGUF file's metadata, as the files that Hugging Face's tokenizers have.

The metadata: `tokenizer.ggml.*` and `tokenizer.chat_template` of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and how `llama_vocab` of llama.cpp's src/llama-vocab.cpp
reads them. `Tokenizer`s are then made as of any checkpoint, within the same bounds.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_fn.checkpoints.gguf_header import Contents, read_contents
from dbrx_fn.checkpoints.gguf_words import DBRX_WORDS, WORDS, Words
from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import shown

_TOKENS, _MERGES, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
_TEMPLATE = "tokenizer.chat_template"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""`llama_token_type` of llama.cpp's include/llama.h."""

_NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
_ENDS = ("eos", "eot", "eom")
ENDS_BY_TEXT = ("<|im_end|>", "<|endoftext|>")
"""Control tokens that llama.cpp stops at whatever the file says; those that DBRX's vocabularies have."""
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""Settings of generation_config.json under `general.sampling.`."""
_UNFOLLOWED = {"penalty_repeat": 1, "xtc_probability": 0, "mirostat": 0}
"""Other settings there that change texts, each with the value that has no effect."""


def gguf_tokenizer_kind(file: Path) -> str:
    """What a file's own tokenizer is, in a few words.

    Raises:
        CheckpointError, TokenizerError: as in `gguf_tokenizer`.
    """
    _, name = _read(file)
    said = "dbrx, which it doesn't say" if name is None else name
    return f"its own, with words as in {said}"


def gguf_tokenizer(file: Path) -> dict[str, bytes]:
    """The contents of tokenizer.json, tokenizer_config.json and generation_config.json, by these names.

    Raises:
        CheckpointError: if the file can't be read.
        TokenizerError: if it has no tokenizer, or one that can't be followed exactly.
    """
    files, name = _read(file)
    if name is None:
        warnings.warn(
            f"{file} doesn't say how its tokenizer cuts words (tokenizer.ggml.pre), as files from before May 2024: they"
            " are cut as DBRX was trained.",
            stacklevel=3,
        )
    return {file_name: json.dumps(content, ensure_ascii=False).encode() for file_name, content in files.items()}


def _read(file: Path) -> tuple[dict[str, Any], str | None]:
    """The files' contents, and the file's name for how words are cut."""
    contents = read_contents(file, (_TOKENS, _MERGES, _KINDS, _TEMPLATE))
    words, name = _words(file, contents)
    tokens = _list(file, contents, _TOKENS, str)
    kinds = _list(file, contents, _KINDS, int)
    merges = _list(file, contents, _MERGES, str)
    if len(kinds) != len(tokens):
        raise _wrong(file, _KINDS, f"{len(tokens)} numbers, one for each token,", f"{len(kinds)} numbers")
    named = _named(file, contents, tokens)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[number] for key, name in _NAMES.items() if (number := named.get(key)) is not None},
    }
    if _TEMPLATE in contents.whole:
        settings["chat_template"] = str(contents.whole[_TEMPLATE])
    processor = _processor(file, tokens, named, *_around(contents, words))
    return {
        "tokenizer.json": _definition(file, words, tokens, kinds, merges, processor),
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": _ends(file, named, tokens, kinds)} | _sampling(file, contents),
    }, name


def _words(file: Path, contents: Contents) -> tuple[Words, str | None]:
    """How words are cut, and the file's name for it.

    DBRX's first files have no name for it, or `default`, with which llama.cpp cuts as no model was trained.
    """
    metadata = contents.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        raise TokenizerError(f"{file} holds no tokenizer: {_BESIDE}.")
    if kind != "gpt2":
        raise TokenizerError(
            f"{file} holds a tokenizer of the kind {shown(kind)}, and only 'gpt2', byte-level BPE, can be followed:"
            f" {_BESIDE}."
        )
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        return DBRX_WORDS, None
    words = WORDS.get(str(name))
    if words is None:
        raise TokenizerError(
            f"{file} cuts words in the way {shown(name)} (tokenizer.ggml.pre), and only {', '.join(WORDS)} can be"
            f" followed: {_BESIDE}."
        )
    return words, str(name)


_BESIDE = "put the same model's tokenizer files beside it, or make a checkpoint with dbrx_fn.convert and --tokenizer"


def _list(file: Path, contents: Contents, key: str, kind: type) -> list[Any]:
    found = contents.whole.get(key)
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise _wrong(file, key, f"a list of {'texts' if kind is str else 'whole numbers'}", "something else or nothing")
    return found


def _wrong(file: Path, key: str, expected: str, found: object) -> TokenizerError:
    return TokenizerError(f"{file} has {found} as {key} where {expected} is expected: {_BESIDE}.")


def _named(file: Path, contents: Contents, tokens: list[str]) -> dict[str, int]:
    """The ids of the tokens with a name, such as `eos`."""
    found: dict[str, int] = {}
    for name in {*_NAMES, *_ENDS}:
        key = f"tokenizer.ggml.{name}_token_id"
        number = contents.metadata.get(key)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(tokens):
            raise _wrong(file, key, f"a token below {len(tokens)}", number)
        found[name] = number
    return found


def _ends(file: Path, named: Mapping[str, int], tokens: list[str], kinds: list[int]) -> list[int]:
    """The stop tokens. llama.cpp takes some control tokens for ends, whatever the file says."""
    ends = {named[name] for name in _ENDS if name in named}
    ends |= {n for n, token in enumerate(tokens) if kinds[n] == _CONTROL and token in ENDS_BY_TEXT}
    if not ends:
        raise _wrong(file, "tokenizer.ggml.eos_token_id", "the token that ends a text", "nothing")
    return sorted(ends)


def _definition(
    file: Path,
    words: Words,
    tokens: list[str],
    kinds: list[int],
    merges: list[str],
    processor: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    vocabulary: dict[str, int] = {}
    added: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _UNUSED or not token:
            continue
        if kind not in (_NORMAL, _CONTROL, _USER_DEFINED):
            raise _wrong(file, f"the type of token {number}", "one of 1, 3, 4 and 5", kind)
        if token in vocabulary or token in added:
            raise _wrong(file, _TOKENS, "each token once", f"{shown(token)} twice")
        (vocabulary if kind == _NORMAL else added)[token] = number
    # The library numbers added tokens on behind the vocabulary, unless they are part of it.
    behind = list(range(len(vocabulary), len(vocabulary) + len(added)))
    if list(added.values()) != behind:
        vocabulary |= added
    return {
        "version": "1.0",
        "added_tokens": [_added(token, number, kinds[number] == _CONTROL) for token, number in added.items()],
        "normalizer": None,
        "pre_tokenizer": words.pre_tokenizer(),
        "post_processor": processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "ignore_merges": words.whole,
            "vocab": vocabulary,
            "merges": [_merge(file, merge) for merge in merges],
        },
    }


def _added(content: str, number: int, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _merge(file: Path, merge: str) -> list[str]:
    # As in llama.cpp, the first character can't be the space between both parts.
    place = merge.find(" ", 1)
    if place < 0:
        raise _wrong(file, _MERGES, "two parts with a space between", shown(merge))
    return [merge[:place], merge[place + 1 :]]


def _around(contents: Contents, words: Words) -> tuple[bool, bool]:
    """Whether a text begins with the BOS token, and ends with the EOS token."""
    said = contents.metadata.get
    return bool(said("tokenizer.ggml.add_bos_token", words.begins)), bool(said("tokenizer.ggml.add_eos_token", False))


def _processor(
    file: Path, tokens: list[str], named: Mapping[str, int], before: bool, behind: bool
) -> dict[str, Any] | None:
    if not before and not behind:
        return None
    around = [name for name, is_there in (("bos", before), ("eos", behind)) if is_there]
    for name in around:
        if name not in named:
            raise _wrong(file, f"tokenizer.ggml.{name}_token_id", "a token, which texts have around them,", "nothing")
    pieces: dict[str, Any] = {name: {"SpecialToken": {"id": tokens[named[name]], "type_id": 0}} for name in around}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*([pieces["bos"]] if before else []), text, *([pieces["eos"]] if behind else [])],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            tokens[named[name]]: {
                "id": tokens[named[name]],
                "ids": [named[name]],
                "tokens": [tokens[named[name]]],
            }
            for name in around
        },
    }


def _sampling(file: Path, contents: Contents) -> dict[str, Any]:
    """Settings for drawing tokens. Only numbers count; a temperature above 0 means drawing. Warns of other settings."""
    given = contents.metadata.get
    names = [f"general.sampling.{key}" for key in _UNFOLLOWED]
    asked = [name for name, neutral in zip(names, _UNFOLLOWED.values(), strict=True) if given(name, neutral) != neutral]
    if asked:
        warnings.warn(
            f"{file} asks for {', '.join(asked)}: not supported here, so texts are made without.", stacklevel=4
        )
    found = {name: given(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    # A float32 as the decimal number that it stands for.
    numbers = {
        name: value if isinstance(value, int) else float(f"{value:.7g}")
        for name, value in found.items()
        if isinstance(value, int | float)
    }
    draws = numbers.get("temperature", 0) > 0
    return {"do_sample": True, **numbers} if draws else {}
