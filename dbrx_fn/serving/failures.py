"""Turns every failure into a response: OpenAI's error object with its HTTP status."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dbrx_fn.errors import DbrxError
from dbrx_fn.files.json_file import shown
from dbrx_fn.serving.openai_objects import HttpError, Object, error_object, json_bytes, status_of, told

_RETRY_AFTER = "2"
"""Seconds after which a refused client may try again. By then some running text has usually ended."""


def json_response(content: Object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An object that no browser takes for anything else."""
    own = {"X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(json_bytes(content), status, own, media_type="application/json")


def refusal(error: DbrxError) -> Response:
    """The response for an error."""
    status = status_of(error)
    headers = error.headers if isinstance(error, HttpError) else {}
    if status in (429, 503):
        headers = {"Retry-After": _RETRY_AFTER, **headers}
    return json_response(told(error), status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """Starlette's handler of `DbrxError`."""
    assert isinstance(error, DbrxError)
    return refusal(error)


async def no_endpoint(request: Request, error: Exception) -> Response:
    """Starlette's handler of unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = shown(request.url.path)
    sentence = f"There is nothing at {path}." if error.status_code == 404 else f"{path}: {error.detail}."
    if error.status_code == 405:
        sentence = f"{path} doesn't take {request.method[:20]}."
    return json_response(error_object(sentence, "invalid_request_error"), error.status_code, error.headers)


async def client_gone(request: Request, error: Exception) -> Response:
    """Starlette's handler for a client that disconnected. Nobody receives this."""
    return Response(status_code=499)


async def fault(request: Request, error: Exception) -> Response:
    """Starlette's handler for an internal error."""
    return json_response(error_object("The server failed by an internal error.", "server_error"), 500)
