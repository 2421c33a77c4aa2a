"""Reads a request's body field by field. Each field is followed, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import parse_json, shown


class FieldError(InputError):
    """A field that can't be followed.

    `field`: its name.
    `code`: OpenAI's error code, if it has one.
    """

    def __init__(self, field: str, sentence: str, code: str | None = None) -> None:
        super().__init__(sentence)
        self.field, self.code = field, code


class Fields:
    """The fields of a JSON object. The reader takes them one by one, and then calls `finish`.

    A field that is null counts as absent, as OpenAI's clients mean it.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix

    @property
    def names(self) -> tuple[str, ...]:
        """Fields that haven't been taken yet."""
        return tuple(self._left)

    def take(self, name: str) -> Any:
        """A field's value of any type; `None` if it is absent."""
        return self._left.pop(name, None)

    def required(self, name: str) -> Any:
        """A field's value of any type.

        Raises:
            FieldError: if it is absent.
        """
        value = self.take(name)
        if value is None:
            raise FieldError(
                self._prefix + name, f"{self._prefix}{name} is missing: give it.", "missing_required_parameter"
            )
        return value

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(name, value, "a text")

    def flag(self, name: str, *, absent: bool = False) -> bool:
        """True or false."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return absent if value is None else value
        raise self._wrong(name, value, "true or false")

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.take(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
            return value
        raise self._wrong(name, value, f"a whole number from {least} to {most}")

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number from `least` to `most`."""
        value = self.take(name)
        if value is None:
            return None
        # A whole number can be too large for a float.
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        raise self._wrong(name, value, f"a number from {least:g} to {most:g}")

    def inner(self, name: str) -> "Fields | None":
        """The fields of an object."""
        value = self.take(name)
        if value is None or isinstance(value, dict):
            return None if value is None else Fields(value, f"{self._prefix}{name}.")
        raise self._wrong(name, value, "an object")

    def refuse(self, name: str, *neutral: object) -> None:
        """Refuses an unsupported field, unless its value asks for nothing.

        Raises:
            FieldError: if it asks for something.
        """
        value = self.take(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
            raise FieldError(
                self._prefix + name,
                f"{self._prefix}{name} is not supported by this server: leave it out.",
                "unsupported_parameter",
            )

    def finish(self) -> None:
        """Checks that every field has been taken.

        Raises:
            FieldError: naming one that hasn't.
        """
        for name in self._left:
            field = name if name.isprintable() and len(name) <= 80 else shown(name)
            raise FieldError(
                self._prefix + field,
                f"{self._prefix}{field} is no field that this server knows: leave it out.",
                "unknown_parameter",
            )

    def _wrong(self, name: str, value: object, expected: str) -> FieldError:
        return wrong_value(self._prefix + name, value, expected)


def wrong_value(field: str, value: object, expected: str) -> FieldError:
    """The error for a value of the wrong kind or size."""
    found = "not a number" if isinstance(value, float) and math.isnan(value) else shown(value)
    return FieldError(field, f"{field} is {found} where {expected} is expected.", "invalid_value")


def read_object(body: bytes) -> Fields:
    """The fields of a body.

    Raises:
        InputError: if it isn't an object in UTF-8 JSON, or has a name twice.
    """
    try:
        value = parse_json(body, unique=True)
    except ValueError as error:
        raise InputError(f"The body can't be read as JSON ({error}): give an object.") from None
    if not isinstance(value, dict):
        raise InputError(f"The body is {shown(value)} where a JSON object is expected.")
    return Fields(value)
