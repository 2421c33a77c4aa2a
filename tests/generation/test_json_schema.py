"""JSON schemas: texts of each are valid, and what can't be enforced is refused by its keyword."""

import json
import time
from datetime import date
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbrx_fn import SMALL, InputError, Structure, Tokenizer, load_tokenizer
from dbrx_fn.generation.structured import TokenTrie, token_trie
from tests.support.followed import followed, tokens_allowed
from tests.support.many_schemas import is_valid, many_schemas, named, random_schema, sweep
from tests.support.real_schemas import COUNT, REAL, REFUSED, WORD, Schema, object_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SMALL)


@pytest.fixture(scope="module")
def trie(tokenizer: Tokenizer) -> TokenTrie:
    return token_trie(tokenizer, tokenizer.vocab_size)


def made_at_random(trie: TokenTrie, tokenizer: Tokenizer, structure: Structure, seed: int, most: int) -> str | None:
    """A text of tokens chosen at random; `None` if it didn't end."""
    matcher = trie.matcher(structure)
    tokens = [token for token, _ in followed(matcher, seed, most)]
    return tokenizer.decode(tokens) if matcher.finished else None


def takes(trie: TokenTrie, tokenizer: Tokenizer, structure: Structure, text: str) -> bool:
    """Whether the text is what the structure asks for."""
    matcher = trie.matcher(structure)
    for token in tokenizer.encode(text, add_special_tokens=False, literal=[(0, len(text))]):
        if token not in tokens_allowed(matcher):
            return False
        matcher.advance(token)
    return trie.stop_tokens <= set(tokens_allowed(matcher))


@pytest.mark.parametrize("name", REAL)
def test_real_schemas_are_enforced(trie: TokenTrie, tokenizer: Tokenizer, name: str) -> None:
    structure = Structure.json_schema(REAL[name])
    for seed in range(5):
        text = made_at_random(trie, tokenizer, structure, seed, 400)
        assert text is None or is_valid(text, REAL[name]), text


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_schemas_are_enforced_or_refused_by_keyword(trie: TokenTrie, tokenizer: Tokenizer, seed: int) -> None:
    schema = random_schema(Random(seed))
    try:
        structure = Structure.json_schema(schema)
    except InputError as error:
        keyword = named(error)
        structure = None
    if structure is None:
        assert f'"{keyword}"' in json.dumps(schema)
        return
    text = made_at_random(trie, tokenizer, structure, seed, 300)
    assert text is None or is_valid(text, schema), text


def test_the_models_answers_are_valid_by_their_schemas() -> None:
    results, wrong = sweep(many_schemas(62), most=64)
    assert not wrong
    assert results["temperature 0, ended"] > 30
    assert results["temperature 1, ended"] > 30


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_its_keyword(keyword: str) -> None:
    with pytest.raises(InputError) as refusal:
        Structure.json_schema(REFUSED[keyword])
    assert named(refusal.value) == keyword


def test_every_date_that_exists_is_a_date_and_no_other(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    structure = Structure.json_schema({"type": "string", "format": "date"})
    for year in (1, 1900, 1999, 2000, 2023, 2024, 2100):
        for day in ("01-01", "02-28", "02-29", "02-30", "04-31", "12-31", "13-01", "06-00"):
            text = f"{year:04}-{day}"
            try:
                exists = bool(date.fromisoformat(text))
            except ValueError:
                exists = False
            assert takes(trie, tokenizer, structure, f'"{text}"') == exists, text
    at = Structure.json_schema({"type": "string", "format": "date-time"})
    assert takes(trie, tokenizer, at, '"2024-02-29T10:00:00Z"')
    assert not takes(trie, tokenizer, at, '"2023-02-29T10:00:00Z"')


CONSTANTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**16), 10**16)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-1e9, 1e9).map(lambda number: round(number, 4))
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(value=CONSTANTS)
def test_a_constant_is_made_exactly_or_refused(trie: TokenTrie, tokenizer: Tokenizer, value: object) -> None:
    try:
        structure = Structure.json_schema({"const": value})
    except InputError as error:
        assume(named(error) != "const")
        raise
    text = made_at_random(trie, tokenizer, structure, 0, 300)
    assert text is None or json.loads(text) == value, text


