"""Runs the server: binds the address, serves connections, and shuts down in order."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import uvicorn

from dbrx_fn.errors import InputError
from dbrx_fn.serving.access import Access
from dbrx_fn.serving.api import make_app
from dbrx_fn.serving.connection import Connection, ServerConfig
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.service import Service

_KEEP_ALIVE = 30
"""Seconds that a connection may be silent between two requests."""

_LARGEST_HEAD = 32 * 2**10
"""Bytes of a request's head."""

_MOST_CONNECTIONS = 4096
_OTHER_FILES = 64
"""File descriptors that the process needs besides its connections."""

_LAST_WORDS = 2
"""Seconds for connections to receive the last bytes."""

_GLANCE = 0.1
"""Seconds between two checks whether to go on."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address, and answers nobody yet.

    Args:
        host: a name or address of this machine.
        port: 0 for any free one.

    Raises:
        InputError: if the address can't be bound.
    """
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("ports are numbers from 0 to 65535")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # For any other protocol, 0 too, asyncio leaves Nagle's algorithm on, which holds tokens back for 40 ms.
        opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # An earlier server's closed connections would otherwise block the address for a while.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(address)
        except BaseException:
            opened.close()
            raise
        return opened
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The address {host[:80]!r}, port {port}, can't be used ({reason}): take others with --host and --port."
        ) from None


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    `access`: who may send requests.
    `most_open`: requests that may be open at once.
    `drain`: seconds that open requests get to end at shutdown.
    """

    access: Access
    most_open: int
    drain: float = 30.0


class Server:
    """Serves a model over HTTP. One thread runs it, and any thread may stop it.

    Args:
        address: of `bound`; closed at the end.
        model: the served model.
        engine: serves the requests; closed at the end.
        settings: the server's settings.
    """

    def __init__(self, address: socket.socket, model: ServedModel, engine: Engine, settings: Settings) -> None:
        self._address, self._model, self._engine, self._settings = address, model, engine, settings
        self._stopping = False

    def run(self, ready: Callable[[str], None]) -> None:
        """Serves until it is stopped or the engine fails.

        Args:
            ready: called with the server's URL once it accepts requests.

        Raises:
            EngineError: if the engine has failed.
        """
        try:
            asyncio.run(self._serve(ready))
        finally:
            self._address.close()
            self._engine.close()

    def stop(self) -> None:
        """Shuts down: new requests are refused, and open ones get `drain` seconds to end. Any thread may call it."""
        self._stopping = True

    async def _serve(self, ready: Callable[[str], None]) -> None:
        service = Service(self._model, self._engine, most_open=self._settings.most_open)
        server = _Uvicorn(_config(service, self._settings.access))
        serving = asyncio.create_task(server.serve([self._address]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready(_url(self._address))
        while not (self._stopping or self._engine.failure or serving.done()):
            await asyncio.sleep(_GLANCE)
        service.draining = True
        ends = time.monotonic() + self._settings.drain
        while service.open and time.monotonic() < ends and self._engine.failure is None:
            await asyncio.sleep(_GLANCE)
        failure = self._engine.failure
        # Texts that still run end with an error.
        await asyncio.to_thread(self._engine.close)
        server.should_exit = True
        await asyncio.wait([serving], timeout=_LAST_WORDS)
        # Clients that no longer send or read have had their time. uvicorn waits for all others.
        for connection in list(server.server_state.connections):
            cast(Connection, connection).transport.abort()
        await serving
        service.close()
        if failure is not None:
            raise failure


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(service: Service, access: Access) -> ServerConfig:
    # Clients can cause warnings at will, so only the server's own errors are logged.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = ServerConfig(
        make_app(service, access),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
    )
    config.most_connections = min(_MOST_CONNECTIONS, _raised_file_limit() - _OTHER_FILES)
    return config


def _url(address: socket.socket) -> str:
    host, port, *_ = address.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raised_file_limit() -> int:
    """The number of files that this process may open, after raising the limit to what connections need."""
    try:
        import resource
    except ImportError:
        return _MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return wanted
