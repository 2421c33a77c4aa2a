"""A server of OpenAI's completions that makes no text, but keeps times: each answer is a script."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


@dataclass(frozen=True)
class Script:
    """An answer: seconds before the first text, and between the `texts`.

    `end`: how it ends; "status" gives 429 instead of a stream. `raw`: an event to send instead of an end.
    """

    first: float = 0.0
    between: float = 0.0
    texts: int = 3
    end: Literal["whole", "cut", "error", "status"] = "whole"
    raw: bytes = b""


@dataclass
class ScriptedServer:
    """What was asked, in order: fields and headers; and how many requests ran at once, at most."""

    url: str = ""
    fields: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


@contextmanager
def scripted_server(
    *scripts: Script, refused: tuple[str, ...] = (), tells_usage: bool = True, figures: bytes | None = None
) -> Iterator[ScriptedServer]:
    """Serves within the block.

    Args:
        scripts: of the answers, again from the first after the last. The first request, a benchmark's trial, gets one
            of its own.
        refused: fields that get status 400.
        tells_usage: whether it tells how many tokens it made, if asked.
        figures: the page `/metrics`, if there is one.
    """
    seen = ScriptedServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = figures if self.path == "/metrics" else None
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            wrong = [name for name in refused if name in asked]
            if wrong:
                return self._fail(400, f"Unknown field {wrong[0]}.")
            with lock:
                number = len(seen.fields)
                seen.fields.append(asked)
                seen.headers.append(dict(self.headers.items()))
                seen.running += 1
                seen.most_running = max(seen.most_running, seen.running)
            try:
                self._answer(asked, scripts[(number - 1) % len(scripts)] if number else Script())
            finally:
                with lock:
                    seen.running -= 1

        def _answer(self, asked: dict[str, Any], script: Script) -> None:
            if script.end == "status":
                return self._fail(429, "The queue is full.")
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(b": a comment\n\n")
            for index in range(script.texts):
                time.sleep(script.between if index else script.first)
                self._event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
            if script.raw:
                self.wfile.write(b"data: " + script.raw + b"\n\n")
                return
            if script.end == "cut":
                return
            if script.end == "error":
                return self._event({"error": {"message": "The model failed."}})
            self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            if tells_usage and "stream_options" in asked:
                words = len(asked["prompt"].split())
                usage = {"prompt_tokens": 2 * words, "completion_tokens": 2 * script.texts}
                self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, event: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\r\n\r\n")

        def _fail(self, status: int, message: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": message}}).encode())

    class Server(ThreadingHTTPServer):
        # With Python's 5, requests that come together wait for a second.
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
