"""JSON schemas as people write them for language models, and some that can't be enforced."""

from typing import Any

Schema = dict[str, Any]


def object_of(required: str = "", /, **properties: Any) -> Schema:
    """A closed object; all of its properties are required unless a few are named."""
    names = required.split() if required else list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array_of(items: Any, most: int = 3, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 12}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1000}

REAL: dict[str, Schema] = {
    "a person": object_of(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "a person, some of it known": object_of("name", name=NAME, email={"type": "string", "format": "email"}, age=COUNT),
    "an address in a person": object_of(
        name=NAME, address=object_of(street=NAME, zip={"type": "string", "pattern": "^[0-9]{5}$"})
    ),
    "a sentiment": object_of(
        label={"enum": ["positive", "negative", "neutral"]}, confidence={"type": "number", "minimum": 0, "maximum": 1}
    ),
    "entities": object_of(entities=array_of(object_of(text=WORD, kind={"enum": ["PER", "ORG", "LOC"]}), 3)),
    "a tool's call": object_of(
        tool={"const": "weather"}, arguments=object_of("city", city=NAME, unit={"enum": ["celsius", "fahrenheit"]})
    ),
    "a point of GeoJSON": object_of(
        type={"const": "Point"},
        coordinates={
            "type": "array",
            "prefixItems": [
                {"type": "number", "minimum": -180, "maximum": 180},
                {"type": "number", "minimum": -90, "maximum": 90},
            ],
            "items": False,
            "minItems": 2,
        },
    ),
    "a color": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
    "red, green, blue": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 255},
        "minItems": 3,
        "maxItems": 3,
    },
    "a matrix": array_of(array_of({"type": "integer", "minimum": -9, "maximum": 9}, 2, 2), 2, 2),
    "an event": object_of(
        title=NAME, day={"type": "string", "format": "date"}, starts={"type": "string", "format": "time"}
    ),
    "a line of a log": object_of(
        at={"type": "string", "format": "date-time"},
        level={"enum": ["INFO", "WARN"]},
        id={"type": "string", "format": "uuid"},
    ),
    "a network": object_of(
        host={"type": "string", "format": "hostname", "maxLength": 20},
        ip={"type": "string", "format": "ipv4"},
        port={"type": "integer", "minimum": 1, "maximum": 65535},
    ),
    "an address of IPv6": {"type": "string", "format": "ipv6"},
    "a duration": {"type": "string", "format": "duration", "maxLength": 20},
    "a link": object_of(href={"type": "string", "format": "uri", "maxLength": 30}),
    "flags": {
        "type": "object",
        "patternProperties": {"^[a-z]{2,6}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "counts by name": {"type": "object", "additionalProperties": COUNT, "minProperties": 1, "maxProperties": 2},
    "translations": object_of("en", en=WORD, de=WORD, fr=WORD),
    "a value that may be missing": object_of(name=NAME, nickname={"anyOf": [WORD, {"type": "null"}]}),
    "a type of several": object_of(value={"type": ["integer", "null", "boolean"]}),
    "an invoice": object_of(
        number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
        lines=array_of(
            object_of(what=WORD, price={"type": "number", "minimum": 0, "exclusiveMaximum": 1000, "multipleOf": 0.25}),
            2,
            1,
        ),
        paid={"type": "boolean"},
    ),
    "a list in a list": {
        "$defs": {"node": object_of("value", value=COUNT, next={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    "a tree": {
        "$defs": {"tree": object_of("name", name=WORD, children=array_of({"$ref": "#/$defs/tree"}, 2))},
        "$ref": "#/$defs/tree",
    },
    "itself": object_of("a", a=COUNT, b={"$ref": "#"}),
    "pets by kind": {
        "$defs": {
            "Cat": {**object_of(kind={"const": "cat", "type": "string"}, lives=COUNT), "title": "Cat"},
            "Dog": {**object_of(kind={"const": "dog", "type": "string"}, barks={"type": "boolean"}), "title": "Dog"},
        },
        **object_of(
            pet={
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
            }
        ),
    },
    "a term": {
        "$defs": {
            "term": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"$ref": "#/$defs/sum"}]},
            "sum": object_of(
                op={"const": "+"}, left={"$ref": "#/$defs/term"}, right={"type": "integer", "minimum": 0, "maximum": 9}
            ),
        },
        "$ref": "#/$defs/term",
    },
    "a patch": array_of(
        {
            "oneOf": [
                object_of(op={"const": "remove"}, path=WORD),
                object_of(op={"const": "add"}, path=WORD, value=COUNT),
            ]
        },
        2,
        1,
    ),
    "parts joined": {
        "allOf": [
            {"type": "object", "properties": {"id": COUNT}, "required": ["id"]},
            {"type": "object", "properties": {"tag": WORD}, "required": ["tag"]},
        ],
        "maxProperties": 2,
    },
    "old definitions": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"a/b c": WORD},
        "type": "object",
        "properties": {
            "word": {"$ref": "#/definitions/a~1b%20c"},
            "pair": {"type": "array", "items": [COUNT, WORD], "additionalItems": False, "maxItems": 2},
        },
        "required": ["word", "pair"],
        "additionalProperties": False,
    },
    "constants of all kinds": {"enum": [1, 2.5, "a\nb", None, True, [1, "x"], {"a": {"b": []}}, -1e9]},
    "one constant": {"const": {"version": [1, 0], "name": 'a "quoted" \\ name', "é": "😀"}},
    "names that need escapes": object_of(**{'a "b"': COUNT, "line\nbreak": COUNT, "back\\slash": WORD}),
    "other names beside": {
        "type": "object",
        "properties": {"a": WORD},
        "required": ["a"],
        "additionalProperties": COUNT,
        "maxProperties": 2,
    },
    "a pattern inside": {"type": "string", "pattern": "b[0-9]c", "maxLength": 8},
    "a short text of letters": {"type": "string", "pattern": "^[A-Z]", "minLength": 2, "maxLength": 5},
    "a big number": {"type": "integer", "minimum": 10**9, "maximum": 10**15},
    "a negative fraction": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": -0.25},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": -100, "maximum": 100},
    "a version": {"type": "string", "pattern": r"^(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})(-[a-z]{1,5})?$"},
}

