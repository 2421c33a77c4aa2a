"""A tokenizer as a GGUF file's metadata: the inverse of `gguf_tokenizer`.

The keys are those that `_set_vocab_gpt2` of llama.cpp's converter (conversion/base.py) writes.
"""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbrx_fn.checkpoints.gguf_tokenizer import ENDS_BY_TEXT, SAMPLING
from dbrx_fn.checkpoints.gguf_words import DBRX_WORDS, is_gpt4, name_of_words
from dbrx_fn.checkpoints.gguf_writer import Value
from dbrx_fn.checkpoints.tokenizer_files import fitting_tokenizer
from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown
from dbrx_fn.text.chatml_template import chatml_template
from dbrx_fn.text.tokenizer import Tokenizer, read_vocabulary
from dbrx_fn.text.tokenizer_settings import Settings
from dbrx_fn.text.vocabulary import BYTES, Vocabulary

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NAMES = {"bos_token": "bos", "pad_token": "padding", "unk_token": "unknown"}
_DRAWING: dict[str, tuple[float, int]] = {
    "temperature": (1.0, 2**31 - 1), "top_k": (50, 2**31 - 1), "top_p": (1.0, 1), "min_p": (0.0, 1)
}  # fmt: skip
"""Each setting's default in transformers, and the highest value that is written."""
_LOST: dict[str, object] = {"repetition_penalty": 1, "max_new_tokens": None, "stop_strings": []}
"""Settings that are followed here and have no key, each with a value that has no effect."""
_CHARACTERS = {byte: character for character, byte in BYTES.items()}


def vocabulary_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The metadata of a tokenizer.

    Args:
        folder: the tokenizer's files.
        vocab_size: the model's.

    Raises:
        TokenizerError: if it can't be read, or llama.cpp would make other tokens.
    """
    tokenizer = fitting_tokenizer(folder, vocab_size)
    vocabulary = read_vocabulary(folder, Settings(folder / "tokenizer_config.json"))
    definition = _definition(folder, vocabulary)
    words = name_of_words(definition["pre_tokenizer"], whole=bool(definition["model"].get("ignore_merges")))
    if words is None or definition["normalizer"] is not None:
        raise _foreign(folder, "cuts or normalizes texts in a way that llama.cpp has no name for")
    tokens, kinds = _tokens(folder, definition, vocabulary, tokenizer, vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in definition["model"]["merges"]],
        **_ids(vocabulary, tokenizer),
        **_around(folder, vocabulary),
        "tokenizer.chat_template": _template(tokenizer),
        **_sampling(folder),
    }


def _definition(folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer as the content of a tokenizer.json."""
    text = vocabulary.definition()
    if (folder / "tokenizer.json").exists():
        definition: dict[str, Any] = json.loads(text)
        return definition
    # One of tiktoken's.
    pattern, ranks, _ = ast.literal_eval(text.decode())
    words = DBRX_WORDS.pre_tokenizer() if is_gpt4(pattern) else None
    merges = [[_as_text(part) for part in merge] for merge in _merges_of_ranks(dict(ranks))]
    model = {"vocab": {_as_text(piece): number for piece, number in ranks}, "merges": merges}
    return {"normalizer": None, "pre_tokenizer": words, "added_tokens": [], "model": model}


def _foreign(folder: Path, what: str) -> TokenizerError:
    return TokenizerError(f"{folder} has a tokenizer that {what}: take another one with --tokenizer.")


def _tokens(
    folder: Path, definition: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[str], list[int]]:
    """The text and type of each token. Ids without a token are padding."""
    texts = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for text, number in definition["model"]["vocab"].items():
        texts[number], kinds[number] = text, _NORMAL
    for text, number in vocabulary.added.items():
        texts[number], kinds[number] = text, _CONTROL if text in tokenizer.control_tokens else _USER_DEFINED
    for token in definition["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _foreign(folder, f"finds {shown(token['content'])} by the characters around it, unlike llama.cpp")
    if len(set(texts)) < vocab_size:
        raise _foreign(folder, "has two tokens of one text")
    return texts, kinds


def _ids(vocabulary: Vocabulary, tokenizer: Tokenizer) -> dict[str, Value]:
    """The ids of named tokens. A file can name three ends of a text; llama.cpp knows some more by their texts."""
    named = {name: vocabulary.find(text) for name, text in vocabulary.named.items()}
    found: dict[str, Value] = {
        f"tokenizer.ggml.{key}_token_id": number
        for name, key in _NAMES.items()
        if (number := named.get(name)) is not None
    }
    eos = named.get("eos_token")
    known = {number for text, number in vocabulary.added.items() if text in ENDS_BY_TEXT}
    stops = sorted(tokenizer.stop_tokens, key=lambda number: (number != eos, number in known, number))
    for key, number in zip(("eos", "eot", "eom"), stops, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = number
    if lost := set(stops[3:]) - known:
        warnings.warn(f"A GGUF file names three stop tokens at most, so {sorted(lost)} are left out.", stacklevel=4)
    return found


def _around(folder: Path, vocabulary: Vocabulary) -> dict[str, Value]:
    bos, eos = (vocabulary.find(vocabulary.named.get(name, "")) for name in ("bos_token", "eos_token"))
    if vocabulary.before not in ((), (bos,)) or vocabulary.behind not in ((), (eos,)):
        raise _foreign(folder, "puts other tokens around a text than BOS and EOS")
    return {
        "tokenizer.ggml.add_bos_token": bool(vocabulary.before),
        "tokenizer.ggml.add_eos_token": bool(vocabulary.behind),
    }


def _template(tokenizer: Tokenizer) -> str:
    chat = tokenizer.chat_format
    return chatml_template(default_system=chat.default_system) if chat.template is None else chat.template


def _sampling(folder: Path) -> dict[str, Value]:
    """Settings of generation_config.json, if it asks for drawing tokens. Warns of what a GGUF file can't hold.

    Settings that aren't given are written too, since llama.cpp has other defaults.

    Raises:
        TokenizerError: if one is no number that a GGUF file can hold.
    """
    file = folder / "generation_config.json"
    try:
        settings = parse_json(read_bounded(file))
    except (OSError, ValueError):
        return {}
    if not isinstance(settings, dict):
        return {}
    if lost := [name for name, neutral in _LOST.items() if settings.get(name) not in (None, neutral)]:
        warnings.warn(f"A GGUF file can't hold {', '.join(lost)} of {file}: the new file is without.", stacklevel=4)
    if not settings.get("do_sample"):
        return {}
    found: dict[str, Value] = {}
    for key, name in SAMPLING.items():
        default, highest = _DRAWING[name]
        value, kind = settings.get(name), type(default)
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= highest
        if not is_number or kind(value) != value:
            what = "a whole number" if kind is int else "a number"
            raise TokenizerError(
                f"{file}: {name} is {shown(value)} where {what} from 0 to {highest} is expected: mend or remove it."
            )
        found[f"general.sampling.{key}"] = kind(value)
    return found


def _as_text(piece: bytes) -> str:
    """A byte-level token as it stands in a vocabulary."""
    return "".join(_CHARACTERS[byte] for byte in piece)


def _merges_of_ranks(ranks: Mapping[bytes, int]) -> Sequence[tuple[bytes, bytes]]:
    """The merges of a vocabulary of tiktoken, in their order: each token of the two parts that make it last."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, place = min((ranks.get(parts[n] + parts[n + 1], rank), n) for n in range(len(parts) - 1))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
