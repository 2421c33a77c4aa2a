"""Reads a checkpoint's tokenizer: text to tokens, tokens to text, and text as its tokens come."""

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
from dbrx_fn.text.vocabulary import Encode, Vocabulary


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
        end_of_text: the token between two documents: `<|endoftext|>`, or what the settings name as `eos_token`,
            whichever stops generation; where neither does, the first stop token; None where the vocabulary has neither.
        control_tokens: texts and ids of the added tokens that steer the model: those marked as special, and those that
            stop generation. Added tokens that are neither, such as `<think>`, are words of the vocabulary.
        added_tokens: texts of all added tokens.
        chat_format: how the checkpoint writes a conversation, for `dbrx_fn.text.chat.render_chat`.
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
        """Returns a SHA-256, in hexadecimal, of all that a text's tokens depend on."""
        return hashlib.sha256(self._definition()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True, literal: Ranges = ()) -> list[int]:
        """Returns the tokens of a text; the text of an added token, such as `<|im_start|>`, becomes that token.

        Lone surrogates, which no UTF-8 text can hold, are encoded as U+FFFD.

        Args:
            text: what to encode.
            add_special_tokens: whether the tokens that the files put around a raw text are added, such as the one that
                begins it (DBRX's files say none); a rendered conversation is encoded without, as transformers'
                `apply_chat_template` does.
            literal: ranges of characters, as (start, end), in which no control token is recognized: its text there is
                encoded as ordinary text, even where only a part of it lies in a range. `[(0, len(text))]` recognizes
                none at all. Where the ranges hold no control token's text, the tokens are those without ranges.

        Raises:
            InputError: a literal range isn't inside of the text.
            TokenizerError: the library fails at this text.
        """
        ranges = checked_ranges(text, literal)
        valid = _valid(text)
        if len(valid) != len(text):
            # Two surrogates have become one character.
            ranges = [(len(_valid(text[: start + 1])) - 1, len(_valid(text[:end]))) for start, end in ranges]
        tokens = self._encode(valid, ranges)
        return [*self._before, *tokens, *self._behind] if add_special_tokens else tokens

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the exact text of tokens.

        Bytes that are no UTF-8 become U+FFFD. Numbers that stand for no token are left out. Spaces are never cleaned
        up, whatever `clean_up_tokenization_spaces` says, since that changes the text.
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
    settings = Settings(folder / "tokenizer_config.json")
    if os.path.lexists(folder / "tokenizer.json"):
        vocabulary = read_tokenizer_json(folder / "tokenizer.json", settings)
    elif settings.text("tokenizer_class") == CLASS:
        vocabulary = read_tiktoken(folder, settings)
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer.json, and no tokenizer_config.json whose tokenizer_class is {CLASS}; "
            "copy the checkpoint's tokenizer files there."
        )
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


def _valid(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_stop_tokens(folder: Path, settings: Settings, vocabulary: Vocabulary) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = Settings(folder / name).token_ids("eos_token_id")
        if ids is not None:
            return ids
    # Without <|im_end|> a conversation would never stop; base models don't make it.
    turn_end = {token for token, piece in vocabulary.special.items() if piece == b"<|im_end|>"}
    return frozenset({vocabulary.token("eos_token", settings)} | turn_end)


def _read_end_of_text(vocabulary: Vocabulary, stop_tokens: frozenset[int]) -> int | None:
    named = [vocabulary.find(name) for name in ("<|endoftext|>", vocabulary.named.get("eos_token")) if name is not None]
    found = [token for token in named if token is not None]
    # A model that learns to end with another token never stops.
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
        template=template,
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
