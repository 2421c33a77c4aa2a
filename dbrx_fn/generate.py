"""`python -m dbrx_fn.generate`: continues or answers a prompt, and prints the text while it is generated."""

import argparse
import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.checkpoints.hub import SMALL, checkpoint_path, tokenizer_folder
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.generation_options import (
    MOST_TOKENS,
    add_generation_options,
    check_generation_options,
    chosen_sampling,
    chosen_stop_tokens,
)
from dbrx_fn.cli.terminal import byte_progress, dimmed, print_message, show_waiting, size_text, visible
from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown_path
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.generation.sampling import random_key
from dbrx_fn.generation.stream import Piece, stream_text, token_budget, warm_up
from dbrx_fn.generation.structured import Structure
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import backend
from dbrx_fn.text.chat import encode_chat
from dbrx_fn.text.prompt_length import encode_prompt
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer

_PROMPT_SHOWN = 400
"""The most characters of the prompt that a terminal shows before the text, from its end."""

_LARGEST_PROMPT = 256 * 2**20
"""The most bytes that are read from standard input."""


@dataclass
class Report:
    """The generated text and its times, as `--json` prints them. Times are in seconds, rates in tokens per second."""

    model: str
    seed: int
    prompt_tokens: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    load_time: float = 0.0
    warm_up_time: float = 0.0
    time_to_first_token: float | None = None
    prompt_rate: float | None = None
    generation_rate: float | None = None
    peak_memory: int = 0

    def note(self, piece: Piece, elapsed: float) -> None:
        """Counts a piece that came `elapsed` seconds after the start."""
        self.tokens.append(piece.token)
        self.text += piece.text
        if self.time_to_first_token is None:
            self.time_to_first_token = elapsed
            self.prompt_rate = self.prompt_tokens / elapsed
        else:
            self.generation_rate = (len(self.tokens) - 1) / (elapsed - self.time_to_first_token)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason

    def summary(self, *, drawn: bool) -> str:
        """The main figures as a small table. For `drawn` text it includes the seed that draws it again."""
        return "\n".join(
            (
                f"prompt          {self.prompt_tokens:8d} tokens  {_rate(self.prompt_rate)}",
                f"generation      {len(self.tokens):8d} tokens  {_rate(self.generation_rate)}",
                f"first token     {_seconds(self.time_to_first_token)}",
                f"warm-up         {_seconds(self.warm_up_time)}",
                f"loading         {_seconds(self.load_time)}",
                f"peak memory     {self.peak_memory / 2**30:8.2f} GiB",
                f"finish reason   {self.finish_reason}",
                *([f"seed            {self.seed}"] if drawn else []),
            )
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        _run,
        parser(),
        arguments,
        smaller="take a shorter prompt, smaller --max-tokens or --prefill-step-size, or quantize the model (python -m"
        " dbrx_fn.convert)",
    )


def parser() -> argparse.ArgumentParser:
    """The command's options. Those that mlx-lm has too have mlx-lm's names."""
    options = Parser(
        prog=program("generate"),
        description="Continue a prompt with a DBRX model, or answer it with --chat. The text is printed while it is"
        " generated.",
        epilog="Standard output has the generated text only; on a terminal the prompt comes before it. The summary,"
        " warnings and errors go to standard error. Exit status: 0; 2 after an error, without JSON; 130 after Ctrl-C,"
        " with the text so far.",
    )
    add = options.add_argument
    add(
        "--model",
        default=str(SMALL),
        help="a checkpoint's folder, a GGUF file with tokenizer files beside it, or a Hugging Face repository as"
        " owner/name (default: the small model of this package)",
    )
    add("--prompt", "-p", required=True, help="text to continue; - reads it from standard input")
    add("--chat", action="store_true", help="send the prompt as a user's message in the model's chat format")
    add(
        "--control-tokens",
        action="store_true",
        help="with --chat, encode control tokens in the prompt, such as <|im_end|> (default: they are plain text)",
    )
    add("--system", "--system-prompt", help="system prompt instead of the model's default; implies --chat")
    add_generation_options(options)
    structures = options.add_mutually_exclusive_group()
    structures.add_argument(
        "--json-schema", metavar="FILE", help="the text must be JSON that is valid by the schema in this file"
    )
    structures.add_argument("--regex", metavar="TEXT", help="the text must be what this regular expression matches")
    add(
        "--json",
        action="store_true",
        help="print one JSON object at the end instead of the text; after an error print none",
    )
    return options