REFUSED: dict[str, Schema] = {
    "not": {"not": {"type": "null"}},
    "if": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "contains": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "array",
        "contains": {"type": "integer"},
    },
    "uniqueItems": object_of(tags={"type": "array", "items": WORD, "uniqueItems": True}),
    "propertyNames": {"type": "object", "propertyNames": WORD},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "nullable": object_of(name={"type": "string", "nullable": True}),
    "minlength": object_of(name={"type": "string", "minlength": 3}),
    "x-guidance": {"type": "string", "x-guidance": {"lenient": True}},
    "format": object_of(card={"type": "string", "format": "credit-card"}),
    "pattern": object_of(password={"type": "string", "pattern": "^(?=.*[0-9]).{8,}$"}),
    "patternProperties": {"type": "object", "patternProperties": {"^a": COUNT, "b$": WORD}},
    "oneOf": object_of(value={"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    "enum": {"type": "string", "enum": [1, 2]},
    "const": {"const": 2**53 + 1},
    "minimum": {"type": "integer", "minimum": 5, "maximum": 4},
    "maximum": {"type": "integer", "maximum": 2**63 - 1},
    "multipleOf": {"type": "integer", "multipleOf": 99991},
    "minLength": {"type": "string", "minLength": -1},
    "minItems": {"type": "array", "minItems": 3, "maxItems": 2},
    "minProperties": {"type": "object", "additionalProperties": WORD, "minProperties": 3},
    "required": {"type": "object", "required": "name"},
    "type": {"type": "text"},
    "properties": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "items": {"type": "array", "items": 5},
    "prefixItems": {"$schema": "https://json-schema.org/draft/2019-09/schema", "type": "array", "prefixItems": [WORD]},
    "additionalItems": {"type": "array", "items": WORD, "additionalItems": WORD},
    "$ref": {"$ref": "https://example.com/schema"},
    "$id": object_of(a={"$id": "https://example.com/a", "type": "null"}),
    "$schema": {"$schema": "https://example.com/schema", "type": "null"},
    "anyOf": {"anyOf": []},
    "allOf": {"allOf": [{"enum": list(range(i, 300 + i))} for i in range(5)]},
}
"""The keyword that each is refused for."""
