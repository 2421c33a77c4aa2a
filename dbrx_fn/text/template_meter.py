"""Meters a chat template's work, which bounds its time and memory.

A unit is a character, or eight bytes, read or made. It takes a few nanoseconds. Charges depend only on the template and
its variables, so a template that can be rendered on one machine can be rendered on all.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

MOST_WORK = 2**26
"""The most units for one rendering. A conversation of 100 KB takes 1% of it."""

LONGEST_TEXT = 2**22
"""The most characters of a value."""

NODE, ITEM, STEP, CALL = 10, 16, 50, 200
"""Units for a part of an expression, a part of a value, a round of a loop, and a call."""

_DEEPEST = 200
_WIDEST = 2**10
_COLLECTIONS: Any = (list, tuple, range, type({}.keys()), type({}.values()), type({}.items()))
_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d{4,})?(?:\.(\*|\d{4,}))?")


class TemplateBoundsError(jinja2.TemplateRuntimeError):
    """A template that needs more work or memory than allowed."""


class Meter:
    """The remaining work of one rendering."""

    def __init__(self, work: int = MOST_WORK) -> None:
        self._left = work

    def spend(self, work: int) -> None:
        """Spends units.

        Raises:
            TemplateBoundsError: if too few are left.
        """
        self._left -= work
        if self._left < 0:
            raise TemplateBoundsError(f"it asks for more than {MOST_WORK} units of work, a few seconds")

    def read(self, *values: object) -> tuple[int, int]:
        """Charges for reading entire values. A part that occurs several times counts each time.

        Returns:
            parts: the number of values in them.
            depth: the depth of their nesting.

        Raises:
            TemplateBoundsError: if it is too much work, a text is too long, or the nesting is too deep for Python's own
                functions.
        """
        level: list[Any] = list(values)
        parts = depth = 0
        while level:
            depth += 1
            if depth > _DEEPEST:
                raise TemplateBoundsError(f"a value in it is nested more than {_DEEPEST} deep")
            parts += len(level)
            self.spend(ITEM * len(level))
            below: list[Any] = []
            for value in level:
                if isinstance(value, str):
                    self.spend(checked_length(len(value)))
                elif isinstance(value, dict):
                    self.spend(ITEM * len(value))
                    below += [*value, *value.values()]
                elif isinstance(value, _COLLECTIONS):
                    self.spend(ITEM * len(value))
                    below += value
                elif isinstance(value, Namespace):
                    below.append(object.__getattribute__(value, "_Namespace__attrs"))
            level = below
        return parts, depth

    def go_over(self, value: object) -> None:
        """Charges for iterating over a value's items without reading them."""
        if isinstance(value, str):
            self.spend(checked_length(len(value)))
        elif isinstance(value, list | tuple | dict):
            self.spend(ITEM * len(value))

    def search(self, text: object, wanted: object) -> None:
        """Charges for a search of a text in another. At worst Python's time is the product of their lengths."""
        if isinstance(text, str) and isinstance(wanted, str):
            self.spend(len(text) * len(wanted) // 8)

    def made(self, value: Any) -> Any:
        """Charges for a new value, and returns it.

        An iterator's items are made at once, since a long chain of lazy iterators would overflow the stack.
        """
        if isinstance(value, str):
            self.spend(checked_length(len(value)))
        elif isinstance(value, list | tuple | dict):
            self.spend(4 * ITEM * len(value))
        elif isinstance(value, int):
            # Larger numbers can be chosen to have equal hashes, which makes sets slow.
            if value.bit_length() > 60:
                raise TemplateBoundsError("it computes a whole number of more than 60 bits")
        elif is_iterator(value):
            return iter(list(self.counted(value)))
        return value

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the values, and charges for each."""
        for value in values:
            self.spend(STEP)
            yield value


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def is_iterator(value: object) -> bool:
    """Whether a value is an iterator, other than a template's own loop."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def checked_length(length: int) -> int:
    """A text's length, after a check.

    Raises:
        TemplateBoundsError: if it is too long.
    """
    if length > LONGEST_TEXT:
        raise TemplateBoundsError(f"it makes or reads a text of more than {LONGEST_TEXT} characters")
    return length


Charge = Callable[..., None]
"""Charges a filter or a method for costs beyond reading its values. It gets the meter and the values."""


def charge_format(meter: Meter, form: object, *values: object, **named: object) -> None:
    """Charges `form % values`: each place can show all values, each with its own width."""
    if isinstance(form, str):
        if len(form) > 10_000:
            raise TemplateBoundsError("it formats by a text of more than 10000 characters")
        if any(map(any, _WIDTHS.findall(form))):
            raise TemplateBoundsError("it formats in a width of thousands")
        for _ in range(form.count("%")):
            meter.spend(_WIDEST)
            meter.read(values, named)


def charge_repeat(meter: Meter, value: object, times: object) -> None:
    """Charges `value * times`."""
    if isinstance(times, int) and isinstance(value, str | list | tuple):
        size = len(value) * max(times, 0)
        meter.spend(checked_length(size) if isinstance(value, str) else 4 * ITEM * size)


def charge_power(meter: Meter, value: object, power: object) -> None:
    """Charges `value ** power` before it is computed."""
    if isinstance(value, int) and isinstance(power, int) and value.bit_length() * abs(power) > 1000:
        raise TemplateBoundsError("it computes a whole number of more than 60 bits")


def charge_join(meter: Meter, values: object, separator: object = "", *rest: object, **named: object) -> None:
    """Charges `join` for the separators."""
    if isinstance(separator, str) and isinstance(values, str | list | tuple | dict):
        meter.spend(checked_length(len(values) * len(separator)))


def _charge_search(meter: Meter, text: object, wanted: object = None, *rest: object, **named: object) -> None:
    for needle in (wanted, *named.values()):
        meter.search(text, needle)


def _charge_replace(meter: Meter, text: object, old: object, new: object = "", *rest: object, **named: object) -> None:
    meter.search(text, old)
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        meter.spend(checked_length(len(text) + text.count(old) * len(new)))


def _charge_indent(meter: Meter, text: object, width: object = 4, *rest: object, **named: object) -> None:
    size = len(width) if isinstance(width, str) else width
    if not isinstance(size, int) or size > _WIDEST:
        raise TemplateBoundsError(f"it indents by more than {_WIDEST}")
    if isinstance(text, str):
        meter.spend((len(text) + 1) * max(size, 0))


def _charge_round(meter: Meter, value: object, precision: object = 0, *rest: object, **named: object) -> None:
    if not isinstance(precision, int) or abs(precision) > 100:
        raise TemplateBoundsError("it rounds to a precision of more than 100 digits")


def _charge_sum(meter: Meter, values: object, attribute: object = None, start: object = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateBoundsError("it adds up what are no numbers")


def _charge_many_times(meter: Meter, value: object, *rest: object, **named: object) -> None:
    for _ in range(16):
        meter.read(value)


def _charge_json(meter: Meter, value: object, *rest: object, **named: object) -> None:
    options = [*rest, *named.values()]
    texts = [text for option in options for text in (option if isinstance(option, list | tuple) else [option])]
    sizes = [len(text) if isinstance(text, str) else text for text in texts if isinstance(text, str | int)]
    if any(size > 16 for size in sizes):
        raise TemplateBoundsError("it writes JSON with separators or an indentation of more than 16 characters")
    parts, depth = meter.read(value)
    meter.spend(parts * depth * max((0, *sizes)))


METHOD_CHARGES: Mapping[str, Charge] = {
    **dict.fromkeys(("count", "find", "index", "rfind", "rindex"), _charge_search),
    **dict.fromkeys(("split", "rsplit", "partition", "rpartition"), _charge_search),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _charge_search),
    "replace": _charge_replace,
}
"""Charges of texts' methods."""

SHALLOW_FILTERS = words(
    "count d default first items last length list map reject rejectattr reverse safe select selectattr"
)
"""Filters that pass on their value, or iterate over its items. All other filters read the entire value."""

FILTER_CHARGES: Mapping[str, Charge] = {
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "title", "unique"), _charge_many_times),
    "format": charge_format,
    "indent": _charge_indent,
    "join": charge_join,
    "replace": _charge_replace,
    "round": _charge_round,
    "sum": _charge_sum,
    "tojson": _charge_json,
    "trim": _charge_search,
}
