"""`python -m dbrx_fn.chat` as a user meets it: typed at on a terminal, fed by a pipe, interrupted."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn import chat, generate
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.text.chat import render_chat
from dbrx_fn.text.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = Config(
    d_model=16, n_heads=2, n_layers=1, vocab_size=264, max_seq_len=32768, ffn=FFNConfig(8, 2, 1), dtype="float32"
)
Talk = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "checkpoint"
    write_random_checkpoint(path, CONFIG, mx.random.key(0))
    return path


@pytest.fixture
def status_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with these bytes for standard input."""

    def run(content: bytes, *options: object) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return chat.main([str(option) for option in options])

    return run


@pytest.fixture
def talk(status_of: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Talk:
    """Runs the command, which must end well; returns what it printed on standard output and error."""

    def run(content: str, *options: object) -> tuple[str, str]:
        status = status_of(content.encode(), *options)
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return run


def say(folder: Path, text: str) -> list[str]:
    """Options by which the model says nothing but this byte, a token each."""
    [token] = {token for token in read_tokenizer(folder).encode(text)}
    return ["--model", str(folder), "--logit-bias", f"{token}:inf"]


def new_tokens(err: str) -> list[tuple[int, int]]:
    """Of each answer, the tokens before it, and how many of them were new."""
    found = re.findall(r"prompt of (\d+) tokens, (\d+) of them new", err)
    return [(int(prompt), int(new)) for prompt, new in found]


# From a pipe


def test_answers_are_those_that_generate_gives_to_the_same_conversation(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.json"
    turns = ["Who goes there?", "What say you?", "And the king?"]
    out, err = talk("\n".join([*turns, f"/save {file}", ""]), "--max-tokens", 16, "--temp", 0)
    messages = json.loads(file.read_text())["messages"]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert out == "".join(f"{text}\n" for text in said)
    assert [message["content"] for message in messages if message["role"] == "user"] == turns
    form = read_tokenizer(SMALL).chat_format
    for turn, text in enumerate(said):
        prompt = ["--prompt", render_chat(messages[: 2 * turn + 1], form)] if turn else ["--prompt", turns[0], "--chat"]
        assert generate.main([*prompt, "--max-tokens", "16", "--temp", "0", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert text == alone["text"]
        assert new_tokens(err)[turn][0] == alone["prompt_tokens"]
    assert all(new < 20 for _, new in new_tokens(err)[1:])
    assert new_tokens(err)[-1][0] > 60


def test_nothing_but_answers_is_on_standard_output(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "dbrx_fn.chat", *say(folder, "a"), "--max-tokens", "3"],
        input="Hi\n\n/help\nagain\r\n",
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert (ended.returncode, ended.stdout) == (0, "aaa\naaa\n")
    assert "/undo" in ended.stderr
    assert len(new_tokens(ended.stderr)) == 2
    assert "\x1b" not in ended.stderr


def test_commands_change_the_conversation(talk: Talk, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    lines = [
        "one",
        "/undo",
        "/system Be brief.",
        'two\\\nlines"""',
        f"/save --cache {file}",
        "/reset",
        '"""/three',
        '  lines"""',
        "/undo",
        f"/load {file}",
        "four",
        f"/save {file}",
        "/quit",
        "never read",
    ]
    _, err = talk("\n".join(lines), *say(folder, "a"), "--max-tokens", 2)
    messages = [(message["role"], message["content"]) for message in json.loads(file.read_text())["messages"]]
    assert messages == [
        ("system", "Be brief."),
        ("user", 'two\nlines"""'),
        ("assistant", "aa"),
        ("user", "four"),
        ("assistant", "aa"),
    ]
    assert len(new_tokens(err)) == 4
    assert new_tokens(err)[3][1] < 40
    assert "isn't used" not in err
    [(prompt, new)] = new_tokens(talk(f"/load {file}\nfive\n", *say(folder, "a"), "--max-tokens", 1)[1])
    assert prompt == new


def test_a_saved_cache_serves_the_next_process(talk: Talk, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    talk(f"one\n/save --cache {file}\n", *say(folder, "a"), "--max-tokens", 40)
    [(prompt, new)] = new_tokens(talk(f"/load {file}\ntwo\n", *say(folder, "b"), "--max-tokens", 1)[1])
    assert prompt > 1000
    assert new < 40


def test_a_seed_makes_a_conversation_repeat(talk: Talk, folder: Path) -> None:
    def drawn(seed: int) -> str:
        return talk("Hi\nHi\n", "--model", folder, "--temp", 1, "--max-tokens", 20, "--seed", seed)[0]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"/nonsense\nHi\n", [], "'/nonsense' is not a command: /help lists them"),
        (b"/undo twice\n", [], "/undo takes nothing behind it"),
        (b"/save\n", [], "/save needs a file's name"),
        (b"/load /nowhere/chat.json\n", [], "/nowhere/chat.json is not a saved conversation (No such file"),
        (b"/save /nowhere/chat.json\n", [], "/nowhere/chat.json can't be written"),
        (b"a\xff\n", [], "isn't UTF-8"),
        (b"x" * 40_000, [], "the model's context holds 32768"),
        (b"", ["--max-tokens", "0"], "max_tokens is 0"),
        (b"", ["--seed", "-1"], "The seed is -1"),
        (b"", ["--model", "~nobody-of-this-name/x"], "can't be a folder's name"),
        (b"", ["--logit-bias", "junk"], "--logit-bias is 'junk'"),
    ],
)
def test_what_cannot_be_done_ends_a_pipe_with_one_sentence(
    content: bytes,
    options: list[str],
    words: str,
    folder: Path,
    status_of: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = status_of(content, *say(folder, "a"), "--max-tokens", 2, *options)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_pipe_in_the_midst_of_an_answer(number: int, status: int, folder: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.chat", *say(folder, "a"), "--max-tokens", "30000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write(b"Hi\n")
    running.stdin.flush()
    assert running.stdout.read(1) == b"a"
    running.send_signal(number)
    out, err = running.communicate(timeout=100)
    assert running.returncode == status, err.decode()
    assert re.fullmatch(rb"a*\n", out)
    assert b"; stopped\n" in err
    assert b"Traceback" not in err


# On a terminal


class Terminal:
    """The command on a terminal, and what that shows."""

    def __init__(self, *options: str) -> None:
        pty = pytest.importorskip("pty", reason="this system has no terminals of that kind")
        self._ours, theirs = pty.openpty()
        self._shown = b""
        self._read_until = 0
        self.running = subprocess.Popen(
            [sys.executable, "-m", "dbrx_fn.chat", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            # So that Ctrl-C reaches it as from a keyboard.
            preexec_fn=_own_terminal,
            env={"PATH": os.environ["PATH"], "TERM": "xterm"},
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        # What is typed between a prompt and the reading is the terminal's, and Ctrl-C throws it away.
        time.sleep(0.2)
        os.write(self._ours, text.encode())

    def wait_for(self, words: str) -> str:
        """What is shown from the last words that were waited for to these."""
        deadline = time.monotonic() + 60
        while (found := self._shown.find(words.encode(), self._read_until)) < 0:
            assert time.monotonic() < deadline, self._shown[-2000:]
            if not select.select([self._ours], [], [], 1)[0]:
                continue
            try:
                read = os.read(self._ours, 1 << 16)
            except OSError:
                read = b""
            assert read, f"ended before {words!r}: {self._shown[-2000:]!r}"
            self._shown += read
        start, self._read_until = self._read_until, found + len(words)
        return self._shown[start : self._read_until].decode(errors="replace").replace("\r\n", "\n")

    def end(self) -> int:
        """Its exit status, once it has ended."""
        try:
            return self.running.wait(timeout=30)
        finally:
            os.close(self._ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts the command on a terminal, where it says one byte over and over."""
    started: list[Terminal] = []

    def start(text: str, *options: str) -> Terminal:
        started.append(Terminal(*say(folder, text), *options))
        started[-1].wait_for(">>> ")
        return started[-1]

    yield start
    for one in started:
        one.running.kill()
        one.running.wait()


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    here, file = terminal("a", "--max-tokens", "30000"), tmp_path / "chat.json"
    for turn in range(2):
        here.type(f"Turn {turn}\r")
        here.wait_for("aaaaaaaa")
        here.type("\x03")
        assert re.search(r"\^Ca*\n\x1b\[2m\d+ tokens at [\d.]+ tokens/s; prompt", here.wait_for("; stopped\x1b[22m"))
        here.wait_for(">>> ")
    here.type("half a mess\x03")
    here.wait_for("(Ctrl-D or /quit ends)")
    here.wait_for(">>> ")
    here.type("\x03")
    here.wait_for(">>> ")
    here.type(f"/save {file}\r")
    here.wait_for("The conversation is in")
    here.wait_for(">>> ")
    here.type("\x04")
    assert here.end() == 0
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Turn 0", "Turn 1"]
    assert all(re.fullmatch("a{8,}", message["content"]) for message in messages[1::2])
    assert len(messages) == 4


def test_an_error_on_a_terminal_ends_nothing(terminal: Callable[..., Terminal]) -> None:
    here = terminal("a", "--max-tokens", "2")
    here.type("/load /nowhere\r")
    here.wait_for("error: /nowhere is not a saved conversation")
    here.type('"""two\r')
    here.wait_for("... ")
    here.type('lines"""\r')
    here.wait_for("aa\r\n")
    here.wait_for(">>> ")
    here.type("/bye\r")
    assert here.end() == 0


def test_what_was_typed_can_be_had_again(terminal: Callable[..., Terminal]) -> None:
    pytest.importorskip("readline", reason="this Python has no line editing")
    here = terminal("a", "--max-tokens", "2")
    here.type("first mesage\x1b[D\x1b[D\x1b[D\x1b[Ds\r")
    here.wait_for("prompt of ")
    here.wait_for(">>> ")
    here.type("\x1b[A")
    here.wait_for("first message")
    here.type("\r")
    here.wait_for("prompt of ")
    here.wait_for(">>> ")
    here.type("\x04")
    assert here.end() == 0


def test_nothing_that_a_model_says_steers_the_terminal(terminal: Callable[..., Terminal]) -> None:
    here = terminal("\x1b", "--max-tokens", "2")
    here.type("Hi\r")
    assert "\\x1b\\x1b\n" in here.wait_for("prompt of ")
    here.wait_for(">>> ")
    here.type("/quit\r")
    assert here.end() == 0
