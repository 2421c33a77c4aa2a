"""`generate --batch`: each line of a file is answered once, whatever it holds, and however often it is killed."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from dbrx_fn import generate
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.serving.batch_lines import LARGEST_LINE, read_batch_input
from dbrx_fn.serving.batch_output import BatchOutput, batch_output
from dbrx_fn.text.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[3]
CONFIG = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=600,
    vocab_size=264,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    initializer_range=0.3,
    dtype="float32",
)
Answers = dict[int, dict[str, Any]]
Batch = Callable[..., Answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "tiny"
    write_random_checkpoint(path, CONFIG, mx.random.key(0))
    return path


def write(file: Path, lines: list[Any]) -> Path:
    """A file of these lines: bytes as they are, others as JSON."""
    file.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return file


def read(file: Path) -> Answers:
    """The answers by their lines' numbers, of which none is there twice."""
    content = file.read_bytes()
    assert content.endswith(b"\n")
    answers = [json.loads(line) for line in content.splitlines()]
    by_line = {answer["line"]: answer for answer in answers}
    assert len(by_line) == len(answers)
    return by_line


def texts(answer: dict[str, Any]) -> list[str]:
    choices = answer["response"]["body"]["choices"]
    return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


@pytest.fixture
def batch(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    """Answers lines, and returns what is in the file then."""

    def run(lines: list[Any], *options: object) -> Answers:
        given, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
        arguments = ["--model", folder, "--batch", given, "--out", out, *options]
        assert generate.main(list(map(str, arguments))) == 0, capsys.readouterr().err
        return read(out)

    return run


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], **more}


def test_answers_are_those_of_single_runs(batch: Batch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = batch(
        [
            {"prompt": "To be", "max_tokens": 9},
            {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": chat("Hi", max_tokens=7)},
            b"\n",
            {"custom_id": "y", "url": "/v1/completions", "body": {"prompt": ["a", "b"], "n": 2, "max_tokens": 3}},
            chat("Hi"),
        ],
        *("--temp", 0, "--max-tokens", 5),
    )

    def alone(*options: object) -> str:
        arguments = ["--model", folder, "--temp", 0, "--json", *options]
        assert generate.main(list(map(str, arguments))) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    capsys.readouterr()
    assert sorted(answers) == [1, 2, 4, 5]
    assert [answers[line]["custom_id"] for line in (1, 2, 4, 5)] == [None, "x", "y", None]
    assert texts(answers[1]) == [alone("-p", "To be", "-m", 9)]
    assert texts(answers[2]) == [alone("-p", "Hi", "--system", "Be brief.", "-m", 7)]
    assert texts(answers[4]) == [alone("-p", "a", "-m", 3)] * 2 + [alone("-p", "b", "-m", 3)] * 2
    assert texts(answers[5]) == [alone("-p", "Hi", "--system", "Be brief.", "-m", 5)]
    for answer in answers.values():
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        assert answer["response"]["body"]["model"] == "tiny"


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        (b"garbage\n", 400, "can't be read as JSON"),
        (b"\xff\n", 400, "byte 0 is not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}\n', 400, "'prompt' is there twice"),
        (b'{"prompt": "a", "temperature": NaN}\n', 400, "isn't finite"),
        (b"[" * 100_000 + b"\n", 400, "nested too deeply"),
        (b'{"prompt": "' + b"x" * LARGEST_LINE + b'"}\n', 400, f"more than {LARGEST_LINE} bytes"),
        ([1], 400, "[1] where a JSON object"),
        ({}, 400, "either a prompt, or messages"),
        ({"prompt": "a", "messages": []}, 400, "either a prompt, or messages"),
        ({"prompt": "a", "colour": 1}, 400, "colour"),
        ({"prompt": "a", "stream": True}, 400, "stream is for answers over a network"),
        ({"prompt": "a", "model": "gpt-4o"}, 404, "model is 'gpt-4o' where 'tiny'"),
        ({"prompt": "a" * 700}, 400, "600"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, 400, "999"),
        ({"body": {"prompt": "a"}, "url": "/v1/completions"}, 400, "custom_id is missing"),
        ({"custom_id": 7, "url": "/v1/completions", "body": {}}, 400, "custom_id is 7"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, 400, "url is '/v1/embeddings'"),
        ({"custom_id": "a", "url": "/v1/completions", "body": 3}, 400, "body is 3"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}, "priority": 1}, 400, "priority"),
        ({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}, 400, "method is 'GET'"),
    ],
)
def test_a_bad_line_fails_alone(line: Any, status: int, words: str, batch: Batch) -> None:
    answers = batch([{"prompt": "a", "max_tokens": 1}, line, {"prompt": "b", "max_tokens": 1}])
    assert [answers[number]["response"]["status_code"] for number in (1, 2, 3)] == [200, status, 200]
    assert words in answers[2]["error"]["message"]
    assert answers[2]["response"]["body"]["error"]["message"] == answers[2]["error"]["message"]


