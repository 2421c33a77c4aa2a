"""Reads a tokenizer's settings files, which are untrusted, and checks each value."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import LARGEST, parse_json, read_bounded, shown

_MOST_VALUES = 4_000_000
"""The most values in one file. Each may take some 60 bytes. The largest known vocabulary has about 2 million."""


class Settings:
    """The JSON object in one file. It is empty if the file is missing.

    Args:
        path: the file.
        most: its largest size in bytes.

    Attributes:
        content: the file's text.
        values: the parsed object.

    Raises:
        TokenizerError: if the file can't be read, or isn't a JSON object.
    """

    def __init__(self, path: Path, most: int = LARGEST) -> None:
        self.path = path
        self.content = read_text(path, most) if os.path.lexists(path) else "{}"
        self.values: Mapping[str, Any] = self._parsed(self.content)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            if sum(map(text.count, ",[{")) > _MOST_VALUES:
                raise ValueError(f"it has more than {_MOST_VALUES} values")
            values = parse_json(text.encode(), unique=True)
        except ValueError as error:
            raise TokenizerError(
                f"{self.path} isn't valid JSON ({error}); copy the file from the checkpoint again."
            ) from error
        if not isinstance(values, dict):
            raise self.wrong("the file", "a JSON object", values)
        return values

    def wrong(self, name: str, expected: str, found: object) -> TokenizerError:
        """Returns the error for a wrong value."""
        return TokenizerError(f"{self.path}: {name} must be {expected}, not {shown(found)}; correct the file.")

    def value(self, key: str) -> Any:
        """Returns the unchecked value, or None if there is none."""
        return self.values.get(key)

    def text(self, key: str) -> str | None:
        """Returns a text."""
        value = self.value(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(f"'{key}'", "a text", value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.value(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        raise self.wrong(f"'{key}'", "true or false", value)

    def token_ids(self, key: str) -> frozenset[int] | None:
        """Returns the ids of a value that is one id or a list of ids."""
        value = self.value(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(is_token_id(number) for number in ids):
            raise self.wrong(f"'{key}'", "a token id or a list of them", value)
        return frozenset(ids)

    def refuse(self, keys: Iterable[str], reason: str) -> None:
        """Checks that none of these settings is switched on.

        Raises:
            TokenizerError: if one is. `reason` is a clause that says what isn't supported.
        """
        for key in keys:
            if self.value(key):
                raise TokenizerError(
                    f"{self.path}: '{key}' is {shown(self.value(key))}, but {reason}; remove it from the file."
                )


def is_token_id(value: object) -> bool:
    """Returns whether this can be a token's id. MLX holds ids in signed 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def read_text(path: Path, most: int = LARGEST) -> str:
    """Returns a file's text.

    Raises:
        TokenizerError: if it can't be read, isn't UTF-8, or has more than `most` bytes.
    """
    try:
        text = read_bounded(path, most).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} isn't UTF-8 text ({error.reason}); copy the file from the checkpoint again."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise TokenizerError(f"{path} can't be read ({reason}); check the file and its permissions.") from error
    # Python, and so transformers, reads text in this way.
    return text.replace("\r\n", "\n").replace("\r", "\n")
