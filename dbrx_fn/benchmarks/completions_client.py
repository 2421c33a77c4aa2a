"""A client of `/v1/completions` that measures when each part of a streamed answer arrives."""

import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from dbrx_fn.benchmarks.http_client import HttpFailure, Site, response
from dbrx_fn.errors import InputError

_LARGEST = 2**22
"""The most bytes of an event, or of an answer that isn't a stream. A benchmark's are far smaller."""

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Sets of fields to try, from those wanted to those that every server takes."""


@dataclass(frozen=True)
class Answer:
    """The result of a request. Times are of `time.perf_counter`.

    `due`, `sent`, `ended`: when it should have been sent, when it was, and when its answer ended.
    `times`: when each event with text arrived.
    `prompt_tokens`, `cached_tokens`, `made_tokens`: as the server reports them. If it doesn't, `made_tokens` counts
    events with text. `failure`: why there is no whole answer.
    """

    due: float
    sent: float
    ended: float
    times: tuple[float, ...]
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    made_tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """How to send requests to a server.

    `model`: its name in requests, if it needs one. `temperature`: of every request.
    `options`: other fields of every request.
    `words_per_token`: ratio for prompts made of words.
    """

    site: Site
    model: str | None
    temperature: float
    options: dict[str, Any]
    words_per_token: float = 1.0


async def find_endpoint(site: Site, model: str | None, temperature: float, words: list[str], answer: int) -> Endpoint:
    """Sends a trial request, to learn which fields a server takes.

    Args:
        site: its address.
        model: its name in requests. If not given, that of the only model in its list.
        temperature: of every request.
        words: of the prompt, which also tells how many words a token has.
        answer: tokens that are asked for.

    Raises:
        InputError: if it can't be reached, or answers no request.
    """
    answered = Answer(0, 0, 0, (), failure="it wasn't asked")
    name = model or await _only_model(site)
    for options in _OPTIONS:
        endpoint = Endpoint(site, name, temperature, options)
        answered = await ask(endpoint, " ".join(words), answer, time.perf_counter())
        if answered.failure is None:
            per_token = len(words) / answered.prompt_tokens if answered.prompt_tokens else 1.0
            return Endpoint(site, name, temperature, options, per_token)
        if not re.match(r"status 4\d\d", answered.failure):
            break
    raise InputError(f"The server at {site.host}:{site.port} answers no completion: {answered.failure}.")


async def ask(endpoint: Endpoint, prompt: str, answer: int, due: float) -> Answer:
    """Sends a request, and follows its answer to the end. The result says what failed."""
    fields = {
        **({} if endpoint.model is None else {"model": endpoint.model}),
        "prompt": prompt,
        "max_tokens": answer,
        "temperature": endpoint.temperature,
        "stream": True,
        **endpoint.options,
    }
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    ended = False
    try:
        async with response(endpoint.site, "POST", "/v1/completions", json.dumps(fields).encode()) as (status, parts):
            if status != 200:
                raise HttpFailure(f"status {status}: {_reason(await _whole(parts))}")
            async for now, event in _events(parts):
                ended = ended or event is None
                if event is None:
                    continue
                if event.get("error"):
                    raise HttpFailure(f"an error in the stream: {_reason(json.dumps(event).encode())}")
                told = event.get("usage")
                usage = told if isinstance(told, dict) else usage
                for choice in event.get("choices") or ():
                    ended = ended or choice.get("finish_reason") is not None
                    if choice.get("text"):
                        times.append(now)
        if not ended:
            raise HttpFailure("the stream ended early")
    except HttpFailure as failure:
        return Answer(due, sent, time.perf_counter(), tuple(times), made_tokens=len(times), failure=str(failure))
    except (AttributeError, TypeError):
        reason = "the stream's events aren't completions"
        return Answer(due, sent, time.perf_counter(), tuple(times), made_tokens=len(times), failure=reason)
    made = _count(usage, "completion_tokens")
    return Answer(
        due,
        sent,
        time.perf_counter(),
        tuple(times),
        _count(usage, "prompt_tokens"),
        _count(usage.get("prompt_tokens_details"), "cached_tokens"),
        len(times) if made is None else made,
    )


async def read_page(site: Site, path: str) -> bytes | None:
    """A page, or `None` if there is none."""
    try:
        async with response(site, "GET", path) as (status, parts):
            return await _whole(parts) if status == 200 else None
    except HttpFailure:
        return None


async def _only_model(site: Site) -> str | None:
    try:
        names = [str(model["id"]) for model in json.loads(await read_page(site, "/v1/models") or b"")["data"]]
    except (ValueError, TypeError, KeyError):
        return None
    return names[0] if len(names) == 1 else None


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, dict[str, Any] | None]]:
    """The objects of server-sent events, each with the time it came; `None` for the mark at the end."""
    kept = b""
    async for part in parts:
        now = time.perf_counter()
        *lines, kept = (kept + part).split(b"\n")
        if len(kept) > _LARGEST:
            raise HttpFailure(f"an event has more than {_LARGEST} bytes")
        for line in lines:
            name, _, content = line.strip().partition(b":")
            if name != b"data":
                continue
            if content.strip() == b"[DONE]":
                yield now, None
                continue
            try:
                event = json.loads(content)
            except (ValueError, RecursionError):
                raise HttpFailure("an event isn't JSON") from None
            yield now, event


async def _whole(parts: AsyncIterator[bytes]) -> bytes:
    whole = b""
    async for part in parts:
        whole += part
        if len(whole) > _LARGEST:
            raise HttpFailure(f"the answer has more than {_LARGEST} bytes")
    return whole


def _reason(body: bytes) -> str:
    """What an error's body says: OpenAI's message if there is one."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return shorten(str(text), 200, placeholder="…").rstrip(".") or "no reason given"


def _count(counts: object, name: str) -> int | None:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if type(value) is int else None