def test_options_are_what_lines_leave_open(batch: Batch, folder: Path) -> None:
    [a] = read_tokenizer(folder).encode("a")
    answers = batch(
        [{"prompt": "x"}, {"prompt": "x", "max_tokens": 5}, {"prompt": "x", "stop": "aa"}],
        *("--logit-bias", f"{a}:inf", "--max-tokens", 3),
    )
    assert [texts(answers[line]) for line in (1, 2, 3)] == [["aaa"], ["aaaaa"], [""]]


def test_a_seed_makes_a_batch_repeat_and_its_lines_differ(batch: Batch, tmp_path: Path) -> None:
    lines = [{"prompt": "x", "max_tokens": 12}] * 4 + [{"prompt": "x", "max_tokens": 12, "seed": 7}] * 2
    said = []
    for seed in (1, 1, 2):
        said.append([texts(answer) for _, answer in sorted(batch(lines, "--temp", 1, "--seed", seed).items())])
        (tmp_path / "out.jsonl").unlink()
    assert said[0] == said[1]
    assert said[0][:4] != said[2][:4]
    assert len({each for [each] in said[0][:4]}) > 1
    assert said[0][4] == said[0][5] == said[2][4]


def test_answers_can_have_a_structure(batch: Batch) -> None:
    pytest.importorskip("llguidance")
    answers = batch([chat("x", structured_outputs={"regex": "[ab]{4}"}, max_tokens=9)])
    assert re.fullmatch("[ab]{4}", texts(answers[1])[0])


