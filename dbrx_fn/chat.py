"""`python -m dbrx_fn.chat`: a chat with a model in the terminal."""

import argparse
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import mlx.core as mx

from dbrx_fn.checkpoints.hub import SMALL, checkpoint_path
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.cli.adapter_option import add_adapter_option
from dbrx_fn.cli.chat_commands import QUIT, obey
from dbrx_fn.cli.command import Parser, Terminated, program, run
from dbrx_fn.cli.generation_options import (
    add_generation_options,
    check_generation_options,
    chosen_sampling,
    chosen_speculation,
    chosen_stop_tokens,
)
from dbrx_fn.cli.message_reader import Message, MessageReader
from dbrx_fn.cli.stop_signals import deferred_stop
from dbrx_fn.cli.terminal import byte_progress, dimmed, plain, print_message, show_waiting, visible
from dbrx_fn.errors import DbrxError
from dbrx_fn.generation.chat_session import ChatSession
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.generation.sampling import Sampling, random_key
from dbrx_fn.generation.speculation import Speculation
from dbrx_fn.generation.stream import warm_up
from dbrx_fn.model.shard import own_shard
from dbrx_fn.runtime.device import backend
from dbrx_fn.runtime.group import group
from dbrx_fn.serving.fingerprint import weights_fingerprint

_MOST_TOKENS = 1000
"""The number of tokens of an answer if neither the options nor the checkpoint give one."""

_FIRST_PROMPT = 64
"""Prompt length in tokens that is compiled for before the first turn."""


@dataclass(frozen=True)
class Settings:
    """How answers are generated; as in `stream_text`."""

    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    chunk_size: int
    speculation: Speculation | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        _run,
        parser(),
        arguments,
        smaller="take a shorter conversation, a smaller --prefill-step-size, or quantize the model (python -m"
        " dbrx_fn.convert)",
        together=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command's options. Those that mlx-lm has too have its names."""
    options = Parser(
        prog=program("chat"),
        description="Talk with a DBRX model. Each turn computes only what is new in the conversation. /help lists what"
        " can be entered beside messages.",
        epilog="Standard output is the answers and nothing else, but for the prompts on a terminal. From a pipe, each"
        " line is a message; the first one that can't be answered ends the command. Exit status: 0; 2 after an error;"
        " 130 after Ctrl-C, which on a terminal only stops an answer.",
    )
    add = options.add_argument
    add(
        "--model",
        default=str(SMALL),
        help="a checkpoint's folder, a GGUF file, or a Hugging Face repository as"
        " owner/name (default: the small model of this package)",
    )
    add_adapter_option(options)
    add("--system", "--system-prompt", help="system prompt instead of the model's default")
    add_generation_options(options, _MOST_TOKENS)
    return options


def _run(options: argparse.Namespace) -> None:
    check_generation_options(options)
    key = random_key(group().share(secrets.randbits(32) if options.seed is None else options.seed))
    path = checkpoint_path(options.model)
    with tokenizer_files(path) as files:
        defaults, tokenizer = read_generation_config(files.folder), files.read()
    settings = Settings(
        options.max_tokens or defaults.max_tokens or _MOST_TOKENS,
        chosen_sampling(options, defaults.sampling),
        chosen_stop_tokens(options, tokenizer),
        tuple(options.stop) or defaults.stop_strings,
        options.prefill_step_size,
        chosen_speculation(options),
    )
    with byte_progress("loading") as progress:
        dtype = group().share(options.dtype or computing_dtype(path))
        params, config = load(
            path, dtype=dtype, progress=progress, shard=own_shard(), adapter_path=options.adapter_path
        )
    if backend() != "cpu":
        with show_waiting("compiling, which takes longest the first time"):
            warm_up(
                params,
                config,
                _FIRST_PROMPT,
                max_tokens=settings.max_tokens,
                sampling=settings.sampling,
                chunk_size=settings.chunk_size,
                speculation=settings.speculation,
            )
    reader = MessageReader()
    reader.on_terminal = group().share(reader.on_terminal)
    if reader.on_terminal:
        _tell(f"{options.model}: /help lists the commands, Ctrl-D ends.")
    with _ctrl_c_raises(reader.on_terminal):
        _talk(ChatSession(params, config, tokenizer, options.system), settings, key, reader)


def _talk(session: ChatSession, settings: Settings, key: mx.array, reader: MessageReader) -> None:
    """Answers messages until there are no more. After an error or Ctrl-C it goes on only on a terminal."""

    def weights() -> str:
        return weights_fingerprint(session.params, session.config)

    while True:
        try:
            message = _next_message(reader)
            if message is None or (message.is_command and message.text.strip() in QUIT):
                return
            if message.is_command:
                if message.text.startswith(("/save", "/load")):
                    group().refuse_others(message.text.split()[0])
                _tell(obey(message.text.strip(), session, weights))
            elif message.text.strip():
                key, own = mx.random.split(key)
                _answer(session, message.text, settings, own, stops_only=reader.on_terminal)
        except DbrxError as error:
            if not reader.on_terminal:
                raise
            print_message(f"error: {error}")
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not reader.on_terminal:
                raise
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr, flush=True)


def _next_message(reader: MessageReader) -> Message | None:
    """The user's next message, in every process."""
    message = group().share(reader.read() if group().leads else None)
    return None if message is None else Message(*message)


def _answer(session: ChatSession, text: str, settings: Settings, key: mx.array, *, stops_only: bool) -> None:
    """Prints an answer as it is generated.

    Args:
        stops_only: whether Ctrl-C does no more than stop the answer.
    """
    terminal = sys.stdout.isatty()
    times: list[float] = []
    reason: str | None = "stopped"
    with deferred_stop(lambda: None) as stop, closing(session.answer(text, **vars(settings), key=key)) as pieces:
        for piece in pieces:
            times.append(time.perf_counter())
            print(visible(piece.text) if terminal else piece.text, end="", flush=True)
            reason = "stopped" if piece.finish_reason is None else _cut(piece.finish_reason, len(times), settings)
            if group().share(stop.requested):
                break
    print(flush=True)
    rate = f" at {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
    read = f"prompt of {session.prompt_tokens} tokens, {session.new_tokens} of them new"
    _tell(f"{len(times)} tokens{rate}; {read}{f'; {reason}' if reason else ''}")
    if stop.requested and not (stops_only and not isinstance(stop.error(), Terminated)):
        raise stop.error()


def _cut(finish_reason: str, made: int, settings: Settings) -> str | None:
    """Why an answer was cut, if it was."""
    if finish_reason == "stop":
        return None
    return "cut by --max-tokens" if made == settings.max_tokens else "cut by the model's context, which is full"


def _tell(text: str) -> None:
    """Prints a dimmed status message."""
    lines = "\n".join(plain(line) for line in text.split("\n"))
    print(dimmed(lines, sys.stderr), file=sys.stderr, flush=True)


@contextmanager
def _ctrl_c_raises(wanted: bool) -> Iterator[None]:
    """Makes every Ctrl-C raise an exception, not only the first one, unless Ctrl-C is ignored."""
    found = signal.getsignal(signal.SIGINT)
    wanted = wanted and found is not signal.SIG_IGN
    if wanted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if wanted:
            signal.signal(signal.SIGINT, found)


if __name__ == "__main__":
    sys.exit(main())
