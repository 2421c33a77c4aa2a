"""Refuses arguments of another kind than annotations say, in one sentence: for what a user calls and makes.

Public functions are decorated with `checked`, and public dataclasses call `check_fields` when they are made. Both read
the annotations that are there anyway. Only kinds are looked at, not ranges, nor what containers hold; a function checks
those itself. Arguments of plain classes that were met before cost about 1 us a call, so that decoding doesn't notice.
"""

import contextlib
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, cast

import mlx.core as mx

from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.files.json_file import shown

P = ParamSpec("P")
R = TypeVar("R")

_WORDS: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "None",
    Path: "a Path",
    mx.array: "an mx.array",
}


@dataclass(frozen=True)
class _Kind:
    """What an annotation allows.

    `classes`: instances of just these are taken at once.
    `others`: the same and arrays of a shape and dtype, to be asked by `isinstance`.
    `values`: single values.
    `words`: all of these, for the sentence.
    """

    classes: frozenset[type]
    others: tuple[Any, ...]
    values: tuple[object, ...]
    words: tuple[str, ...]

    def taken(self, name: str, value: Any, error: type[DbrxError] = InputError) -> Any:
        """A value of this kind, numbers of NumPy's as Python's. Raises `error` if it is of another."""
        if type(value) in self.classes or object in self.classes:
            return value
        # Python counts a bool among numbers, and a text among sequences, and nobody means that.
        if isinstance(value, bool | str | bytes):
            if value in self.values or (isinstance(value, str) and str in self.classes):
                return value
        elif isinstance(value, numbers.Real):
            if int in self.classes and isinstance(value, numbers.Integral):
                return int(value)
            if float in self.classes:
                # An int past their range isn't one.
                with contextlib.suppress(OverflowError):
                    return float(value)
        elif isinstance(value, self.others):
            return value
        raise error(self.problem(name, value))

    def goes_by_class(self, value: object) -> bool:
        """Whether all others of a taken value's class are taken too, as they are."""
        return type(value) in self.classes or not isinstance(value, str | bytes | mx.array | numbers.Real)

    def problem(self, name: str, value: object) -> str:
        """The sentence for a value that isn't taken."""
        if isinstance(value, str | bytes | bool | int | float | types.NoneType):
            found = shown(value)
        elif isinstance(value, mx.array):
            found = f"{str(value.dtype).removeprefix('mlx.core.')} {list(value.shape)}"
        else:
            found = _with_article(type(value).__name__)
        *most, last = self.words
        expected = f"{', '.join(most)} or {last}" if most else last
        return f"{name} is {found} where it must be {expected}."


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that raises `InputError` when an argument's kind isn't what its annotation says.

    A wrong number of arguments, or a name that isn't one of them, is Python's own TypeError.
    """
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    kinds = {name: _kind(hints[name]) for name in parameters}
    in_order = [name for name, one in parameters.items() if one.kind is not one.KEYWORD_ONLY]
    known: set[object] = set()

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> R:
        classes = (*map(type, arguments), *named, *map(type, named.values()))
        if classes in known:
            return function(*arguments, **named)
        given = dict(zip(in_order, arguments, strict=False)) | {name: named[name] for name in named if name in kinds}
        taken = {name: kinds[name].taken(name, value) for name, value in given.items()}
        if all(kinds[name].goes_by_class(value) for name, value in given.items()):
            known.add(classes)
        count = min(len(arguments), len(in_order))
        in_place = [taken[name] for name in in_order[:count]]
        return function(*in_place, *arguments[count:], **{name: taken.get(name, named[name]) for name in named})

    return call


def check_fields(made: Any, error: type[DbrxError] = InputError, *, prefix: str = "") -> None:
    """Raises where a dataclass's field isn't of its annotation's kind; numbers become plain, finite ints and floats.

    Args:
        made: a dataclass, frozen or not, in its `__post_init__`.
        error: what to raise.
        prefix: of the fields' names in the sentence.
    """
    for name, kind in _field_kinds(cast(Hashable, type(made))).items():
        value = kind.taken(prefix + name, getattr(made, name), error)
        if isinstance(value, float) and not math.isfinite(value):
            raise error(kind.problem(prefix + name, value))
        object.__setattr__(made, name, value)


@cache
def _field_kinds(dataclass_type: Any) -> dict[str, _Kind]:
    hints = typing.get_type_hints(dataclass_type)
    return {field.name: _kind(hints[field.name]) for field in fields(dataclass_type)}


def _kind(hint: Any) -> _Kind:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    classes: set[type] = set()
    others: list[Any] = []
    values: list[object] = []
    words: list[str] = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            values += typing.get_args(part)
            words += map(repr, typing.get_args(part))
            continue
        # Of `dict[str, Any]`, `dict`.
        kind = object if part is Any else typing.get_origin(part) or part
        kind = dict if typing.is_typeddict(kind) else kind
        others.append(kind)
        # An array's shape and dtype aren't of its class.
        if not hasattr(kind, "dim_str"):
            classes.add(kind)
        words.append(_in_words(kind) + (" of whole numbers" if typing.get_args(part) == (int,) else ""))
    return _Kind(frozenset(classes), tuple(others), tuple(values), tuple(words))


def _in_words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is Callable:
        return "a function"
    if kind in (Sequence, Iterable):
        return "a sequence"
    if hasattr(kind, "dim_str"):
        return f"{' or '.join(kind.dtypes)} [{kind.dim_str}]"
    return _with_article(kind.__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
