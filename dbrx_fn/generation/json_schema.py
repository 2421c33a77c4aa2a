"""Checks and rewrites a JSON schema so that every keyword is enforced, or the schema is refused.

llguidance ignores keywords that it doesn't know, and enforces some only in part. So each keyword is checked here first.
If llguidance doesn't enforce it, and it constrains anything, the schema is refused.
Source of the keywords' meaning: https://json-schema.org/draft/2020-12/json-schema-validation.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown

Schema = dict[str, Any]
Path = tuple[str | int, ...]
"""The path from the entire schema to a part of it."""

_LEVELS = 1000
"""The most levels of nested schemas, counted through each $ref. From 2,000 on, llguidance overflows a stack."""

_DEEPEST = 120
"""The most steps from the entire schema to a part, not through a $ref. llguidance takes 127 levels of JSON."""

_COSTS = {"schemas": 2000, "patternProperties": 100, "pattern": 10_000, "multipleOf": 10_000}
"""Limits for an entire schema: subschemas, patterned properties, characters of patterns, and remainders of divisors. At
each limit compiling takes a second at most. Well above it, compiling takes minutes.
"""

_MOST_DIGITS = 15
_JOINED = {("pattern", "format"): 8, ("multipleOf",): 1}
"""The most of these that one value may have to fit at once. Compiling takes time and memory exponential in it."""

_FORMATS = ("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_OLD_DRAFTS = (
    "http://json-schema.org/draft-04/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
)
_DRAFTS = (*_OLD_DRAFTS, "https://json-schema.org/draft/2020-12/schema")

_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_CALENDAR = rf"^{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01][0-9]|2[0-8]))|^{_LEAP_YEAR}-02-29"
"""The beginning of a valid date. llguidance itself allows 29 February in every year, and a year 0."""

_ESCAPED = "\b\t\n\f\r"
"""The control characters that a text can hold, each written as an escape of one letter."""


def enforceable(schema: Schema) -> Schema:
    """The rewritten schema for llguidance.

    Raises:
        InputError: if the schema isn't valid, or can't be enforced. The message names the keyword and its place.
    """
    walk = _Walk(schema)
    written = walk.rewritten(schema, ())
    levels = walk.levels[id(schema)]
    for place, target in walk.references:
        if id(target) not in walk.levels and not isinstance(target, bool):
            _refuse(place, "leads to what is no schema")
        levels += 1 + walk.levels.get(id(target), 0)
    if levels > _LEVELS:
        raise InputError(
            f"The JSON schema has {levels} levels, those behind each $ref counted, where {_LEVELS} are the most: make"
            " it flatter."
        )
    walk.check_joined()
    # With an address of its own, references would be looked for elsewhere.
    return {name: value for name, value in written.items() if name not in _IDS}


def described(path: Path) -> str:
    """A keyword and its place for an error message, such as `'format' at #/properties/day/format`."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return f"{shown(str(path[-1]))} at {shown('/'.join(('#', *steps)), 200)[1:-1]}"


def reference_path(reference: str) -> tuple[str, ...]:
    """The names and numbers in a $ref."""
    return tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])


