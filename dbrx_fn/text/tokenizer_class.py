"""The meaning of `tokenizer_class` beside a tokenizer.json: for some classes transformers has its own rules."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_fn.text.tokenizer_settings import Settings

_AS_IT_STANDS = (
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "PythonBackend",
    "LlamaTokenizer",
    "BloomTokenizer",
    "TiktokenTokenizerWrapper",
)
"""Classes, without an ending `Fast`, for which transformers 5.23 uses a byte-level tokenizer.json unchanged."""

_GPT2 = "GPT2Tokenizer"
_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


@dataclass(frozen=True)
class Definition:
    """The definition that the tokenizers library reads.

    Attributes:
        content: the JSON of a tokenizer.
        holds_added_tokens: whether it includes the file's added tokens.
        defaults: named tokens, for names that no file gives.
    """

    content: str
    holds_added_tokens: bool
    defaults: Mapping[str, str]


def definition_of(folder: Path, settings: Settings, file: Settings) -> Definition:
    """Returns the definition of a tokenizer: its file's, or for GPT2Tokenizer the one that this class makes from it.

    GPT2Tokenizer takes vocabulary, merges and post_processor from tokenizer.json and the rest from its own code:
    GPT-2's words, and `add_prefix_space` from tokenizer_config.json. Without a class, transformers takes it for any
    DBRX model. Where tokenizer.json cuts words in another way, as DBRX's does, the file is followed here all the same:
    it says how the model was trained. A warning tells so.

    Args:
        folder: the checkpoint's.
        settings: its tokenizer_config.json.
        file: its tokenizer.json.

    Raises:
        TokenizerError: if the class is unknown.
    """
    name, source = _class_name(folder, settings)
    as_it_stands = Definition(file.content, holds_added_tokens=True, defaults=_padding_token(file))
    if name is None or name.removesuffix("Fast") in _AS_IT_STANDS:
        return as_it_stands
    if name.removesuffix("Fast") != _GPT2:
        raise source.wrong(
            "'tokenizer_class'",
            '"PreTrainedTokenizerFast", which takes tokenizer.json as it stands, or "GPT2Tokenizer"',
            name,
        )
    cutter = file.value("pre_tokenizer")
    if file.value("normalizer") is None and _cuts_as_gpt2(cutter):
        return Definition(_as_gpt2(file, settings.flag("add_prefix_space", False)), False, _GPT2_TOKENS)
    warnings.warn(
        f"{source.path}: the tokenizer_class is GPT2Tokenizer, with which transformers 5 cuts words as GPT-2 did; "
        f"{file.path.name} cuts them in another way, and is followed. With PreTrainedTokenizerFast both do the same.",
        stacklevel=4,
    )
    return as_it_stands


def _class_name(folder: Path, settings: Settings) -> tuple[str | None, Settings]:
    """Returns the class as transformers finds it, and its file."""
    name = settings.text("tokenizer_class")
    if name:
        return name, settings
    config = Settings(folder / "config.json")
    name = config.text("tokenizer_class")
    return name or (_GPT2 if config.value("model_type") == "dbrx" else None), config


def _cuts_as_gpt2(cutter: Any) -> bool:
    return isinstance(cutter, dict) and cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True) is True


def _as_gpt2(file: Settings, add_prefix_space: bool) -> str:
    model = {key: file.value("model")[key] for key in ("type", "vocab", "merges")}
    words = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": words,
            "post_processor": file.value("post_processor"),
            "decoder": words,
            "model": model,
        }
    )


def _padding_token(file: Settings) -> dict[str, str]:
    padding = file.value("padding")
    if padding is None:
        return {}
    if not isinstance(padding, dict) or not isinstance(padding.get("pad_token"), str):
        raise file.wrong("'padding'", "null, or an object with a 'pad_token'", padding)
    return {"pad_token": padding["pad_token"]}
