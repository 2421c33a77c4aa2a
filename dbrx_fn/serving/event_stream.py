"""An answer as server-sent events."""

from collections.abc import Iterable

from starlette.types import Send

from dbrx_fn.serving.openai_objects import Object, json_bytes

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Otherwise nginx would buffer the events.
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


class EventStream:
    """Sends events over one HTTP response.

    Args:
        send: ASGI's function. It waits if the client reads slowly.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    async def begin(self) -> None:
        """Sends the response's head."""
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async def put(self, events: bytes) -> None:
        """Sends events, if there are any."""
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self) -> None:
        """Ends the response."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def as_events(objects: Iterable[Object]) -> bytes:
    """An event for each object."""
    return b"".join(b"data: " + json_bytes(one) + b"\n\n" for one in objects)
