"""Collects a checkpoint's added tokens from all of its files, as transformers does.

Source: `PreTrainedTokenizerBase._from_pretrained`, `PreTrainedTokenizerBase.__init__` and `TokenizersBackend.__init__`
of transformers 5.23 (tokenization_utils_base.py, tokenization_utils_tokenizers.py).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from dbrx_fn.files.json_file import shown
from dbrx_fn.text.tokenizer_settings import Settings, is_token_id

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The standard names of special tokens, in the order in which transformers adds them."""

_EXTRA, _OLD_EXTRA, _MODEL_SPECIFIC = (
    "extra_special_tokens",
    "additional_special_tokens",
    "model_specific_special_tokens",
)
_SWITCHES = ("add_bos_token", "add_eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_TOKENS, _MOST_TEXT = 2**16, 2**22
"""The most added tokens, and characters of them. The most known are 6 thousand tokens. Adding takes quadratic time."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the model's own rules split it.

    Attributes:
        content: its text.
        single_word: whether it is found only if no letter or digit touches it.
        lstrip: whether it includes the white space before it.
        rstrip: whether it includes the white space after it.
        normalized: whether it is searched in the normalized text. None means: unless it is special.
        special: whether decoding may leave it out.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def made(self) -> tokenizers.AddedToken:
        """Returns the tokenizers library's object for it."""
        return tokenizers.AddedToken(
            self.content,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=not self.special if self.normalized is None else self.normalized,
            special=self.special,
        )


@dataclass(frozen=True)
class SpecialTokens:
    """The added tokens in a checkpoint's files.

    Attributes:
        named: the tokens with a name, such as `eos_token`.
        listed: the tokens to which a file gives an id, in the order of the ids.
        unlisted: the tokens that are only named or extra. They get the next ids.
        claims: each file with the ids that it gives. The tokenizer's ids must agree.
    """

    named: Mapping[str, AddedToken]
    listed: Mapping[int, AddedToken]
    unlisted: tuple[AddedToken, ...]
    claims: tuple[tuple[Path, Mapping[int, str]], ...]

    def added(self) -> list[AddedToken]:
        """Returns the tokens in the order in which transformers adds them. Named tokens are special."""
        names = {token.content for token in self.named.values()}
        every = (*self.listed.values(), *self.unlisted)
        return [replace(token, special=True) if token.content in names else token for token in every]


def read_special_tokens(
    folder: Path,
    settings: Settings,
    file_tokens: Mapping[int, AddedToken] | None = None,
    *,
    present: Collection[str] = (),
    defaults: Mapping[str, str] | None = None,
) -> SpecialTokens:
    """Reads tokenizer_config.json and, if that has no `added_tokens_decoder`, the two older files.

    special_tokens_map.json then overrides tokenizer_config.json, as in transformers.

    Args:
        folder: the checkpoint's.
        settings: its tokenizer_config.json.
        file_tokens: the added tokens of its tokenizer.json, by id.
        present: texts of the added tokens that the tokenizer already has.
        defaults: texts of named tokens, for names that no file gives.

    Raises:
        TokenizerError: if a value has a wrong type.
    """
    values = dict(settings.values)
    if _OLD_EXTRA in values and not values.get(_EXTRA):
        values[_EXTRA] = values.pop(_OLD_EXTRA)
    specific = {key: values.pop(key) for key in list(values) if _is_own_name(key) and isinstance(values[key], str)}
    if isinstance(values.get(_EXTRA), dict):
        specific |= values.pop(_EXTRA)
    if specific:
        values[_MODEL_SPECIFIC] = specific

    older = Settings(folder / "added_tokens.json")
    claims = [(older.path, _ids_of(older))]
    if settings.value("added_tokens_decoder") is not None:
        listed = _decoder(settings)
        claims.append((settings.path, {number: token.content for number, token in listed.items()}))
        read_from = {}
    else:
        older_map = Settings(folder / "special_tokens_map.json")
        _merge_map(values, older_map)
        special = _texts(values[key] for key in NAMES if values.get(key)) | _texts(_as_list(values.get(_EXTRA)))
        listed = {
            number: AddedToken(content, normalized=content not in special, special=content in special)
            for number, content in claims[0][1].items()
        }
        listed |= file_tokens or {}
        read_from = dict.fromkeys(older_map.values, older_map)

    by_text = {token.content: token for token in listed.values()}
    named, extra = _named(dict(defaults or {}) | values, lambda key: read_from.get(key, settings))
    named = {key: by_text.get(token.content, token) if key in NAMES else token for key, token in named.items()}
    known = {*by_text, *present}
    unlisted = tuple(dict.fromkeys(token for token in (*named.values(), *extra) if token.content not in known))
    _check_size(settings, (*listed.values(), *unlisted))
    return SpecialTokens(named, dict(sorted(listed.items())), unlisted, tuple(claims))


def read_token(settings: Settings, name: str, value: Any) -> AddedToken:
    """Returns a token from its text, or from an object of text and flags.

    Raises:
        TokenizerError: if the value is neither.
    """
    if isinstance(value, str):
        value = {"content": value, "special": True}
    if isinstance(value, AddedToken):
        return value
    entry = value if isinstance(value, dict) else {}
    content = entry.get("content")
    flags = {key: flag for key, flag in entry.items() if key in _FLAGS and flag is not None}
    known = entry.keys() <= {*_FLAGS, "content", "__type", "id"}
    sound = known and all(isinstance(flag, bool) for flag in flags.values())
    if not isinstance(content, str) or not content or not _is_unicode(content) or not sound:
        raise settings.wrong(name, "a text or an object of 'content' and the flags " + ", ".join(_FLAGS), value)
    return AddedToken(content, **flags)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_own_name(key: str) -> bool:
    return key.endswith("_token") and key not in (*NAMES, *_SWITCHES)


def _is_token(value: Any) -> bool:
    return isinstance(value, str | AddedToken) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _texts(values: Iterable[Any]) -> set[str]:
    tokens = (value.content if isinstance(value, AddedToken) else value for value in values)
    return {token for token in tokens if isinstance(token, str)}


def _ids_of(older: Settings) -> dict[int, str]:
    found: dict[int, str] = {}
    for content, number in older.values.items():
        if not is_token_id(number) or not content or not _is_unicode(content):
            raise older.wrong(shown(content), "the id of a token", number)
        if number in found:
            raise older.wrong(f"token {number}", shown(found[number]), content)
        found[number] = content
    return found


def _decoder(settings: Settings) -> dict[int, AddedToken]:
    entries = settings.value("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise settings.wrong("'added_tokens_decoder'", "an object of tokens by id", entries)
    found = {}
    for key, entry in entries.items():
        number = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else None
        name = f"'added_tokens_decoder' entry {shown(key)}"
        if number is None or not is_token_id(number) or not isinstance(entry, dict) or not entry.get("content"):
            raise settings.wrong(name, "a token id with its 'content'", entry)
        found[number] = read_token(settings, name, entry)
    return found


def _merge_map(values: dict[str, Any], source: Settings) -> None:
    """Replaces values of tokenizer_config.json by those of special_tokens_map.json."""
    for key, value in source.values.items():
        if key not in (*NAMES, _EXTRA, _OLD_EXTRA) and not _is_own_name(key):
            raise source.wrong(f"the key {shown(key)}", "the name of a special token, such as 'eos_token'", key)
        if key == _EXTRA and isinstance(value, list):
            value = [*_as_list(values.get(_EXTRA)), *(_as_special(source, key, token) for token in value)]
        elif key != _EXTRA:
            value = _as_special(source, key, value)
        values[key] = value
    if isinstance(values.get(_EXTRA), dict):
        values[_MODEL_SPECIFIC] = (values.get(_MODEL_SPECIFIC) or {}) | values.pop(_EXTRA)


def _as_special(source: Settings, key: str, value: Any) -> Any:
    return read_token(source, f"'{key}'", value | {"special": True}) if isinstance(value, dict) else value


def _named(
    values: Mapping[str, Any], source: Callable[[str], Settings]
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the named tokens, and the extra ones. `source` gives a key's file."""
    # An empty text is no token.
    given = {key: values[key] for key in NAMES if values.get(key) not in (None, "")}
    given |= {key: value for key, value in values.items() if _is_own_name(key) and _is_token(value)}
    specific = values.get(_MODEL_SPECIFIC)
    if specific is not None and not isinstance(specific, dict):
        raise source(_MODEL_SPECIFIC).wrong(f"'{_MODEL_SPECIFIC}'", "an object of tokens by name", specific)
    given |= specific or {}
    named = {key: read_token(source(key), f"'{key}'", value) for key, value in given.items()}

    key = _EXTRA if _EXTRA in values else _OLD_EXTRA
    extra = values.get(key)
    if extra is not None and not isinstance(extra, list):
        raise source(key).wrong(f"'{key}'", "a list of tokens or an object of tokens by name", extra)
    return named, [read_token(source(key), f"'{key}'", value) for value in extra or []]


def _check_size(settings: Settings, tokens: Iterable[AddedToken]) -> None:
    texts = [token.content for token in tokens]
    size = sum(map(len, texts))
    if len(texts) > _MOST_TOKENS or size > _MOST_TEXT:
        raise settings.wrong(
            "the added tokens",
            f"at most {_MOST_TOKENS} with {_MOST_TEXT} characters together",
            f"{len(texts)} with {size}",
        )
