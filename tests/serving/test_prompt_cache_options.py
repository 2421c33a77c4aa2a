"""What a server keeps of prompts, with real processes."""

import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.serve import main
from tests.support.server_process import ServerProcess, server_process

PROMPT = "The keys and values of a beginning that two requests share are computed once. " * 20


def completed(server: ServerProcess) -> tuple[str, int]:
    """A completion's text, and how many tokens of the prompt were known."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_server_that_starts_again_knows_what_the_one_before_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--prompt-cache-folder", str(tmp_path / "kept")]
    with server_process(*folder, "--prompt-cache-bytes", "0") as server:
        text, known = completed(server)
        assert known == 0
        assert main(["--port", "0", *folder]) == 2
        assert "kept keeps the prefixes of another process" in capsys.readouterr().err
        assert server.end(signal.SIGTERM)[0] == 0
    with server_process(*folder, "--prompt-cache-disk", "1G") as server:
        again, known = completed(server)
        assert known >= 128
        assert again == text
        # As if the machine failed: what is on disk stays right.
        server.end(signal.SIGKILL)
    with server_process(*folder) as server:
        assert completed(server) == (text, known)


def test_a_server_keeps_prompts_in_memory_unless_told_otherwise() -> None:
    with server_process() as server:
        text, _ = completed(server)
        again, known = completed(server)
        assert known >= 128
        assert again == text
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
            figures = response.read().decode()
    assert 'dbrx_fn_prefix_lookups_total{result="hit"} 1.0' in figures
    assert 'dbrx_fn_prefix_lookups_total{result="miss"} 1.0' in figures
    assert 'dbrx_fn_prefix_bytes{place="disk"} 0.0' in figures


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-cache-bytes", "1.5G"], "'1.5G' is no size: give a number of bytes, or such as 500M or 4G"),
        (["--prompt-cache-disk", "1G"], "--prompt-cache-disk is the room in a folder: name it with"),
        (["--prompt-cache-folder", "/dev/null"], "/dev/null can't be written"),
    ],
)
def test_options_that_can_not_work_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = main(options)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert said in capsys.readouterr().err