def _run(options: argparse.Namespace) -> None:
    report = Report(options.model, secrets.randbits(32) if options.seed is None else options.seed)
    check_generation_options(options)
    key = random_key(report.seed)
    structure = _structure(options)
    text = _prompt(options.prompt)

    start = time.perf_counter()
    path = checkpoint_path(options.model)
    folder = tokenizer_folder(path)
    defaults = read_generation_config(folder)
    sampling = chosen_sampling(options, defaults.sampling)
    tokenizer = read_tokenizer(folder)
    params, config = _load(path, options.dtype)
    report.load_time = time.perf_counter() - start

    prompt = _encode(tokenizer, text, options, config.max_seq_len)
    report.prompt_tokens = len(prompt)
    wanted = options.max_tokens or defaults.max_tokens or MOST_TOKENS
    budget = token_budget(prompt, config, wanted)
    if budget < wanted:
        print_message(f"warning: the context of {config.max_seq_len} tokens leaves room for {budget} after the prompt.")
    stop_tokens = chosen_stop_tokens(options, tokenizer)

    start = time.perf_counter()
    # This is fast once MLX has the kernels. The first time on a machine it takes seconds, or a minute on CUDA.
    waiting = "compiling, which takes longest the first time"
    with nullcontext() if backend() == "cpu" else show_waiting(waiting):
        warm_up(
            params,
            config,
            len(prompt),
            max_tokens=budget,
            sampling=sampling,
            structured=structure is not None,
            chunk_size=options.prefill_step_size,
        )
    report.warm_up_time = time.perf_counter() - start

    if not options.json and not _chats(options):
        _show_prompt(text)
    pieces = stream_text(
        params,
        config,
        tokenizer,
        prompt,
        max_tokens=budget,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        # Those of the checkpoint may stand anywhere in a text of this structure.
        stop_strings=options.stop or (() if structure else defaults.stop_strings),
        structure=structure,
        chunk_size=options.prefill_step_size,
    )
    _print_pieces(pieces, report, options, drawn=sampling.temperature > 0)
    if structure is not None and report.finish_reason == "length":
        print_message(
            f"warning: the text has only the beginning of its structure, since it ended after {budget} tokens: give a"
            " larger --max-tokens."
        )


def _print_pieces(pieces: Iterator[Piece], report: Report, options: argparse.Namespace, *, drawn: bool) -> None:
    """Prints the text as it comes and the figures at its end. An interruption is raised again after that."""
    interruption: KeyboardInterrupt | None = None
    terminal = sys.stdout.isatty()
    start = time.perf_counter()
    try:
        for piece in pieces:
            report.note(piece, time.perf_counter() - start)
            if not options.json:
                print(visible(piece.text) if terminal else piece.text, end="", flush=True)
    except KeyboardInterrupt as stop:
        interruption = stop
    report.peak_memory = mx.get_peak_memory()
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print("\n" if terminal else "", flush=True)
    print(report.summary(drawn=drawn), file=sys.stderr)
    if interruption is not None:
        raise interruption


def _show_prompt(text: str) -> None:
    """Shows the prompt, dimmed, if standard output is a terminal. A pipe gets only the text."""
    if sys.stdout.isatty():
        shown = visible(text if len(text) <= _PROMPT_SHOWN else f"…{text[-_PROMPT_SHOWN:]}")
        print(dimmed(shown, sys.stdout), end="", flush=True)


def _chats(options: argparse.Namespace) -> bool:
    return options.chat or options.system is not None


def _prompt(option: str) -> str:
    """The prompt's text, from the option or from standard input."""
    source = "--prompt"
    try:
        if option == "-":
            source = "standard input"
            if sys.stdin is None:
                raise InputError("The prompt can't be read, since standard input is closed.")
            read = sys.stdin.buffer.read(_LARGEST_PROMPT + 1)
            if len(read) > _LARGEST_PROMPT:
                raise InputError(
                    f"The prompt from standard input has more than {size_text(_LARGEST_PROMPT)}: shorten it."
                )
            text = read.decode("utf-8").removeprefix("\ufeff")
        else:
            # Bytes of the command line that aren't UTF-8 reach Python as lone surrogates.
            text = option.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"The prompt from {source} is not UTF-8 ({error}): convert it first.") from None
    except OSError as error:
        raise InputError(f"The prompt from {source} can't be read ({error.strerror}).") from None
    if not text:
        raise InputError(f"The prompt from {source} is empty: give some text to continue.")
    return text


def _structure(options: argparse.Namespace) -> Structure | None:
    """What the text must be, from the options."""
    if options.regex is not None:
        return Structure.regex(options.regex)
    if options.json_schema is None:
        return None
    file = Path(options.json_schema)
    try:
        schema: Any = parse_json(read_bounded(file), unique=True)
        return Structure.json_schema(schema)
    except ValueError as error:
        raise InputError(f"--json-schema {shown_path(file)} isn't a JSON schema: {error}.") from None
    except InputError as error:
        raise InputError(f"--json-schema {shown_path(file)}: {error}") from None
    except OSError as error:
        raise InputError(f"--json-schema {shown_path(file)} can't be read ({error.strerror}).") from None


def _load(path: Path, dtype: Dtype | None) -> tuple[Params, Config]:
    with byte_progress("loading") as progress:
        return load(path, dtype=dtype or computing_dtype(path), progress=progress)


def _encode(tokenizer: Tokenizer, text: str, options: argparse.Namespace, most: int) -> list[int]:
    if not _chats(options):
        return encode_prompt(tokenizer, text, most)
    message = {"role": "user", "content": text}
    return encode_chat(
        tokenizer, [message], system=options.system, control_tokens_in_content=options.control_tokens, most=most
    )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:10.1f} tokens/s"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:8.2f} s"


if __name__ == "__main__":
    sys.exit(main())
