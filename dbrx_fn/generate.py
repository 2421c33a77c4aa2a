"""`python -m dbrx_fn.generate`: continues or answers a prompt, and prints the text while it is generated."""

import argparse
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.checkpoints.hub import SMALL, checkpoint_path, model_name
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.cli.adapter_option import add_adapter_option
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.generation_options import (
    MOST_TOKENS,
    add_generation_options,
    check_generation_options,
    chosen_sampling,
    chosen_speculation,
    chosen_stop_tokens,
)
from dbrx_fn.cli.generation_report import Report
from dbrx_fn.cli.terminal import batch_progress, byte_progress, dimmed, print_message, show_waiting, size_text, visible
from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown_path
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.generation.sampling import random_key
from dbrx_fn.generation.stream import Piece, Stream, stream_text, token_budget, warm_up
from dbrx_fn.generation.structured import Structure
from dbrx_fn.model.config import Config
from dbrx_fn.model.shard import own_shard
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import backend
from dbrx_fn.runtime.group import group
from dbrx_fn.serving.batch_lines import read_batch_input
from dbrx_fn.serving.batch_output import batch_output
from dbrx_fn.serving.batch_run import MOST_CHOICES, MOST_TEXTS, BatchRun
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.fingerprint import weights_fingerprint
from dbrx_fn.serving.following import shared_limits
from dbrx_fn.serving.limits import default_limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.structures import trie_if_any
from dbrx_fn.text.chat import encode_chat
from dbrx_fn.text.prompt_length import encode_prompt
from dbrx_fn.text.tokenizer import Tokenizer

_PROMPT_SHOWN = 400
"""The most characters of the prompt that a terminal shows before the text, from its end."""

_COMPILING = "compiling, which takes longest the first time"

_PREFIXES = 2**30
"""Bytes of memory for beginnings that a batch's prompts share."""

