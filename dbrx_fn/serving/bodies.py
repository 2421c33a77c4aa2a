"""Reads requests' bodies. Each has a limit of size and time, and all together have a limit of memory."""

import asyncio

from starlette.requests import Request

from dbrx_fn.errors import BusyError
from dbrx_fn.serving.openai_objects import HttpError

LARGEST = 2 * 2**20
"""The most bytes of a body. Parsing JSON of this size takes some 50 ms, and no other thread runs meanwhile."""

SECONDS = 30.0
"""Seconds that a body may take to arrive."""

_TOGETHER = 128 * 2**20
"""The most bytes of all bodies that are being read."""


class Bodies:
    """The bodies that are being read."""

    def __init__(self) -> None:
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """A request's whole body.

        Raises:
            HttpError: if it is larger than `LARGEST`, or takes longer than `SECONDS`.
            BusyError: if too much is being read at once.
            ClientDisconnect: if the client disconnected.
        """
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdecimal() and len(declared) < 20) or int(declared) > LARGEST:
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS):
                async for piece in request.stream():
                    body += piece
                    self._held += len(piece)
                    if len(body) > LARGEST:
                        raise _too_large()
                    if self._held > _TOGETHER:
                        raise BusyError("Too many requests are arriving at once: try again later.")
        except TimeoutError:
            raise HttpError(408, f"The body didn't come within {SECONDS:g} seconds: send it faster.") from None
        finally:
            self._held -= len(body)
        return bytes(body)


def _too_large() -> HttpError:
    return HttpError(413, f"The body is larger than {LARGEST} bytes: send less at once.")
