"""Random JSON schemas, and texts of the small model for many schemas at once.

`python -m tests.support.many_schemas 500` makes a text at temperature 0 and one at 1 for each of 500 schemas, and
counts those that ended, that were valid, and the schemas that were refused.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime
from random import Random
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import mlx.core as mx
import numpy as np

from dbrx_fn import SMALL, InputError, Sampling, Structure, forward, init_cache, load, load_tokenizer, take_rows
from dbrx_fn.generation.row_sampling import row_numbers, sample_rows, steps_of, take_numbers
from dbrx_fn.generation.structured import Matcher, token_trie
from tests.support.real_schemas import REAL, WORD, Schema, array_of

ROWS = 32
PROMPT = "The answer, in JSON:"

_PATTERNS = [
    "^[a-z]{1,6}$",
    "^[A-Z][a-z]{0,5}$",
    "[0-9]",
    "^(yes|no)$",
    "^[^ ]{2,5}$",
    "^a+b*$",
    r"^\d{3}-\d{4}$",
    "x$",
]
_FORMATS = ["date", "date-time", "time", "ipv4", "ipv6", "uuid"]
_UNSUPPORTED: list[tuple[str, Any]] = [
    ("uniqueItems", True),
    ("not", {"type": "null"}),
    ("contains", {"type": "null"}),
    ("if", True),
    ("format", "iban"),
    ("pattern", r"(a)\1"),
    ("propertyNames", {"maxLength": 3}),
    ("maxlenght", 5),
]


def random_schema(random: Random) -> Schema:
    """A schema of up to three levels, mostly one that can be enforced and whose texts are short."""
    schema = _any(random, 2)
    if random.random() < 0.25:
        schema = {
            "$defs": {"part": _any(random, 1)},
            "type": "array",
            "items": {"anyOf": [{"$ref": "#/$defs/part"}, schema]},
            "maxItems": 2,
        }
    if random.random() < 0.1:
        schema = deepcopy(schema)  # its parts may be those of other schemas
        keyword, value = random.choice(_UNSUPPORTED)
        target = random.choice(list(_schemas(schema)))
        target[keyword] = value
    return schema


def _schemas(schema: Any) -> Iterator[Any]:
    yield schema
    for value in schema.get("properties", {}).values():
        yield from _schemas(value)
    if isinstance(schema.get("items"), dict):
        yield from _schemas(schema["items"])


def _any(random: Random, depth: int) -> Schema:
    simple = [_string, _string, _number, _number, _constant, _flag]
    nested = [_object, _object, _object, _map, _array, _array, _tuple, _one_of, _any_of, _all_of]
    if depth and random.random() < 0.8:
        return random.choice(nested)(random, depth - 1)
    return random.choice(simple)(random)


def _flag(random: Random) -> Schema:
    return {"type": random.choice(["boolean", "null"])}


def _string(random: Random) -> Schema:
    schema: Schema = {"type": "string"}
    match random.randrange(4):
        case 0:
            schema["pattern"] = random.choice(_PATTERNS)
            schema["maxLength"] = random.randint(8, 12)
        case 1:
            schema["format"] = random.choice(_FORMATS)
        case 2:
            schema["minLength"] = random.randint(0, 4)
            schema["maxLength"] = random.randint(4, 10)
        case _:
            schema["enum"] = random.sample(["red", "green", "blue", "é", 'a "b"', ""], 3)
    return schema


def _number(random: Random) -> Schema:
    whole = random.random() < 0.6
    least = random.randint(-1000, 1000) if whole else round(random.uniform(-50, 50), 2)
    most = least + random.choice([10, 500, 10**6])
    low, high = random.choice(
        [("minimum", "maximum"), ("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum")]
    )
    schema: Schema = {"type": "integer" if whole else "number", low: least, high: most}
    if whole and random.random() < 0.3:
        schema["multipleOf"] = random.choice([2, 3, 5])
    return schema


def _constant(random: Random) -> Schema:
    values: list[Any] = [None, True, 0, -2.5, "text", [1, 2], {"a": [None]}, 10**6]
    return {"const": random.choice(values)} if random.random() < 0.5 else {"enum": random.sample(values, 3)}


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(["id", "name", "a b", "größe", "x", "list"], random.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _any(random, depth) for name in names}}
    schema["required"] = [name for name in names if random.random() < 0.7]
    if random.random() < 0.8:
        schema["additionalProperties"] = False
    else:
        schema |= {"required": names, "additionalProperties": WORD, "maxProperties": len(names) + 1}
    return schema


def _map(random: Random, depth: int) -> Schema:
    value = _any(random, depth)
    least, most = random.randint(0, 1), random.randint(1, 2)
    if random.random() < 0.5:
        return {"type": "object", "additionalProperties": value, "minProperties": least, "maxProperties": most}
    names = {random.choice(["^[a-z]{1,4}$", "^k[0-9]$"]): value}
    return {"type": "object", "patternProperties": names, "additionalProperties": False, "maxProperties": most}


def _array(random: Random, depth: int) -> Schema:
    return array_of(_any(random, depth), random.randint(1, 3), random.randint(0, 1))


def _tuple(random: Random, depth: int) -> Schema:
    first = [_any(random, depth) for _ in range(random.randint(1, 2))]
    schema: Schema = {"type": "array", "prefixItems": first, "items": random.choice([False, WORD])}
    return {**schema, "minItems": random.randint(0, len(first)), "maxItems": 3}


def _one_of(random: Random, depth: int) -> Schema:
    branches = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "of": _any(random, depth)},
            "required": ["kind", "of"],
            "additionalProperties": False,
        }
        for kind in ("one", "two")
    ]
    return {"oneOf": [*branches, {"type": "null"}]}


def _any_of(random: Random, depth: int) -> Schema:
    return {"anyOf": [_any(random, depth) for _ in range(random.randint(1, 3))]}


def _all_of(random: Random, depth: int) -> Schema:
    left, right = ({"type": "object", "properties": {name: _any(random, depth)}, "required": [name]} for name in "ab")
    return {"allOf": [left, right], "maxProperties": 2}


def answers(matchers: list[Matcher], temperatures: list[float], most: int) -> list[tuple[str, bool]]:
    """The small model's texts for matchers that it runs side by side, and which of the texts ended."""
    params, config = load(SMALL)
    tokenizer = load_tokenizer(SMALL)
    samplings = [Sampling(temperature=temperature) for temperature in temperatures]
    numbers = row_numbers([(sampling, seed) for seed, sampling in enumerate(samplings)], config.vocab_size)
    prompt = tokenizer.encode(PROMPT)
    cache = init_cache(config, len(matchers), len(prompt) + most)
    logits, cache = forward(params, mx.array([prompt] * len(matchers), mx.int32), cache, last_only=True)
    made: list[list[int]] = [[] for _ in matchers]
    rows = list(range(len(matchers)))
    for position in range(most):
        allowed = mx.array(np.stack([matchers[row].allowed() for row in rows]))
        at = mx.full(len(rows), position, mx.int32)
        choice, _ = sample_rows(logits[:, -1], numbers, at, None, None, allowed, steps=steps_of(samplings))
        for row, token in zip(rows, np.array(choice.tokens).tolist(), strict=True):
            matchers[row].advance(token)
            made[row].append(token)
        kept = [place for place, row in enumerate(rows) if not matchers[row].finished]
        if not kept:
            break
        rows = [rows[place] for place in kept]
        numbers, cache = take_numbers(numbers, mx.array(kept)), take_rows(cache, kept)
        logits, cache = forward(params, choice.tokens[mx.array(kept)][:, None], cache)
    return [(tokenizer.decode(tokens), matcher.finished) for tokens, matcher in zip(made, matchers, strict=True)]


