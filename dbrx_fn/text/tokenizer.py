"""A checkpoint's tokenizer: text to tokens, tokens to text, and text from a stream of tokens."""

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.chat_format import ChatFormat
from dbrx_fn.text.literal_text import Ranges, checked_ranges
from dbrx_fn.text.tiktoken_vocabulary import CLASS, read_tiktoken
from dbrx_fn.text.tokenizer_json import read_tokenizer_json
from dbrx_fn.text.tokenizer_settings import Settings, read_text
from dbrx_fn.text.valid_text import valid_text
from dbrx_fn.text.vocabulary import Encode, Vocabulary


class TextStream:
    """Turns a stream of tokens into text, without ever returning part of a character.

    All pieces together equal `Tokenizer.decode` of all tokens. The tokenizers library's `DecodeStream` doesn't
    guarantee that for invalid UTF-8, so Python's incremental decoder is used.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the text that this token completes. It may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """Returns the remaining text, with U+FFFD for incomplete characters. The stream is then empty."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer, made by `read_tokenizer`.

    Attributes:
        vocab_size: the highest token id plus one. There may be gaps below it, and the model's vocabulary may be larger.
        stop_tokens: the tokens that end a generated text.
        end_of_text: the token between two documents. It is `<|endoftext|>` or the settings' `eos_token`, whichever
            stops generation; if neither does, the first stop token; None if the vocabulary has neither.
        control_tokens: texts and ids of the added tokens that steer the model: special tokens, and stop tokens. Other
            added tokens, such as `<think>`, are words of the vocabulary.
        added_tokens: texts of all added tokens.
        chat_format: the checkpoint's format of conversations, for `dbrx_fn.text.chat.render_chat`.
    """

    vocab_size: int
    stop_tokens: frozenset[int]
    end_of_text: int | None
    control_tokens: Mapping[str, int]
    added_tokens: frozenset[str]
    chat_format: ChatFormat
    _encode: Encode = field(repr=False)
    _before: tuple[int, ...] = field(repr=False)
    _behind: tuple[int, ...] = field(repr=False)
    _ordinary: Mapping[int, bytes] = field(repr=False)
    _special: Mapping[int, bytes] = field(repr=False)
    _definition: Callable[[], bytes] = field(repr=False)

    def fingerprint(self) -> str:
        """Returns a hexadecimal SHA-256 of everything that a text's tokens depend on."""
        return hashlib.sha256(self._definition()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True, literal: Ranges = ()) -> list[int]:
        """Returns the tokens of a text. The text of an added token, such as `<|im_start|>`, becomes that token.

        Lone surrogates, which UTF-8 can't hold, are encoded as U+FFFD.

        Args:
            text: the text to encode.
            add_special_tokens: whether to add the tokens that the files put around a raw text, such as a BOS token.
                (DBRX's files have none.) A rendered conversation is encoded without them, as in transformers'
                `apply_chat_template`.
            literal: ranges of characters, as (start, end), without control tokens. A control token's text there is
                encoded as ordinary text, even if only a part of it lies in a range. `[(0, len(text))]` recognizes none
                at all. Ranges without a control token's text change nothing.

        Raises:
            InputError: if a literal range isn't within the text.
            TokenizerError: if the library fails for this text.
        """
        ranges = checked_ranges(text, literal)
        valid = valid_text(text)
        if len(valid) != len(text):
            # A pair of surrogates has become one character.
            ranges = [(len(valid_text(text[: start + 1])) - 1, len(valid_text(text[:end]))) for start, end in ranges]
        tokens = self._encode(valid, ranges)
        return [*self._before, *tokens, *self._behind] if add_special_tokens else tokens

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the exact text of tokens.

        Bytes that aren't UTF-8 become U+FFFD. Ids without a token are left out. Spaces are never cleaned up, regardless
        of `clean_up_tokenization_spaces`, since that changes the text.
        """
        pieces = [self.token_bytes(token, skip_special_tokens=skip_special_tokens) for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Returns a new stream for the tokens of one text."""
        return TextStream(lambda token: self.token_bytes(token, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int, *, skip_special_tokens: bool = False) -> bytes:
        """Returns the bytes of a token; none for a number that stands for no token."""
        if token in self._special:
            return b"" if skip_special_tokens else self._special[token]
        return self._ordinary.get(token, b"")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint.

    Two forms are supported: a `tokenizer.json` of the `tokenizers` library with byte-level BPE, and the settings of
    Databricks' `TiktokenTokenizerWrapper`, which name a vocabulary of tiktoken. If a folder has both, tokenizer.json is
    read, since it is complete and needs no download. Source of the second form: tiktoken.py of the Hub's
    databricks/dbrx-instruct, which is llm-foundry's `TiktokenTokenizerWrapper`.

    Stop tokens come from generation_config.json; else from `eos_token_id` of config.json; else they are `eos_token` of
    tokenizer_config.json and `<|im_end|>`.

    Args:
        folder: the checkpoint's folder, with these files and perhaps chat_template.jinja.

    Raises:
        TokenizerError: if files are missing, unreadable or contradictory, or tiktoken can't get its vocabulary.
    """
    if not folder.is_dir():
        raise TokenizerError(f"{folder} isn't a folder; give the folder that holds the checkpoint's tokenizer files.")
    settings = Settings(folder / "tokenizer_config.json")
    vocabulary = read_vocabulary(folder, settings)
    stop_tokens = _read_stop_tokens(folder, settings, vocabulary)
    control_tokens = {
        content: number
        for content, number in vocabulary.added.items()
        if content in vocabulary.marked or number in stop_tokens
    }
    return Tokenizer(
        vocab_size=1 + max((*vocabulary.ordinary, *vocabulary.special)),
        stop_tokens=stop_tokens,
        end_of_text=_read_end_of_text(vocabulary, stop_tokens),
        control_tokens=control_tokens,
        added_tokens=frozenset(vocabulary.added),
        chat_format=replace(
            _read_chat_format(folder, settings, vocabulary),
            control_tokens=tuple(control_tokens),
            stop_tokens=tuple(content for content, number in control_tokens.items() if number in stop_tokens),
        ),
        _encode=vocabulary.encoder(control_tokens),
        _before=vocabulary.before,
        _behind=vocabulary.behind,
        _ordinary=vocabulary.ordinary,
        _special=vocabulary.special,
        _definition=vocabulary.definition,
    )


def read_vocabulary(folder: Path, settings: Settings) -> Vocabulary:
    """Reads the vocabulary of a checkpoint's tokenizer.

    Args:
        folder: the checkpoint's.
        settings: its tokenizer_config.json.

    Raises:
        TokenizerError: as in `read_tokenizer`.
    """
    if os.path.lexists(folder / "tokenizer.json"):
        return read_tokenizer_json(folder / "tokenizer.json", settings)
    if settings.text("tokenizer_class") == CLASS:
        return read_tiktoken(folder, settings)
    raise TokenizerError(
        f"{folder} has no tokenizer.json, and no tokenizer_config.json whose tokenizer_class is {CLASS}; "
        "copy the checkpoint's tokenizer files there."
    )


def _read_stop_tokens(folder: Path, settings: Settings, vocabulary: Vocabulary) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = Settings(folder / name).token_ids("eos_token_id")
        if ids is not None:
            return ids
    # Without <|im_end|> a conversation would never stop. Base models don't generate it.
    turn_end = {token for token, piece in vocabulary.special.items() if piece == b"<|im_end|>"}
    return frozenset({vocabulary.token("eos_token", settings)} | turn_end)


def _read_end_of_text(vocabulary: Vocabulary, stop_tokens: frozenset[int]) -> int | None:
    named = [vocabulary.find(name) for name in ("<|endoftext|>", vocabulary.named.get("eos_token")) if name is not None]
    found = [token for token in named if token is not None]
    # A model that learned to end with another token would never stop.
    stops = [token for token in found if token in stop_tokens]
    others = sorted(stop_tokens & (vocabulary.ordinary.keys() | vocabulary.special.keys()))
    return next(iter([*stops, *others, *found] if found else []), None)


def _read_chat_format(folder: Path, settings: Settings, vocabulary: Vocabulary) -> ChatFormat:
    template: str | None
    template_file = folder / "chat_template.jinja"
    if os.path.lexists(template_file):
        template, source = read_text(template_file), str(template_file)
    else:
        template, source = _read_template(settings), f"'chat_template' in {settings.path}"
    return ChatFormat(
        template=None if template is None else valid_text(template),
        default_system=settings.flag("use_default_system_prompt", True),
        special_tokens=vocabulary.named,
        source=source,
    )


def _read_template(settings: Settings) -> str | None:
    value = settings.value("chat_template")
    if not isinstance(value, list):
        return settings.text("chat_template")
    for entry in value:
        if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    raise settings.wrong("'chat_template'", "a text or a list with a template named 'default'", value)
