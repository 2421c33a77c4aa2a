"""Type checks of public functions' arguments and public dataclasses' fields, with errors in one sentence.

Public functions are decorated with `checked`, and public dataclasses call `check_fields` when they are made. Both read
the annotations. They check types only; functions check ranges and the contents of containers themselves. Combinations
of classes that passed before cost about 1 us per call, so decoding isn't slowed.
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
    """The values that an annotation allows.

    `classes`: instances of exactly these classes are accepted at once.
    `others`: classes, and arrays of a shape and dtype, to check with `isinstance`.
    `values`: single values.
    `words`: descriptions of all of these, for the error.
    """

    classes: frozenset[type]
    others: tuple[Any, ...]
    values: tuple[object, ...]
    words: tuple[str, ...]

    def taken(self, name: str, value: Any, error: type[DbrxError] = InputError) -> Any:
        """The value, with NumPy's numbers as Python's. Raises `error` if it isn't of this kind."""
        if type(value) in self.classes or object in self.classes:
            return value
        # For Python a bool is a number and a text is a sequence, which nobody means here.
        if isinstance(value, bool | str | bytes):
            if value in self.values or (isinstance(value, str) and str in self.classes):
                return value
        elif isinstance(value, numbers.Real):
            if int in self.classes and isinstance(value, numbers.Integral):
                return int(value)
            if float in self.classes:
                # An int beyond float's range isn't a float.
                with contextlib.suppress(OverflowError):
                    return float(value)
        elif isinstance(value, self.others):
            return value
        raise error(self.problem(name, value))

    def goes_by_class(self, value: object) -> bool:
        """Whether every other value of an accepted value's class is accepted too, unchanged."""
        return type(value) in self.classes or not isinstance(value, str | bytes | mx.array | numbers.Real)

    def problem(self, name: str, value: object) -> str:
        """The error's sentence for a value that isn't accepted."""
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
    """Decorates a function: it raises `InputError` if an argument doesn't fit its annotation.

    A wrong number of arguments and an unknown name raise Python's own TypeError.
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
    """Raises `error` if a dataclass's field doesn't fit its annotation. Numbers become Python's ints and floats.

    Args:
        made: a dataclass, frozen or not, in its `__post_init__`. Its floats must be finite.
        error: the class to raise.
        prefix: put before the fields' names in the error.
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
        # `dict[str, Any]` is checked as `dict`.
        kind = object if part is Any else typing.get_origin(part) or part
        kind = dict if typing.is_typeddict(kind) else kind
        others.append(kind)
        # jaxtyping's annotations check shape and dtype, which an array's class doesn't tell.
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