def test_a_key_cannot_dodge_its_schema_through_escapes(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": WORD}, "additionalProperties": COUNT}
    structure = Structure.json_schema(schema)
    assert takes(trie, tokenizer, structure, '{"a":"x","b":1}')
    assert not takes(trie, tokenizer, structure, '{"\\u0061":1}')
    assert not takes(trie, tokenizer, structure, '{"a":1}')


def test_white_space_is_as_people_write_it_and_never_endless(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    structure = Structure.json_object()
    value = {"a": [1, {"b": None}], "c": "d"}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        assert takes(trie, tokenizer, structure, text)
    assert not takes(trie, tokenizer, structure, "{" + " " * 100 + "}")
    assert not takes(trie, tokenizer, structure, "{\n\n\n}")


def test_integers_are_those_of_the_range(trie: TokenTrie, tokenizer: Tokenizer) -> None:
    structure = Structure.json_schema({"type": "integer", "minimum": -12, "exclusiveMaximum": 105, "multipleOf": 3})
    for number in range(-130, 130):
        assert takes(trie, tokenizer, structure, str(number)) == (-12 <= number < 105 and number % 3 == 0), number


def chained(count: int) -> Schema:
    chain = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**chain, f"a{count}": {"type": "null"}}}


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


COSTLY: dict[str, Schema] = {
    "a chain of references, on which the stack would overflow": chained(3000),
    "a shorter chain": chained(800),
    "deep": nested(300),
    "deeper than Python's stack": nested(5000),
    "many properties": object_of("", **{f"p{n}": {"type": "string"} for n in range(5000)}),
    "many divisors": object_of("", **{f"p{n}": {"type": "integer", "multipleOf": 9000 + n} for n in range(50)}),
    "many patterned properties": {"patternProperties": {f"^p{n}z": COUNT for n in range(400)}},
    "a long pattern": {"pattern": "a?" * 20_000 + "a" * 20_000},
    "all of any": {
        "allOf": [
            {
                "anyOf": [
                    {"type": "object", "properties": {f"{i} {j}": COUNT}, "required": [f"{i} {j}"]} for j in range(3)
                ]
            }
            for i in range(12)
        ]
    },
    "patterns that all hold": {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(30)]},
    "patterns that references join": {
        "$ref": "#/$defs/p0",
        "$defs": {
            **{f"p{n}": {"type": "string", "pattern": f"a.{{{n}}}b", "$ref": f"#/$defs/p{n + 1}"} for n in range(30)},
            "p30": {"type": "string"},
        },
    },
    "patterns of properties that are joined": {
        "allOf": [object_of(p={"type": "string", "pattern": f"a.{{{n}}}b"}) for n in range(30)]
    },
    "divisors that are joined": {"allOf": [{"type": "integer", "multipleOf": 97 + n} for n in range(4)]},
    "a long text": {"description": "x" * 1_000_000},
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_schema_is_refused_soon(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match="JSON schema"):
        Structure.json_schema(COSTLY[name])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("size", [10, 10**4, 2**32 - 1])
@pytest.mark.parametrize("bound", ["minItems", "maxItems", "minLength", "maxLength", "maxProperties"])
def test_large_bounds_cost_nothing(trie: TokenTrie, bound: str, size: int) -> None:
    kind = {"I": "array", "L": "string", "P": "object"}[bound[3]]
    start = time.perf_counter()
    matcher = trie.matcher(Structure.json_schema({"type": kind, bound: size}))
    for _ in followed(matcher, 0, 20):
        pass
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "schema", [None, True, [], "{}", {"a": {1}}, {"const": float("nan")}, {"title": "\ud800", "x": 1}]
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(InputError, match="JSON schema"):
        Structure.json_schema(schema)


def test_a_schema_is_left_as_it_is() -> None:
    schema = {"format": "date", "oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"type": "string"}}}
    before = json.dumps(schema)
    Structure.json_schema(schema)
    assert json.dumps(schema) == before