class _Walk:
    """What the walk through a schema collects.

    `levels`: number of levels below each schema, by the schema's `id()`.
    `references`: path and target of each $ref, one per target.
    `spent`: the amount so far of each of `_COSTS`.
    `visited`: the schemas and their paths, inner ones first.
    """

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.is_old = str(root.get("$schema")).removesuffix("#") in _OLD_DRAFTS
        self.levels: dict[int, int] = {}
        self.references: list[tuple[Path, Any]] = []
        self.referred: set[str] = set()
        self.spent: Counter[str] = Counter()
        self.visited: list[tuple[Schema, Path]] = []

    def rewritten(self, schema: Any, path: Path) -> Any:
        """The schema at this path, rewritten for llguidance."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(path, f"holds {shown(schema)} where a schema is expected, an object or a boolean")
        if len(path) > _DEEPEST:
            raise InputError("The JSON schema is nested too deeply: put parts of it into $defs.")
        self._check(schema, path)
        written = {keyword: self._inside(value, (*path, keyword)) for keyword, value in schema.items()}
        inner = [id(below) for keyword, value in schema.items() for _, below in schemas_in(keyword, value)]
        self.levels[id(schema)] = 1 + max((self.levels.get(below, 0) for below in inner), default=0)
        self.visited.append((schema, path))
        return self._completed(written)

    def check_joined(self) -> None:
        """Refuses schemas that make one value fit too many of `_JOINED` at once."""
        for counted, most in _JOINED.items():
            joined = self._joined(counted)
            for schema, path in self.visited:
                if joined[id(schema)] > most:
                    by = next((name for name in ("allOf", "$ref", "anyOf", "oneOf") if name in schema), counted[0])
                    _refuse((*path, by), f"joins more than {most} of {' and '.join(counted)}")

    def _joined(self, counted: tuple[str, ...]) -> dict[int, int]:
        """How many of these keywords one value may have to fit, in each schema or what it holds, by the schema's id."""
        known: dict[int, int] = {}
        entered: set[int] = set()

        def most(schemas: list[Schema]) -> int:
            # A schema inside itself counts once.
            return max((known.get(id(schema), 0) for schema in schemas), default=0)

        # Python's own stack is too short for a chain of references.
        stack = [schema for schema, _ in reversed(self.visited)]
        while stack:
            schema = stack[-1]
            together = [*self._inner(schema, "allOf"), *self._inner(schema, "$ref")]
            branches = self._inner(schema, "anyOf", "oneOf")
            parts = self._inner(schema, "properties", "prefixItems", *_SINGLE)
            patterned = self._inner(schema, "patternProperties")
            waiting = [one for one in (*together, *branches, *parts, *patterned) if id(one) not in entered]
            if id(schema) not in entered and waiting:
                entered.add(id(schema))
                stack += waiting
                continue
            own = sum(name in schema for name in counted) + sum(known.get(id(one), 0) for one in together)
            known[id(schema)] = max(own + most(branches), most(parts) + most(patterned))
            entered.add(id(schema))
            stack.pop()
        return known

    def _inner(self, schema: Schema, *names: str) -> list[Schema]:
        """The schemas in these keywords, except booleans."""
        inner = [one for name in names if name in schema for _, one in schemas_in(name, schema[name])]
        if "$ref" in names and "$ref" in schema:
            inner.append(self._target(schema["$ref"], ()))
        return [one for one in inner if isinstance(one, dict)]

    def _inside(self, value: Any, path: Path) -> Any:
        new = {steps: self.rewritten(inner, (*path, *steps)) for steps, inner in schemas_in(str(path[-1]), value)}
        if () in new:
            return new[()]
        if not new:
            return value
        return list(new.values()) if isinstance(value, list) else {steps[0]: inner for steps, inner in new.items()}

    def _check(self, schema: dict[str, Any], path: Path) -> None:
        for keyword, value in schema.items():
            place = (*path, keyword)
            if keyword in _VALUES:
                expected, fits = _VALUES[keyword]
                if not fits(value):
                    _refuse(place, f"is {shown(value)} where {expected} is expected")
            elif keyword not in _COMMENTS:
                _refuse(place, "isn't a keyword that can be enforced")
            if path and keyword in (*_IDS, "$schema"):
                _refuse(place, "can only stand at the top")
        self._spend(schema, path)
        self._check_together(schema, path)
        if "$ref" in schema and schema["$ref"] not in self.referred:
            self.referred.add(schema["$ref"])
            self.references.append(((*path, "$ref"), self._target(schema["$ref"], (*path, "$ref"))))

    def _spend(self, schema: Schema, path: Path) -> None:
        patterned = schema.get("patternProperties", {})
        cost = {
            "patternProperties": len(patterned),
            "pattern": len(schema.get("pattern", "")) + sum(map(len, patterned)),
            "multipleOf": _remainders(schema.get("multipleOf", 0)),
        }
        for keyword, amount in cost.items():
            self.spent[keyword] += amount
            if self.spent[keyword] > _COSTS[keyword]:
                _refuse((*path, keyword), "makes the schema too costly to compile")
        self.spent["schemas"] += 1
        if self.spent["schemas"] > _COSTS["schemas"]:
            raise InputError(f"The JSON schema has more than {_COSTS['schemas']} schemas inside: make it smaller.")

    def _check_together(self, schema: Schema, path: Path) -> None:
        draft = schema.get("$schema", _DRAFTS[-1])
        if str(draft).removesuffix("#") not in _DRAFTS:
            _refuse((*path, "$schema"), f"is {shown(draft)} where one of {', '.join(_DRAFTS)} is expected")
        if "prefixItems" in schema and (self.is_old or schema.keys() & {"additionalItems"} or _has_list(schema)):
            _refuse((*path, "prefixItems"), "belongs to another draft of JSON Schema than the rest")
        if "additionalItems" in schema and not _has_list(schema):
            _refuse((*path, "additionalItems"), "means something only beside a list of items")
        if schema.get("minProperties", 0) > 1 + len(set(schema.get("required", ()))):
            _refuse(
                (*path, "minProperties"),
                "is more than one above the number of required properties, since a text may hold another one twice",
            )

    def _target(self, reference: str, path: Path) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            _refuse(path, f"is {shown(reference)} where a pointer into this schema is expected, such as #/$defs/name")
        found: Any = self.root
        for step in reference_path(reference):
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                _refuse(path, f"is {shown(reference)}, which isn't there")
        return found

    def _completed(self, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("format") in ("date", "date-time"):
            schema["allOf"] = [*schema.get("allOf", ()), {"type": "string", "pattern": _CALENDAR}]
        if "oneOf" in schema:
            schema["oneOf"] = [self._resolvable(branch) for branch in schema["oneOf"]]
        return schema

    def _resolvable(self, branch: Any) -> Any:
        """A branch of `oneOf` whose $ref llguidance resolves, to see that the branches exclude each other.

        llguidance does this only if the branch has another keyword too.
        """
        if not isinstance(branch, dict) or "$ref" not in branch or "type" in branch:
            return branch
        target = self._target(branch["$ref"], ())
        return {"type": target["type"], **branch} if isinstance(target, dict) and "type" in target else branch


def _has_list(schema: dict[str, Any]) -> bool:
    return isinstance(schema.get("items"), list)


def schemas_in(keyword: str, value: Any) -> Iterator[tuple[Path, Any]]:
    """The schemas in a keyword's value, and the path to each."""
    if keyword in _MAPS:
        yield from (((name,), inner) for name, inner in value.items())
    elif isinstance(value, list) and keyword in (*_LISTS, "items"):
        yield from (((place,), inner) for place, inner in enumerate(value))
    elif keyword in _SINGLE:
        yield (), value


def _refuse(path: Path, what: str) -> NoReturn:
    raise InputError(f"The JSON schema's {described(path or ('#',))} {what}: change the schema.")


def _is_number(value: object) -> bool:
    """Whether llguidance reads the number exactly. It multiplies the digits by a power of ten in float64."""
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 10**_MOST_DIGITS:
        return False
    _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
    return len(digits) <= _MOST_DIGITS and int(exponent) >= -22


def _remainders(divisor: float) -> int:
    """The number of states that a lexer needs for multiples: the divisor's digits as an integer."""
    exact = Decimal(str(divisor)).normalize()
    return int(exact.scaleb(-min(0, int(exact.as_tuple().exponent))))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _is_types(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(name in _TYPES for name in names)


def _is_constant(value: object) -> bool:
    """Whether a text can hold the value exactly."""
    if isinstance(value, str):
        return all((character >= " " and character != "\x7f") or character in _ESCAPED for character in value)
    if isinstance(value, list):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, (*value, *value.values())))
    return value is None or isinstance(value, bool) or _is_number(value)


