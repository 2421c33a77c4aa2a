"""Finds the keyword of a JSON schema that llguidance refuses it for, since llguidance's own words rarely name it."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from dbrx_fn.generation.json_schema import CONSTRAINING, DEFINITIONS, Path, Schema, reference_path, schemas_in

_PATIENCE = 2.0
"""Seconds to look for it. What is found by then is returned."""


def refused_keyword(schema: Schema, refusal: Callable[[Schema], str | None]) -> Path | None:
    """The innermost keyword that a refusal is about; `None` if none is found.

    The search goes from the whole schema inwards. It enters a part if the schema is refused in the same words with
    everything beside that part left out. Where no keyword alone does that, it takes one without which the words change.

    Args:
        schema: one that is refused, and that `enforceable` has checked.
        refusal: why a schema is refused, `None` if it isn't.
    """
    words = refusal(schema)
    deadline = monotonic() + _PATIENCE
    found: Path | None = None
    path: Path = ()
    followed: set[Path] = set()

    def refused_alike(place: Path, part: Any) -> bool:
        return monotonic() < deadline and refusal(_replaced(schema, place, part)) == words

    while path not in followed and isinstance(here := _part(schema, path), dict):
        followed.add(path)
        # Without its type a schema may be refused for another type's sake.
        names = sorted(here.keys() & CONSTRAINING, key=lambda name: (name == "type", list(here).index(name)))
        beside = {name: here[name] for name in ("type", *DEFINITIONS) if name in here}
        alone = (name for name in names if refused_alike(path, {name: here[name], **beside}))
        needed = (name for name in names if not refused_alike(path, {k: v for k, v in here.items() if k != name}))
        keyword = next(alone, None) or next(needed, None)
        if keyword is None or monotonic() > deadline:
            break
        found = (*path, keyword)
        if keyword == "$ref":
            path = _placed(schema, reference_path(here[keyword]))
        else:
            path = _refused_inside(found, here[keyword], refused_alike)
    return found


def _refused_inside(place: Path, value: Any, refused_alike: Callable[[Path, Any], bool]) -> Path:
    """The place of the schema in a keyword's value that is refused alone; `()`, where the search began, if none is."""
    for steps, inner in schemas_in(str(place[-1]), value):
        part = inner if not steps else [inner] if isinstance(value, list) else {steps[0]: inner}
        if refused_alike(place, part):
            return (*place, *steps)
    return ()


def _placed(schema: Any, names: tuple[str, ...]) -> Path:
    """The path with these names, as numbers where they count the items of a list."""
    path: Path = ()
    for name in names:
        path = (*path, int(name) if isinstance(_part(schema, path), list) else name)
    return path


def _part(schema: Any, path: Path) -> Any:
    for step in path:
        schema = schema[step]
    return schema


def _replaced(schema: Any, path: Path, part: Any) -> Any:
    """The schema with another part at this place."""
    if not path:
        return part
    copy = schema.copy()
    copy[path[0]] = _replaced(schema[path[0]], path[1:], part)
    return copy