_LARGEST_PROMPT = 256 * 2**20
"""The most bytes that are read from standard input."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        _run,
        parser(),
        arguments,
        smaller="take a shorter prompt, smaller --max-tokens or --prefill-step-size, or quantize the model (python -m"
        " dbrx_fn.convert)",
        together=True,
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
        help="a checkpoint's folder, a GGUF file, or a Hugging Face repository as"
        " owner/name (default: the small model of this package)",
    )
    add_adapter_option(options)
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", "-p", help="text to continue; - reads it from standard input")
    source.add_argument("--batch", type=Path, metavar="FILE", help="JSONL file of requests to answer, one per line")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="with --batch, JSONL file to add the answers to; the same command continues what was interrupted",
    )
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
    if options.batch is not None:
        _run_batch(options)
        return
    if options.out is not None:
        raise InputError("--out is the file of a batch's answers: give --batch too, or leave it out.")
    _run_one(options)


def _run_one(options: argparse.Namespace) -> None:
    seed = group().share(secrets.randbits(32) if options.seed is None else options.seed)
    report = Report(options.model, seed, processes=group().size)
    check_generation_options(options)
    key = random_key(report.seed)
    structure, speculation = _structure(options), chosen_speculation(options)
    if structure is not None and speculation is not None:
        raise InputError(
            "--speculate can't be combined with --json-schema or --regex, which tell a token's choices only when the"
            " token before is known: leave one out."
        )
    text = _prompt(options.prompt)

    start = time.perf_counter()
    path = checkpoint_path(options.model)
    with tokenizer_files(path) as files:
        defaults, tokenizer = read_generation_config(files.folder), files.read()
    sampling = chosen_sampling(options, defaults.sampling)
    params, config = _load(path, options)
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
    with nullcontext() if backend() == "cpu" else show_waiting(_COMPILING):
        warm_up(
            params,
            config,
            len(prompt),
            max_tokens=budget,
            sampling=sampling,
            structured=structure is not None,
            chunk_size=options.prefill_step_size,
            speculation=speculation,
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
        speculation=speculation,
    )
    _print_pieces(pieces, report, options, drawn=sampling.temperature > 0)
    if structure is not None and report.finish_reason == "length":
        print_message(
            f"warning: the text has only the beginning of its structure, since it ended after {budget} tokens: give a"
            " larger --max-tokens."
        )


def _run_batch(options: argparse.Namespace) -> None:
    """Answers the requests of a file."""
    _check_batch(options)
    path = checkpoint_path(options.model)
    with tokenizer_files(path) as files:
        defaults, tokenizer = read_generation_config(files.folder), files.read()
    defaults = replace(
        defaults,
        sampling=chosen_sampling(options, defaults.sampling),
        max_tokens=options.max_tokens or defaults.max_tokens or MOST_TOKENS,
        stop_strings=tuple(options.stop) or defaults.stop_strings,
    )
    name = model_name(options.model, path)
    if not group().leads:
        _engine(*_load(path, options), tokenizer).follow()
        return
    lines = read_batch_input(options.batch)
    chosen = json.dumps([asdict(defaults), options.seed, name, tokenizer.fingerprint()])
    chosen_sum = hashlib.sha256(chosen.encode()).hexdigest()
    with batch_output(options.out, lines.sha256, lines.last, chosen_sum) as output:
        if output.count == lines.count:
            print_message(f"{options.out} has the answers to all {lines.count} lines already.")
            return
        params, config = _load(path, options)
        output.begin(weights_fingerprint(params, config))
        engine = _engine(params, config, tokenizer)
        model = ServedModel(
            name=name,
            created=int(time.time()),
            config=config,
            tokenizer=tokenizer,
            capacity=min(engine.limits.capacity, engine.limits.positions),
            defaults=defaults,
            max_tokens=defaults.max_tokens or MOST_TOKENS,
            most_choices=MOST_CHOICES,
        )
        with engine:
            with nullcontext() if backend() == "cpu" else show_waiting(_COMPILING):
                engine.wait_until_ready()
            with batch_progress(lines.count, output.count) as progress:
                batch = BatchRun(engine, model, output, progress)
                try:
                    batch.run(lines, options.seed)
                except KeyboardInterrupt:
                    count = f"{output.count} of {lines.count} lines"
                    print_message(
                        f"interrupted: {options.out} has the answers to {count}, and the same command continues."
                    )
                    raise
        failed = f", {batch.failed} of them with an error" if batch.failed else ""
        print_message(f"{options.out} has the answers to {output.count} lines{failed}.")


def _engine(params: Params, config: Config, tokenizer: Tokenizer) -> Engine:
    limits = shared_limits(lambda: default_limits(params, config, reserved=_PREFIXES))
    trie = trie_if_any(tokenizer, config.vocab_size)
    prefixes = PrefixStore(config, "", chunk=limits.chunk, memory=_PREFIXES)
    return Engine(params, config, limits, trie=trie, prefixes=prefixes, queue=MOST_TEXTS + MOST_CHOICES)


def _check_batch(options: argparse.Namespace) -> None:
    """Refuses what can be refused before any file is read."""
    check_generation_options(options)
    if options.out is None:
        raise InputError("--batch needs a file for the answers: name it with --out.")
    usual = parser().parse_args(["--batch", "x"])
    for option in (
        *("chat", "control_tokens", "system", "json_schema", "regex", "json"),
        *("extra_eos_token", "prefill_step_size", "speculate", "num_draft_tokens"),
    ):
        if getattr(options, option) != getattr(usual, option):
            raise InputError(f"--{option.replace('_', '-')} has no meaning with --batch: leave it out.")
    if options.seed is not None:
        random_key(options.seed)


def _print_pieces(pieces: Stream[Piece], report: Report, options: argparse.Namespace, *, drawn: bool) -> None:
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
    report.passes = pieces.passes
    report.peak_memory = mx.get_peak_memory()
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print("\n" if terminal else "", flush=True)
    print(report.summary(drawn=drawn, speculated=options.speculate is not None), file=sys.stderr)
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
            group().refuse_others("--prompt -")
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


def _load(path: Path, options: argparse.Namespace) -> tuple[Params, Config]:
    with byte_progress("loading") as progress:
        dtype = group().share(options.dtype or computing_dtype(path))
        return load(path, dtype=dtype, progress=progress, shard=own_shard(), adapter_path=options.adapter_path)


def _encode(tokenizer: Tokenizer, text: str, options: argparse.Namespace, most: int) -> list[int]:
    if not _chats(options):
        return encode_prompt(tokenizer, text, most)
    message = {"role": "user", "content": text}
    return encode_chat(
        tokenizer, [message], system=options.system, control_tokens_in_content=options.control_tokens, most=most
    )


if __name__ == "__main__":
    sys.exit(main())
