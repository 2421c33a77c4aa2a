"""Access control: API keys, allowed origins of browser scripts, and the server's host names."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import read_bounded, shown_path
from dbrx_fn.serving.openai_objects import HttpError

KEY_VARIABLE = "DBRX_FN_API_KEY"

_LARGEST_FILE = 2**20
_OPEN_PATHS = ("/", "/health")
"""Paths that need no key: the page itself asks for the key, and load balancers have none."""


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    `keys`: SHA-256 of each API key. Without keys, everybody who reaches the server may send requests.
    `origins`: other sites whose scripts may send requests, such as `https://example.org`; `*` for all.
    `hosts`: names of the server besides `localhost` and IP addresses. Without keys, other names are refused, since
        another site could let its own name point here (https://en.wikipedia.org/wiki/DNS_rebinding).
    """

    keys: tuple[bytes, ...] = ()
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Checks that a request may be answered.

        Args:
            path: the URL's path.
            headers: values by lower-case names.

        Raises:
            HttpError: if it may not.
        """
        host = headers.get("host", "")
        if not self.keys and not self._is_own(host):
            raise HttpError(
                403,
                f"The host name {host[:80]!r} isn't one of this server: use localhost or its address, or allow it with"
                " --allowed-hosts.",
                "unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and not {origin, "*"} & self.origins and origin.partition("://")[2] != host:
            raise HttpError(
                403,
                f"Scripts of the site {origin[:80]!r} may not use this server: allow it with --allowed-origins.",
                "unknown_origin",
            )
        if self.keys and path not in _OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            raise HttpError(
                401,
                "The API key is missing or wrong: send the header 'Authorization: Bearer KEY'.",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # All keys are compared, each in constant time, so that the time reveals nothing about them.
        right = [hmac.compare_digest(given, known) for known in self.keys]
        return scheme.lower() == "bearer" and any(right)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in ("", "localhost") or name.endswith(".localhost") or name in self.hosts or _is_address(name)


def read_keys(file: Path | None, variable: str | None) -> tuple[bytes, ...]:
    """The keys of a file, one a line, and the one of the environment; empty lines and those after # are none.

    Args:
        file: the path of the file, if there is one.
        variable: value of the environment variable `KEY_VARIABLE`, if it is set.

    Raises:
        InputError: if the file can't be read or has no key, or a key can't be sent in a header.
    """
    sources: list[tuple[str, list[str]]] = []
    if file is not None:
        sources.append((shown_path(file), _lines(file)))
    if variable is not None:
        sources.append((f"The environment's {KEY_VARIABLE}", [variable]))
    for source, keys in sources:
        if not keys or not all(key.isascii() and key.isprintable() and key and " " not in key for key in keys):
            raise InputError(
                f"{source} has no key, or one that no header can hold: give keys of visible ASCII characters."
            )
    return tuple(_digest(key) for _, keys in sources for key in keys)


def _lines(file: Path) -> list[str]:
    try:
        lines = read_bounded(file, _LARGEST_FILE).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{shown_path(file)} can't be read ({error}): give a text file with a key a line.") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
