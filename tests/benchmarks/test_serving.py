"""`python -m dbrx_fn.bench serving`: it tells what a server's clients saw."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from dbrx_fn.bench import main
from dbrx_fn.benchmarks.completions_client import Answer
from dbrx_fn.benchmarks.load import Limits, Load, Workload
from dbrx_fn.benchmarks.serving import Percentiles, serving_figure
from tests.support.openai_server import Script, scripted_server

ROOT = Path(__file__).parents[2]
SMALL_SERVER = ["--decode-concurrency", "2", "--capacity", "256"]


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["serving", *options, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def one_figure(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    (figure,) = report(capsys, *options)["figures"]
    assert isinstance(figure, dict)
    return figure


def test_percentiles_and_goodput_are_those_of_the_answers() -> None:
    # The request with this number takes as many hundredths of a second to its first text, and between two.
    answers = [
        Answer(due=0, sent=0.25, ended=1 + 3 * n / 100, times=(n / 100, 2 * n / 100, 3 * n / 100), made_tokens=5)
        for n in range(101)
    ]
    failed = Answer(due=0, sent=0, ended=10, times=(5.0,), made_tokens=1, failure="status 429: full")
    figure = serving_figure(Load(rate=2.0), [*answers, failed], Limits(first=0.5, between=0.205))
    for percentiles in (figure.first_token, figure.between_tokens):
        assert percentiles is not None
        assert astuple(percentiles) == pytest.approx((0.5, 0.9, 0.99), abs=1e-9)
    assert (figure.requests, figure.failed, figure.failures) == (102, 1, {"status 429: full": 1})
    assert (figure.seconds, figure.made_tokens, figure.tokens_per_second) == (10, 505, 50.5)
    assert figure.good == 21
    assert figure.good_per_second == figure.good / 10
    assert figure.in_flight == pytest.approx((sum(0.75 + 3 * n / 100 for n in range(101)) + 10) / 10)
    assert figure.latest == 0.25


def test_the_first_token_of_an_answer_without_text_is_its_end() -> None:
    figure = serving_figure(Load(clients=1), [Answer(due=1, sent=1, ended=3, times=())], Limits(5, 5))
    assert figure.first_token == Percentiles(2, 2, 2)
    assert figure.between_tokens is None
    assert figure.good == 1


def test_a_seed_makes_the_load() -> None:
    workload = Workload(requests=4000, prompt=100, answer=30, spread=0.5, seed=1)
    arrivals = workload.arrivals(8.0)
    assert arrivals == sorted(arrivals) == workload.arrivals(8.0)
    assert arrivals[-1] == pytest.approx(4000 / 8, rel=0.1)
    # A Poisson process has many short gaps: their median is ln 2 of their mean.
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert median(gaps) == pytest.approx(0.693 / 8, rel=0.1)
    prompts = workload.prompts()
    assert median(prompts) == pytest.approx(100, rel=0.05)
    assert max(prompts) == 400
    assert prompts != workload.answers()
    other = Workload(4000, 100, 30, 0.5, seed=2)
    assert (other.prompts(), other.arrivals(8.0)) != (prompts, arrivals)
    assert set(Workload(9, 7, 30, 0.0, 0).prompts()) == {7}


def test_two_loads_have_other_texts() -> None:
    workload = Workload(1, 1, 1, 0, 0)
    first, second = ([word for word, _ in zip(workload.words(number), range(50), strict=False)] for number in (1, 2))
    assert first != second


def test_times_are_those_of_a_server_with_known_delays(capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = Script(first=0.1, between=0.02, texts=4), Script(first=1.5, between=0.02, texts=4)
    with scripted_server(*[quick] * 9, slow) as server:
        figure = one_figure(capsys, "--url", server.url, "--clients", "5", "--requests", "10", "--spread", "0")
    # The machine may be slow, and never too quick.
    assert 0.1 <= figure["first_token"]["p50"] < 1.2
    assert figure["first_token"]["p99"] >= 1.3
    assert figure["between_tokens"]["p50"] >= 0.015
    assert figure["seconds"] >= 1.5 + 3 * 0.02
    assert figure["good"] <= 9
    assert (figure["made_tokens"], figure["failures"]) == (10 * 8, {})
    assert figure["tokens_per_second"] == pytest.approx(80 / figure["seconds"])


def test_clients_wait_for_their_answers_and_arrivals_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script(first=0.2)) as server:
        one_figure(capsys, "--url", server.url, "--clients", "2", "--requests", "6")
        assert server.most_running == 2
        figure = one_figure(capsys, "--url", server.url, "--rate", "12", "--requests", "12")
        assert server.most_running > 2
    due = Workload(12, 128, 64, 0.5, 0).arrivals(12.0)
    assert figure["seconds"] >= due[-1] - due[0] + 0.2


def test_requests_are_as_long_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script()) as server:
        found = report(
            capsys, "--url", server.url + "/v1/", "--model", "m", "--clients", "1", "--requests", "5", "--prompt", "60"
        )
    # This server counts two tokens a word.
    assert found["server"]["words_per_token"] == 0.5
    workload = Workload(5, 60, 64, 0.5, 0)
    asked = server.fields[1:]
    assert [2 * len(fields["prompt"].split()) for fields in asked] == pytest.approx(workload.prompts(), abs=2)
    assert [fields["max_tokens"] for fields in asked] == workload.answers()
    assert {(fields["model"], fields["temperature"], fields["ignore_eos"]) for fields in asked} == {("m", 0.0, True)}
    assert len({fields["prompt"] for fields in asked}) == 5


def test_failures_are_counted_by_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [Script(), Script(end="cut"), Script(end="error"), Script(end="status")]
    with scripted_server(*scripts) as server:
        assert main(["serving", "--url", server.url, "--clients", "1", "--requests", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 client +8 +6 ", out)
    for reason in ("the stream ended early", "an error in the stream: The model failed", "status 429: The queue is"):
        assert f"failed: 1 client: 2 x {reason}" in out


@pytest.mark.parametrize("refused", [("ignore_eos",), ("ignore_eos", "stream_options")])
def test_fields_that_a_server_refuses_are_left_out(
    refused: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(Script(), refused=refused) as server:
        found = report(capsys, "--url", server.url, "--clients", "1", "--requests", "2")
    assert not found["server"]["options"].keys() & set(refused)
    (figure,) = found["figures"]
    # Tokens are counted by their texts where the server tells no number.
    told = "stream_options" not in refused
    assert figure["made_tokens"] == (12 if told else 6)
    assert (figure["prompt_tokens"] is not None) == told


@pytest.mark.parametrize("event", [b"5", b"{", b'{"choices": 5}', b'{"choices": [5]}', b'{"usage": [1]}', b"[" * 10**5])
def test_events_that_are_no_completions_are_a_failure(event: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script(raw=event)) as server:
        figure = one_figure(capsys, "--url", server.url, "--clients", "1", "--requests", "1")
    assert sum(figure["failures"].values()) == 1


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DBRX_FN_API_KEY", "sesame")
    with scripted_server(Script()) as server:
        one_figure(capsys, "--url", server.url, "--clients", "1", "--requests", "1")
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sesame"}


def test_rows_and_queue_are_those_of_the_server_s_figures(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['dbrx_fn_requests{state="waiting"} 3.0', 'dbrx_fn_requests{state="decoding"} 6.0', "dbrx_fn_rows 8.0", ""]
    with scripted_server(Script(first=0.3), figures="\n".join(lines).encode()) as server:
        figure = one_figure(capsys, "--url", server.url, "--clients", "1", "--requests", "1")
    assert (figure["waiting"], figure["most_waiting"], figure["rows_filled"]) == (3, 3, 0.75)


def test_our_own_server_is_started_measured_drawn_and_ended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "load.svg"
    short = ["--requests", "4", "--prompt", "20", "--tokens", "8", "--picture", str(picture)]
    found = report(capsys, "--rate", "4", "8", *SMALL_SERVER, *short)
    assert found["server"]["name"] == found["server"]["model"] == "small"
    answers = Workload(4, 20, 8, 0.5, 0).answers()
    for figure, rate in zip(found["figures"], (4.0, 8.0), strict=True):
        assert figure["load"] == {"rate": rate, "clients": None}
        assert (figure["requests"], figure["failures"]) == (4, {})
        assert figure["made_tokens"] == sum(answers)
        assert 0 < figure["first_token"]["p50"] <= figure["first_token"]["p99"]
        assert figure["prompt_tokens"] == pytest.approx(sum(Workload(4, 20, 8, 0.5, 0).prompts()), rel=0.3)
        assert figure["waiting"] is not None
    words = " ".join(re.findall(r"<!-- (.*?) -->", picture.read_text()))
    for label in ("requests/s", "time to first token, ms", "99th percentile", "tokens/s in all"):
        assert label in words


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the child is found in /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_too(number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "dbrx_fn.bench", "serving", "--rate", "1", "--requests", "500", *SMALL_SERVER]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while not (found := children.read_text().split()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (status, "", "")
    for child in found:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "localhost:8080"], "--url is 'localhost:8080' where a server's address is expected, such as http"),
        (["--url", "ftp://localhost"], "where a server's address is expected"),
        (["--url", "http://a:99999/v1"], "where a server's address is expected"),
        (["--url", "http://a/ b"], "where a server's address is expected"),
        (["--url", "http://127.0.0.1:{closed}"], "answers no completion"),
        (["--url", "http://a..b"], "a part that is empty or too long"),
        (["--url", "http://a", "--exact"], "leave them out with --url"),
        (["--rate", "0"], "--rate is 0 where it must be a number above 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--clients", "4", "0"], "--clients is 0 where it must be at least 1"),
        (["--requests", "0"], "--requests is 0"),
        (["--spread", "9"], "--spread is 9 where it must be from 0 to 3"),
        (["--seed", "-1"], "--seed is -1"),
        (["--ttft", "0"], "--ttft is 0"),
        (["--temp", "3"], "--temp is 3"),
        (["--picture", "load.pdf"], "end it with .png or .svg"),
        (["--model", "nowhere"], "The server doesn't start: nowhere doesn't exist"),
    ],
)
def test_what_cannot_be_measured(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        assert main(["serving", *(option.format(closed=closed) for option in options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_without_h11_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("dbrx_fn.benchmarks.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "h11", None)
    assert main(["serving"]) == 2
    assert "pip install 'dbrx-fn[serve]'" in capsys.readouterr().err
