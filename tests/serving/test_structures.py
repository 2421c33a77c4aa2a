"""Structured output over HTTP, by OpenAI's client: what is asked for is enforced, or refused by name."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.support.server_process import server_process

MESSAGES: Any = [{"role": "user", "content": "Who goes there?"}]


class Guard(pydantic.BaseModel):
    """What is asked of a guard."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: Literal["Barnardo", "Francisco"]
    armed: bool


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        server_process("--decode-concurrency", "4") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as opened,
    ):
        yield opened


def test_the_client_parses_what_a_schema_asks_for(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="small", messages=MESSAGES, response_format=Guard, max_tokens=60, seed=seed, temperature=1.0
        )
        assert isinstance(answer.choices[0].message.parsed, Guard)
        assert answer.choices[0].finish_reason == "stop"


def test_a_stream_keeps_to_its_schema_too(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "guard", "schema": Guard.model_json_schema()}}
    asked: Any = {"model": "small", "messages": MESSAGES, "response_format": schema, "max_tokens": 60, "seed": 1}
    chunks = client.chat.completions.create(**asked, stream=True, temperature=1.0)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    Guard.model_validate_json(text)


def test_any_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="small", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=300, seed=3
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{2}:[0-9]{2}"}, "[0-9]{2}:[0-9]{2}"),
        ({"choice": ["to be", "not to be"]}, "(not )?to be"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 7}}, "[3-7]"),
        ({"json": '{"enum": [1, 2]}'}, "[12]"),
    ],
)
def test_regexes_and_choices(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model="small", prompt="The hour is ", max_tokens=30, temperature=1.0, extra_body={"structured_outputs": form}
    )
    assert re.fullmatch(pattern, answer.choices[0].text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"unevaluatedItems": {}}}}},
            "unevaluatedItems",
        ),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "can't be enforced"),
        ({"structured_outputs": {"regex": "["}}, "regular expression"),
        ({"structured_outputs": {"choice": []}}, "1 to"),
        ({"structured_outputs": {"choice": "a"}}, "list of texts"),
        ({"structured_outputs": {"json": "{"}}, "no JSON schema"),
        ({"structured_outputs": {}}, "just one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "just one"),
        ({"structured_outputs": {"grammar": "a"}}, "grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "both given"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_enforced_is_refused(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=5, extra_body=fields)
