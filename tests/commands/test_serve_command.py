"""`python -m dbrx_fn.serve` as whoever runs it meets it: how it starts, what it says, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.cli.command import INTERRUPTED
from dbrx_fn.serve import main
from dbrx_fn.serving.access import KEY_VARIABLE
from tests.support.running_server import running_server
from tests.support.server_process import ROOT, server_process

ASKED: dict[str, Any] = {"prompt": "To be", "stream": True, "ignore_eos": True}


def wait_for(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def follow(url: str, tokens: int) -> tuple[threading.Thread, list[str]]:
    """Streams a completion on a thread, which has begun; the events fill the list."""
    events: list[str] = []

    def run() -> None:
        asked = {**ASKED, "max_tokens": tokens}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: bool(events))
    return thread, events


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_lets_what_runs_end_and_nothing_begin(number: int, status: int) -> None:
    with server_process("--drain", "30", "--served-model-name", "Shakespeare") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "Shakespeare"
        with httpx.Client(base_url=server.url) as client:
            thread, events = follow(server.url, 300)
            server.process.send_signal(number)
            wait_for(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=ASKED)
            assert events[-1] != "[DONE]"
        said = server.process.communicate(timeout=60)[1]
        thread.join()
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.returncode == status
    assert "Traceback" not in said
    for words in ("Shakespeare: up to 32 texts at once, of up to 2048 tokens", "ending: what runs has 30 seconds."):
        assert words in said


def test_what_does_not_end_in_time_is_told_so() -> None:
    with server_process("--drain", "0.2") as server:
        thread, events = follow(server.url, 2000)
        began = time.monotonic()
        status, said = server.end(signal.SIGTERM)
        thread.join()
    assert time.monotonic() - began < 5
    assert (status, "Traceback" in said) == (0, False)
    assert json.loads(events[-2])["error"]["type"] == "server_error"


def test_clients_that_neither_send_nor_read_on_do_not_keep_a_server_from_ending_quietly() -> None:
    body = json.dumps({"tokens": [4092] * 340_000}, separators=(",", ":")).encode()
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    with server_process("--drain", "0") as server, socket.socket() as reads_nothing, socket.socket() as sends_half:
        where = urlsplit(server.url)
        reads_nothing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        for client in (reads_nothing, sends_half):
            client.connect((where.hostname, where.port))
        reads_nothing.sendall(head.format("/detokenize", len(body)).encode() + body)
        assert reads_nothing.recv(4096).startswith(b"HTTP/1.1 200 ")
        sends_half.sendall(head.format("/v1/completions", 100).encode() + b"{")
        time.sleep(0.2)
        status, said = server.end(signal.SIGTERM)
    assert (status, len(said.splitlines())) == (0, 2), said


def test_a_server_whose_engine_has_died_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as running, httpx.Client(base_url=running.url) as client:
        thread, events = follow(running.url, 2000)

        def fail() -> None:
            raise ValueError("on purpose")

        monkeypatch.setattr(running.engine, "_turn", fail)
        thread.join()
        running.thread.join(20)
        assert not running.thread.is_alive()
        with pytest.raises(httpx.TransportError):
            client.get("/health")
    assert "on purpose" in json.loads(events[-2])["error"]["message"]
    assert "on purpose" in str(running.failure)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command, which must end with status 2 and one sentence."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def run(*arguments: object) -> str:
        status = main([*map(str, arguments)])
        out, error = capsys.readouterr()
        assert (status, out) == (2, "")
        assert error.startswith("error: ")
        assert error.endswith(".\n")
        assert error.count("\n") == 1
        return error

    return run


def test_what_cannot_work_is_refused_in_one_sentence(refused: Callable[..., str], tmp_path: Path) -> None:
    for option, value in (
        ("--decode-concurrency", 0),
        ("--capacity", 0),
        ("--capacity", 10**9),
        ("--queue", 0),
        ("--max-tokens", 0),
        ("--drain", -1),
        ("--drain", "nan"),
        ("--temp", -1),
        ("--top-p", 2),
        ("--api-key-file", tmp_path / "none"),
        ("--host", "no.such.host.invalid"),
        ("--port", 70000),
        ("--model", tmp_path / "none"),
    ):
        refused(option, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in refused("--port", taken.getsockname()[1])


def test_an_address_that_nobody_can_be_told_ends_the_server() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "dbrx_fn.serve", "--port", "0"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("error: standard output can't be written (")


def test_an_empty_key_is_no_open_door(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert KEY_VARIABLE in refused()


def test_an_address_that_others_reach_is_warned_of() -> None:
    with server_process("--host", "0.0.0.0") as server:
        said = server.end(signal.SIGTERM)[1]
    assert "warning: " in said
    with server_process("--host", "0.0.0.0", DBRX_FN_API_KEY="a-key") as server:
        said = server.end(signal.SIGTERM)[1]
    assert "warning: " not in said


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "prometheus_client"])
def test_a_package_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    ended = subprocess.run(
        [sys.executable, "-m", "dbrx_fn.serve", "--model", str(SMALL)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert ended.returncode == 2
    assert ended.stderr == f"error: Serving needs {name}, which isn't installed: pip install 'dbrx-fn[serve]'.\n"
