"""uvicorn's HTTP connection with deadlines for idle clients, and errors in OpenAI's form.

uvicorn closes a connection that is idle after an answer. The deadlines here are for clients that send no request, send
its head slowly, or don't read their answer.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from dbrx_fn.serving.openai_objects import error_object, json_bytes

HEAD_SECONDS = 10.0
"""How long a request's head may take to arrive, from the connection's start or the head's first byte."""

STALLED_SECONDS = 60.0
"""How long a client may read nothing while data waits for it."""


class ServerConfig(Config):
    """uvicorn's settings, and how many connections may be open."""

    most_connections = 1000


class _Deadline:
    """A timer that calls a function at its deadline."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def set(self, seconds: float, action: Callable[[], None]) -> None:
        """Sets the deadline, and replaces an earlier one."""
        self.clear()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._pass, action)

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _pass(self, action: Callable[[], None]) -> None:
        self._timer = None
        action()


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head, self._reader = _Deadline(), _Deadline()
        self._idle_since = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether none of its requests is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Watches a new connection. If there are too many, the one that has been idle the longest is closed."""
        super().connection_made(cast(asyncio.Transport, transport))
        # Any unread byte then calls `pause_writing`.
        self.transport.set_write_buffer_limits(high=0)
        self._watch_head()
        if len(self.connections) > cast(ServerConfig, self.config).most_connections:
            others = cast(set[Connection], self.connections)
            idle = [connection for connection in others if connection.is_idle]
            min(idle or [self], key=lambda connection: connection._idle_since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops its timers."""
        self._head.clear()
        self._reader.clear()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Receives bytes, which may complete a request's head."""
        super().data_received(data)
        if self.is_idle:
            self._watch_head()

    def handle_events(self) -> None:
        """Parses what has arrived. A complete head ends its deadline."""
        super().handle_events()
        if not self.is_idle:
            self._head.clear()

    def on_response_complete(self) -> None:
        """An answer has ended. The next head has a deadline only if it has begun to arrive."""
        self._idle_since = time.monotonic()
        super().on_response_complete()
        if self.is_idle and self.conn.trailing_data[0]:
            self._watch_head()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server sends."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has read everything."""
        self._reader.clear()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuses what isn't HTTP."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json_bytes(error_object("This is no HTTP/1.1 request.", "invalid_request_error"))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _watch_head(self) -> None:
        if not self._head.is_set:
            self._head.set(HEAD_SECONDS, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.is_idle:
            self.transport.abort()

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self._watch_reader()
            else:
                self.transport.abort()

        self._reader.set(STALLED_SECONDS, look)
