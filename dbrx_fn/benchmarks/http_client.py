"""An HTTP client for asyncio. It uses one connection per request, and gives the body as it arrives."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown

_PATIENCE = 600.0
"""The most seconds that a server may be silent. A queue can be long."""

_AT_ONCE = 2**16


class HttpFailure(Exception):
    """A request that got no answer, or one that isn't HTTP. Its text says why."""


@dataclass(frozen=True)
class Site:
    """A server's address. `path`: what its endpoints' paths begin with."""

    host: str
    port: int
    secure: bool = False
    path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def read_url(url: str, api_key: str | None) -> Site:
    """The site of an OpenAI-compatible server, named with or without `/v1`.

    Raises:
        InputError: if it is no such URL.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    plain = url.isascii() and url.isprintable() and " " not in url
    if (
        not plain
        or parts.scheme not in ("http", "https")
        or not host
        or parts.query
        or parts.fragment
        or parts.username
    ):
        raise InputError(
            f"--url is {shown(url)} where a server's address is expected, such as http://127.0.0.1:8080/v1."
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise InputError("The API key in the environment has characters that can't be sent: use printable ASCII.")
    secure = parts.scheme == "https"
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Site(host, port or (443 if secure else 80), secure, path, headers)


@asynccontextmanager
async def response(
    site: Site, method: str, path: str, body: bytes = b""
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """Sends a request. Gives the status and the parts of the body, as they arrive.

    Raises:
        HttpFailure: when it is entered, and from the body.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_PATIENCE):
            secure = ssl.create_default_context() if site.secure else None
            reader, writer = await asyncio.open_connection(site.host, site.port, ssl=secure)
        connection = h11.Connection(h11.CLIENT)
        await _send(writer, connection, site, method, path, body)
        head = await _event(reader, connection)
        while isinstance(head, h11.InformationalResponse):
            head = await _event(reader, connection)
        if not isinstance(head, h11.Response):
            raise HttpFailure("the connection ended without an answer")
        yield head.status_code, _parts(reader, connection)
    except TimeoutError:
        raise HttpFailure(f"nothing came for {_PATIENCE:g} seconds") from None
    except h11.RemoteProtocolError as error:
        raise HttpFailure(f"the answer isn't HTTP ({error})") from None
    except UnicodeError:
        raise HttpFailure("the host's name has a part that is empty or too long") from None
    except OSError as error:
        raise HttpFailure(error.strerror or str(error) or type(error).__name__) from None
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _send(
    writer: asyncio.StreamWriter, connection: h11.Connection, site: Site, method: str, path: str, body: bytes
) -> None:
    name = f"[{site.host}]" if ":" in site.host else site.host
    headers = {
        "host": f"{name}:{site.port}",
        **site.headers,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    request = h11.Request(method=method, target=site.path + path, headers=list(headers.items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()


async def _event(reader: asyncio.StreamReader, connection: h11.Connection) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        async with asyncio.timeout(_PATIENCE):
            connection.receive_data(await reader.read(_AT_ONCE))
    return event


async def _parts(reader: asyncio.StreamReader, connection: h11.Connection) -> AsyncIterator[bytes]:
    while isinstance(event := await _event(reader, connection), h11.Data):
        yield bytes(event.data)