_IDS = ("$id", "id")
_COMMENTS = {
    *(*_IDS, "$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
    *("writeOnly", "contentMediaType", "contentEncoding"),
    # OpenAPI's hint to the branch that applies. The branches hold all requirements.
    "discriminator",
}
"""Keywords that constrain nothing."""

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *DEFINITIONS)
_SINGLE = ("items", "additionalItems", "additionalProperties")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")

_NUMBER = f"a number of at most {_MOST_DIGITS} digits"
_CONSTANT = f"that a text can hold, with numbers of at most {_MOST_DIGITS} digits and without control characters"
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (f"one or more of {', '.join(_TYPES)}", _is_types),
    "enum": (
        f"a list of values {_CONSTANT}",
        lambda value: isinstance(value, list) and bool(value) and _is_constant(value),
    ),
    "const": (f"a value {_CONSTANT}", _is_constant),
    "required": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
    "pattern": ("a regular expression", lambda value: isinstance(value, str)),
    "format": (f"one of {', '.join(_FORMATS)}", lambda value: value in _FORMATS),
    "$ref": ("a text", lambda value: isinstance(value, str)),
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),
    **dict.fromkeys(("minimum", "maximum"), (_NUMBER, _is_number)),
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"),
        (_NUMBER, lambda value: isinstance(value, bool) or _is_number(value)),
    ),
    **dict.fromkeys(_COUNTS, ("an integer from 0 on", _is_count)),
    **dict.fromkeys(_LISTS, ("a list of schemas", lambda value: isinstance(value, list) and bool(value))),
    **dict.fromkeys(_MAPS, ("an object of schemas", lambda value: isinstance(value, dict))),
    **dict.fromkeys(_SINGLE, ("a schema", lambda value: isinstance(value, bool | dict | list))),
}
"""The keywords that are enforced, with what their values must be."""

CONSTRAINING = _VALUES.keys() - set(DEFINITIONS)