# What is refused at the start


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must end with status 2 and one sentence with these words."""

    def run(words: str, *options: object) -> str:
        capsys.readouterr()
        assert generate.main(["--model", str(folder), *map(str, options)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


def test_a_custom_id_that_is_there_twice_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    lines = [{"custom_id": str(number), "prompt": "x"} for number in range(50)]
    given = write(tmp_path / "in.jsonl", [*lines, b"\n", {"custom_id": "17", "prompt": "y"}])
    refused("the same custom_id in lines 18 and 52", "--batch", given, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_other_answers_is_refused_and_stays(
    batch: Batch, refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch([{"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 1}])
    one_line = out.read_bytes().splitlines(keepends=True)[0]
    out.write_bytes(one_line)
    other = write(tmp_path / "other.jsonl", [{"prompt": "a"}])
    refused("holds answers to another file", "--batch", other, "--out", out)
    refused("made with other options", "--batch", given, "--out", out, "--temp", 1)
    refused("made with other options", "--batch", given, "--out", out, "--seed", 1)
    weights = folder.parent / "retrained" / "tiny"
    write_random_checkpoint(weights, CONFIG, mx.random.key(1))
    refused("holds answers of other weights", "--batch", given, "--out", out, "--model", weights)
    assert out.read_bytes() == one_line
    for precious in (b"My thesis", b"My thesis\n", b'{"id":"batch_req_0123', b"\n", b"\0"):
        out.write_bytes(precious)
        refused("name another file for --out", "--batch", given, "--out", out)
        assert out.read_bytes() == precious
    refused("name another file for --out", "--batch", given, "--out", given)
    refused("is not a regular file", "--batch", given, "--out", "/dev/null")
    refused("can't be written", "--batch", given, "--out", tmp_path)


def test_a_file_that_is_being_written_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    with batch_output(out, "0" * 64, 1, "0" * 64):
        refused("is being written by another process", "--batch", given, "--out", out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "x.jsonl"], "--batch needs a file for the answers"),
        (["--prompt", "x", "--out", "y"], "--out is the file of a batch's answers"),
        (["--batch", "x.jsonl", "--out", "y", "--chat"], "--chat has no meaning with --batch"),
        (["--batch", "x.jsonl", "--out", "y", "--system", "z"], "--system has no meaning with --batch"),
        (["--batch", "x.jsonl", "--out", "y", "--json"], "--json has no meaning with --batch"),
        (["--batch", "x.jsonl", "--out", "y", "--regex", "a"], "--regex has no meaning with --batch"),
        (["--batch", "/nowhere/x", "--out", "y"], "/nowhere/x can't be read"),
        (["--batch", "/dev/null", "--out", "y"], "/dev/null can't be read (it is not a regular file)"),
        (["--batch", "x.jsonl", "--out", "y", "--seed", "-1"], "The seed is -1"),
    ],
)
def test_options_that_cannot_work(options: list[str], words: str, refused: Callable[..., str]) -> None:
    refused(words, *options)


# How it is stopped


def start(folder: Path, given: Path, out: Path, **more: Any) -> subprocess.Popen[str]:
    arguments = ["--model", folder, "--batch", given, "--out", out, "--max-tokens", 6]
    return subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.generate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **more,
    )


def wait_for_lines(out: Path, count: int, running: subprocess.Popen[str]) -> None:
    while running.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


def test_killed_at_any_moment_it_loses_nothing_and_does_nothing_twice(folder: Path, tmp_path: Path) -> None:
    lines = [{"custom_id": f"n{number}", "prompt": "x" * (number % 40 + 1)} for number in range(1, 501)]
    given, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    draw = random.Random(3)
    before = b""
    for attempt in range(3):
        running = start(folder, given, out)
        wait_for_lines(out, before.count(b"\n") + draw.randrange(1, 60), running)
        time.sleep(draw.uniform(0, 0.01))
        running.kill()
        running.communicate()
        after = out.read_bytes()
        assert after.startswith(before)
        # As if killed in the midst of a write.
        cut = draw.randrange(1, 400) if attempt % 2 else 0
        before = after[: len(after) - cut]
        out.write_bytes(before)
        before = before[: before.rfind(b"\n") + 1]
    ended = start(folder, given, out)
    _, err = ended.communicate(timeout=200)
    assert ended.returncode == 0, err
    assert out.read_bytes().startswith(before)
    answers = read(out)
    assert sorted(answers) == list(range(1, 501))
    assert all(answer["custom_id"] == f"n{line}" and answer["error"] is None for line, answer in answers.items())


def test_ctrl_c_says_how_far_it_came(folder: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [{"prompt": "x"}] * 20_000)
    out = tmp_path / "out.jsonl"
    running = start(folder, given, out)
    wait_for_lines(out, 3, running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=100)
    assert running.returncode == 130
    found = re.fullmatch(
        r"interrupted: .* has the answers to (\d+) of 20000 lines, and the same command continues\.\n", err
    )
    assert found, err
    assert len(read(out)) == int(found[1])


def test_a_full_disk_is_told_and_the_next_run_goes_on(folder: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [{"prompt": "x"}] * 40)
    out = tmp_path / "out.jsonl"

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    running = start(folder, given, out, preexec_fn=small_files)
    _, err = running.communicate(timeout=100)
    assert running.returncode == 2
    assert err.startswith(f"error: {out} can't be written (File too large): free some room")
    assert out.stat().st_size == 5000
    ended = start(folder, given, out)
    assert ended.communicate(timeout=100)
    assert ended.returncode == 0
    assert len(read(out)) == 40


@settings(max_examples=60)
@hypothesis.given(numbers=st.lists(st.integers(1, 30), unique=True, max_size=9), cut=st.integers(0, 400))
def test_a_file_cut_anywhere_holds_what_was_whole(numbers: list[int], cut: int, tmp_path_factory: Any) -> None:
    out = tmp_path_factory.mktemp("cut") / "out.jsonl"

    def opened() -> contextlib.AbstractContextManager[BatchOutput]:
        return batch_output(out, "a" * 64, 30, "b" * 64)

    with opened() as output:
        output.begin("c" * 64)
        for number in numbers:
            output.write(number, {"custom_id": "é" * number})
    content = out.read_bytes()
    kept = content[: max(0, len(content) - cut)]
    out.write_bytes(kept)
    whole = kept.count(b"\n")
    with opened() as output:
        assert [number for number in range(31) if output.has(number)] == sorted(numbers[:whole])
        output.begin("c" * 64)
        for number in numbers[whole:]:
            output.write(number, {"custom_id": "é" * number})
    assert out.read_bytes() == content


def test_a_file_of_many_lines_takes_little_memory(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    with given.open("w") as file:
        for number in range(40_000):
            file.write(f'{{"custom_id": "{number}", "prompt": "{"x" * 200}"}}\n')
    looked = "; ".join(
        (
            "import resource, sys",
            "from pathlib import Path",
            "from dbrx_fn.serving.batch_lines import read_batch_input",
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
            "print(read_batch_input(Path(sys.argv[1])).count)",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", looked, str(given)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    count, grown = map(int, done.stdout.split())
    assert count == 40_000
    # Kilobytes, but bytes on a Mac; the file has 9 MB.
    assert grown < 6_000 * (1024 if sys.platform == "darwin" else 1)
    assert read_batch_input(given).last == 40_000
