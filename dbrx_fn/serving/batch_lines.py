"""Reads a batch's requests from a file, one per line.

A line is a JSON object, in OpenAI's form (https://platform.openai.com/docs/guides/batch) or plain:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}
    {"prompt": "To be", "max_tokens": 20}
    {"messages": [{"role": "user", "content": "Hi"}]}

A plain line is the body alone, and may have a `custom_id` beside its fields.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from dbrx_fn.errors import InputError
from dbrx_fn.files.checksums import file_sum
from dbrx_fn.files.json_file import parse_json, shown, shown_path
from dbrx_fn.files.regular_file import open_regular
from dbrx_fn.serving.asked import Asked
from dbrx_fn.serving.chat_completions import read_chat
from dbrx_fn.serving.completions import read_completion
from dbrx_fn.serving.fields import FieldError, Fields
from dbrx_fn.serving.openai_objects import json_bytes
from dbrx_fn.serving.served_model import ServedModel

LARGEST_LINE = 16 * 2**20
"""Bytes."""

_URLS: dict[str, Literal["chat", "completion"]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
}


@dataclass(frozen=True)
class BatchInput:
    """A file of requests that has been checked.

    `nbytes`: its size. Lines that are appended later aren't read.
    `sha256`: SHA-256 of its content.
    `count`: number of lines that aren't blank.
    `last`: line number of the last one.
    """

    path: Path
    nbytes: int
    sha256: str
    count: int
    last: int

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """The lines that aren't blank, with their numbers from 1; `None` for one that is too long."""
        with open_regular(self.path) as file:
            yield from _lines(file, self.nbytes)


@dataclass(frozen=True)
class BatchRequest:
    """A line that has been read."""

    kind: Literal["chat", "completion"]
    asked: Asked


def read_batch_input(path: Path) -> BatchInput:
    """Checks a file of any size, in bounded memory.

    Raises:
        InputError: if it can't be read, has no lines, or has a `custom_id` twice.
    """
    try:
        found = file_sum(path)
        with open_regular(path) as file:
            # A digest of 16 bytes and a number per line take less memory than the ids themselves.
            digests, numbers, count, last = bytearray(), array("Q"), 0, 0
            for number, content in _lines(file, found["bytes"]):
                count, last = count + 1, number
                name = custom_id(content)
                if name is not None:
                    digests += hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                    numbers.append(number)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown_path(path)} can't be read ({reason}): name a file of requests in JSONL.") from None
    if not count:
        raise InputError(f"{shown_path(path)} has no lines: put a request on each.")
    twice = _first_repeat(bytes(digests))
    if twice is not None:
        first, second = sorted(numbers[place] for place in twice)
        raise InputError(
            f"{shown_path(path)} has the same custom_id in lines {first} and {second}: give each line its own."
        )
    return BatchInput(path, found["bytes"], found["sha256"], count, last)


def custom_id(content: bytes | None) -> str | None:
    """A line's `custom_id`, if it is a text."""
    try:
        value = None if content is None else parse_json(content)
    except ValueError:
        return None
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def read_line(content: bytes | None, model: ServedModel, seed: int | None) -> BatchRequest:
    """Reads a line as the server reads a body.

    Args:
        content: the line; `None` if it is too long.
        model: the served model.
        seed: used if the request has no seed. If both are missing, a seed is drawn.

    Raises:
        DbrxError: naming the field that can't be followed.
    """
    if content is None:
        raise InputError(f"The line has more than {LARGEST_LINE} bytes: shorten it.")
    try:
        value = parse_json(content, unique=True)
    except ValueError as error:
        raise InputError(f"The line can't be read as JSON ({error}): give an object.") from None
    if not isinstance(value, dict):
        raise InputError(f"The line is {shown(value)} where a JSON object is expected.")
    kind, body = _body(value)
    if body.get("stream"):
        raise FieldError("stream", "stream is for answers over a network: leave it out.", "unsupported_parameter")
    if body.get("seed") is None and seed is not None:
        body = {**body, "seed": seed}
    try:
        encoded = json_bytes(body)
    except ValueError:
        raise InputError("The line holds a number that isn't finite: give another.") from None
    return BatchRequest(kind, (read_chat if kind == "chat" else read_completion)(encoded, model))


def _body(line: dict[str, Any]) -> tuple[Literal["chat", "completion"], dict[str, Any]]:
    if "body" not in line:
        body = {name: value for name, value in line.items() if name != "custom_id"}
        if ("messages" in body) == ("prompt" in body):
            raise InputError("The line must have either a prompt, or messages, or a body with one of them.")
        return ("chat" if "messages" in body else "completion"), body
    fields = Fields(line)
    for name in ("custom_id", "url"):
        if not isinstance(fields.required(name), str):
            raise FieldError(name, f"{name} is {shown(line[name])} where a text is expected.", "invalid_value")
    if fields.text("method") not in (None, "POST"):
        raise FieldError("method", f"method is {shown(line['method'])} where POST is expected.", "invalid_value")
    if line["url"] not in _URLS:
        raise FieldError("url", f"url is {shown(line['url'])} where {' or '.join(_URLS)} is expected.", "invalid_value")
    body = fields.required("body")
    if not isinstance(body, dict):
        raise FieldError("body", f"body is {shown(body)} where an object is expected.", "invalid_value")
    fields.finish()
    return _URLS[line["url"]], body


def _lines(file: BinaryIO, nbytes: int) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while (left := nbytes - file.tell()) > 0:
        line = file.readline(min(LARGEST_LINE, left))
        if not line:
            return
        number += 1
        whole = line.endswith(b"\n") or len(line) == left
        while not whole:
            more = file.readline(LARGEST_LINE)
            whole = not more or more.endswith(b"\n")
            line = b"" if whole else line
            if whole:
                yield number, None
        if line.strip():
            yield number, line


def _first_repeat(digests: bytes) -> tuple[int, int] | None:
    """The indices of two equal digests of 16 bytes."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    place = int(same.argmax()) if same.any() else None
    return None if place is None else (int(order[place]), int(order[place + 1]))
