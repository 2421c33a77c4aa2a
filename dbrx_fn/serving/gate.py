"""The outermost layer: checks every request on its way in, and counts it on its way out."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbrx_fn.errors import DbrxError, EngineError
from dbrx_fn.serving.access import Access
from dbrx_fn.serving.failures import refusal
from dbrx_fn.serving.service import Service

_ENDPOINTS = frozenset(
    (
        *("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"),
        *("/tokenize", "/detokenize", "/tokenizer_info"),
    )
)
_WHILE_ENDING = ("/health", "/metrics")
"""Endpoints that still answer during shutdown."""


class Gate:
    """An ASGI application that wraps another one.

    Args:
        app: the wrapped one.
        access: who may send requests.
        service: counts requests, and knows whether the server is shutting down.
    """

    def __init__(self, app: ASGIApp, access: Access, service: Service) -> None:
        self._app, self._access, self._service = app, access, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def count(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        path = scope["path"]
        try:
            try:
                self._access.check(path, Headers(scope=scope))
                if self._service.draining and path not in _WHILE_ENDING:
                    raise EngineError("This server is ending and takes no more requests: try another one.")
            except DbrxError as error:
                await refusal(error)(scope, receive, count)
            else:
                await self._app(scope, receive, count)
        finally:
            # An unknown path from a client must not become a label.
            known = "/v1/models/{name}" if path.startswith("/v1/models/") else path if path in _ENDPOINTS else "other"
            self._service.metrics.answered(known, status or 499)
