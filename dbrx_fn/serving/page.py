"""The chat page: one file. A browser runs only its own script and style."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("page.html")

_PARTS = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page and the headers that it is sent with."""

    content: bytes
    headers: dict[str, str]


def read_page(file: Path = FILE) -> Page | None:
    """The page, if there is one.

    Its policy (https://www.w3.org/TR/CSP3/) lets a browser load nothing from elsewhere, and run nothing but the
    `<script>` and `<style>` elements that are in the file, known by their hashes.
    """
    if not file.is_file():
        return None
    content = file.read_bytes()
    found: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for name, text in _PARTS.findall(content):
        found[name].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(found[b"script"]) or "'none'",
        "style-src": " ".join(found[b"style"]) or "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return Page(
        content,
        {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )
