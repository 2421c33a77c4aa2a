"""The search for the keyword that a schema is refused for, with refusals made up for it and llguidance's own."""

import json
import time
from collections.abc import Callable

import pytest

from dbrx_fn import InputError, Structure
from dbrx_fn.generation.schema_refusal import refused_keyword
from tests.support.real_schemas import COUNT, Schema, array_of, object_of

IMPOSSIBLE: Schema = {"type": "integer", "minimum": 5, "maximum": 4}


def nested(depth: int) -> Schema:
    schema = IMPOSSIBLE
    for _ in range(depth):
        schema = array_of(schema)
    return schema


class Refusals:
    """Refuses what holds `IMPOSSIBLE`, and keeps what was asked. One answer can take long."""

    def __init__(self, slow: int | None = None) -> None:
        self.asked: list[int] = []
        self._slow = slow

    def __call__(self, schema: Schema) -> str | None:
        text = json.dumps(schema)
        self.asked.append(len(text))
        if len(self.asked) == self._slow:
            time.sleep(2.5)
        return "it is impossible" if '"minimum": 5' in text else None


def test_a_slow_machine_finds_the_same_keyword() -> None:
    schema = object_of(a=COUNT, b=array_of(IMPOSSIBLE), c=COUNT)
    found = refused_keyword(schema, Refusals(slow=2))
    assert found == ("properties", "b", "items", "minimum")
    assert found == refused_keyword(schema, Refusals())


LARGE: dict[str, Callable[[], Schema]] = {
    "deep": lambda: nested(110),
    "deep among long texts": lambda: object_of("", a=nested(100), b={"const": "x" * 100_000}),
    "wide": lambda: object_of("a", **{f"p{n}": COUNT for n in range(1800)}, a=IMPOSSIBLE),
    "a chain": lambda: {
        "$ref": "#/$defs/p0",
        "$defs": {**{f"p{n}": array_of({"$ref": f"#/$defs/p{n + 1}"}) for n in range(500)}, "p500": IMPOSSIBLE},
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_schema_takes_few_trials(name: str) -> None:
    refusals = Refusals()
    found = refused_keyword(LARGE[name](), refusals)
    assert found
    assert len(refusals.asked) <= 52
    assert sum(refusals.asked[1:-1]) < 2_000_000
    again = Refusals()
    assert refused_keyword(LARGE[name](), again) == found
    assert again.asked == refusals.asked


@pytest.mark.parametrize(("count", "place"), [(2, 1), (3, 1), (3, 2), (1000, 1), (1000, 500), (1000, 999)])
def test_a_keyword_is_found_among_required_properties(count: int, place: int) -> None:
    schema = object_of("", **{f"p{n}": COUNT for n in range(count)} | {f"p{place}": IMPOSSIBLE})
    with pytest.raises(InputError, match=rf"'minimum' at #/properties/p{place}/minimum can't be enforced"):
        Structure.json_schema(schema)


@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_keyword_is_found_in_a_list_of_branches(place: int) -> None:
    branches = [IMPOSSIBLE if n == place else {"const": n} for n in range(20)]
    assert refused_keyword({"anyOf": branches}, Refusals()) == ("anyOf", place, "minimum")