def _is_date_time(value: object) -> bool:
    text = str(value).upper().replace(":60", ":59")[:19]
    return not isinstance(value, str) or bool(datetime.fromisoformat(text))


def _is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(time.strptime(value[:8], "%H:%M:%S"))


def _is_uri(value: object) -> bool:
    return not isinstance(value, str) or bool(urlsplit(value).scheme)


def formats() -> Any:
    """jsonschema's checks of formats, and those that need another package there."""
    checker = jsonschema.FormatChecker()
    checker.checkers |= {name: (check, ValueError) for name, check in _CHECKS.items()}
    return checker


_CHECKS = {"date-time": _is_date_time, "time": _is_time, "uri": _is_uri}


def is_valid(text: str, schema: Schema) -> bool:
    """Whether the text is JSON that jsonschema finds valid."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind(schema, format_checker=formats()).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def named(error: InputError) -> str:
    """The keyword that a refusal names."""
    found = re.search(r"The JSON schema's '(.+?)' at #", str(error))
    return found[1] if found else ""


def sweep(schemas: list[Schema], most: int) -> tuple[Counter[str], list[str]]:
    """How many schemas were refused, and texts made, at temperatures 0 and 1; and what is wrong with any."""
    tokenizer, results, wrong = load_tokenizer(SMALL), Counter[str](), list[str]()
    trie = token_trie(tokenizer, tokenizer.vocab_size)
    enforced: list[tuple[Schema, Structure, float]] = []
    for schema in schemas:
        try:
            enforced += [(schema, Structure.json_schema(schema), temperature) for temperature in (0.0, 1.0)]
        except InputError as error:
            results["refused"] += 1
            if f'"{named(error)}"' not in json.dumps(schema):
                wrong.append(f"{json.dumps(schema)} is refused without its keyword: {error}")
    for first in range(0, len(enforced), ROWS):
        some = enforced[first : first + ROWS]
        texts = answers([trie.matcher(structure) for _, structure, _ in some], [one[2] for one in some], most)
        for (schema, _, temperature), (text, ended) in zip(some, texts, strict=True):
            results[f"temperature {temperature:g}, {'ended' if ended else 'cut off'}"] += 1
            if ended and not is_valid(text, schema):
                wrong.append(f"{json.dumps(schema)} isn't what this is: {text}")
    return results, wrong


def many_schemas(count: int) -> list[Schema]:
    """The real ones, and random ones."""
    random = Random(0)
    return [*REAL.values(), *(random_schema(random) for _ in range(count - len(REAL)))]


def main(count: int) -> None:
    start = time.perf_counter()
    results, wrong = sweep(many_schemas(count), most=150)
    print(f"{count} schemas in {time.perf_counter() - start:.0f} s")
    for name, number in sorted(results.items()):
        print(f"{number:5d} {name}")
    print(*wrong, sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
