"""A tokenizer's vocabulary, independent of the library that encodes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import shown
from dbrx_fn.text.literal_text import Ranges
from dbrx_fn.text.tokenizer_settings import Settings

Encode = Callable[[str, Ranges], list[int]]
"""Encodes a text. The ranges are those in which control tokens aren't recognized."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary, read from either form of a tokenizer's files.

    Attributes:
        encoder: makes the encoding function, from the control tokens' texts and ids.
        ordinary: the bytes of each token that decoding never leaves out.
        special: the bytes of each token that decoding may leave out.
        added: texts and ids of all added tokens.
        marked: the texts of the added tokens that a file marks as special.
        named: the texts of the named tokens, such as `eos_token`.
        before: the tokens put before a raw text.
        behind: the tokens put after a raw text.
        definition: makes bytes that identify the vocabulary.
    """

    encoder: Callable[[Mapping[str, int]], Encode]
    ordinary: Mapping[int, bytes]
    special: Mapping[int, bytes]
    added: Mapping[str, int]
    marked: frozenset[str]
    named: Mapping[str, str]
    before: tuple[int, ...]
    behind: tuple[int, ...]
    definition: Callable[[], bytes]

    def token(self, name: str, settings: Settings) -> int:
        """Returns the id of the token with this name in the settings.

        Raises:
            TokenizerError: if there is none, or the vocabulary doesn't have it.
        """
        content = self.named.get(name)
        if content is None:
            raise TokenizerError(
                f"{settings.path} must give a token for '{name}', such as \"<|endoftext|>\"; add it to that file."
            )
        token = self.find(content)
        if token is None:
            raise settings.wrong(f"'{name}'", "a token of the vocabulary", content)
        return token

    def find(self, content: str) -> int | None:
        """Returns the id of the token with this text."""
        if content in self.added:
            return self.added[content]
        piece = content.encode()
        return next((token for token, found in self.ordinary.items() if found == piece), None)


def byte_alphabet() -> dict[str, int]:
    """Returns the byte for each character of a byte-level vocabulary (the inverse of GPT-2's `bytes_to_unicode`)."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTES = byte_alphabet()


def check_ids(claims: Iterable[tuple[Path, Mapping[int, str]]], ids: Mapping[str, int]) -> None:
    """Checks that the files' ids of added tokens agree with the tokenizer's.

    Args:
        claims: each file with its tokens by id.
        ids: the tokenizer's ids.

    Raises:
        TokenizerError: if one differs.
    """
    for path, claimed in claims:
        for number, content in claimed.items():
            if ids.get(content) != number:
                found = f"has the id {ids[content]} there" if content in ids else "isn't there"
                raise TokenizerError(
                    f"{path} gives the token {shown(content)} the id {number}, which contradicts the vocabulary, since "
                    f"that token {found}; take all tokenizer files from the same checkpoint."
                )
