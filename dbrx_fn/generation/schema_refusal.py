"""Finds the keyword for which llguidance refuses a JSON schema. llguidance's own messages rarely name it."""

import json
from collections.abc import Callable
from typing import Any

from dbrx_fn.generation.json_schema import CONSTRAINING, DEFINITIONS, Path, Schema, reference_path, schemas_in

_MOST_WORK = 2_000_000
_WORK_OF_A_TRIAL = 40_000
_WORK_OF_A_LONG_TRIAL = 500_000
"""The most work of the search, and the work of one trial. Each character of the tried schema adds 1.

Unlike a clock, this limit gives the same keyword on every machine. At the limit, the best result so far is returned.
"""

_LIMITS = ("too large", "too big")
"""llguidance's words for a schema that reached a limit of work. Each such trial takes up to a second."""


def refused_keyword(schema: Schema, refusal: Callable[[Schema], str | None]) -> Path | None:
    """The innermost keyword that causes a refusal; `None` if none is found.

    The search goes from the entire schema inwards. It enters a part if the schema with only that part is refused in the
    same words. If no single keyword is, it takes one whose removal changes the words.

    Args:
        schema: a refused one that `enforceable` has checked.
        refusal: gives the reason for refusing a schema, `None` if it isn't refused.
    """
    words = refusal(schema)
    left = _MOST_WORK
    is_long = words is not None and any(limit in words for limit in _LIMITS)
    found: Path | None = None
    path: Path = ()
    followed: set[Path] = set()

    def refused_alike(place: Path, part: Any) -> bool:
        nonlocal left
        trial = _replaced(schema, place, part)
        left -= (_WORK_OF_A_LONG_TRIAL if is_long else _WORK_OF_A_TRIAL) + len(json.dumps(trial))
        return left >= 0 and refusal(trial) == words

    while path not in followed and isinstance(here := _part(schema, path), dict):
        followed.add(path)
        # Without its type, a schema may be refused because of another type.
        names = sorted(here.keys() & CONSTRAINING, key=lambda name: (name == "type", list(here).index(name)))
        beside = {name: here[name] for name in ("type", *DEFINITIONS) if name in here}
        alone = (name for name in names if refused_alike(path, {name: here[name], **beside}))
        needed = (name for name in names if not refused_alike(path, {k: v for k, v in here.items() if k != name}))
        keyword = next(alone, None) or next(needed, None)
        if keyword is None or left < 0:
            break
        found = (*path, keyword)
        if keyword == "$ref":
            path = _placed(schema, reference_path(here[keyword]))
        else:
            path = _refused_inside(found, here[keyword], refused_alike)
    return found


def _refused_inside(place: Path, value: Any, refused_alike: Callable[[Path, Any], bool]) -> Path:
    """The path of the one schema in a keyword's value that is refused alone; `()` if there is none.

    It bisects, so a thousand schemas take at most twenty trials.
    """
    keyword = str(place[-1])
    waiting = list(schemas_in(keyword, value))
    while waiting:
        half = waiting[: (len(waiting) + 1) // 2]
        if not refused_alike(place, _only(value, half, keyword)):
            waiting = waiting[len(half) :]
        elif len(half) == 1:
            return (*place, *half[0][0])
        else:
            waiting = half
    return ()


def _only(value: Any, schemas: list[tuple[Path, Any]], keyword: str) -> Any:
    """A keyword's value with only these of its schemas."""
    if schemas[0][0] == ():
        return schemas[0][1]
    if isinstance(value, list):
        return [inner for _, inner in schemas]
    # A property that is left out may have any value. If it were missing, it could be refused as required.
    others = dict.fromkeys(value, True) if keyword == "properties" else {}
    return others | {steps[0]: inner for steps, inner in schemas}


def _placed(schema: Any, names: tuple[str, ...]) -> Path:
    """The path with these names. Indices of a list become numbers."""
    path: Path = ()
    for name in names:
        path = (*path, int(name) if isinstance(_part(schema, path), list) else name)
    return path


def _part(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[step]
    return schema


def _replaced(schema: Any, path: Path, part: Any) -> Any:
    """The schema with the part at this path replaced."""
    if not path:
        return part
    copy = schema.copy()
    copy[path[0]] = _replaced(schema[path[0]], path[1:], part)
    return copy
