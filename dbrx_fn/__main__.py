"""`python -m dbrx_fn`, or the console script `dbrx-fn`: lists the commands and runs one.

`dbrx-fn generate …` does the same as `python -m dbrx_fn.generate …`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

import dbrx_fn
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import print_result
from dbrx_fn.errors import InputError

COMMANDS = {
    "generate": "continue a prompt, or answer it, or a file of them",
    "serve": "serve a model to OpenAI's clients, over HTTP",
    "chat": "talk with a model in the terminal",
    "inspect": "show what a checkpoint holds, and whether it fits this machine",
    "convert": "write a checkpoint in another layout, quantized or not",
    "fuse": "merge adapters into the weights of their model",
    "evaluate": "measure how well checkpoints predict a text, and how they differ",
    "train": "train or fine-tune a model on text",
    "train_tokenizer": "make a tokenizer from text",
    "check": "check whether this machine computes correctly, and how fast",
    "bench": "measure the speed of inference, training and serving on this machine",
    "random_checkpoint": "write a checkpoint of random weights, to try things with",
    "small.recipe": "train the small model of this package again",
}
"""The commands' modules, and what each does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named command, or lists all commands. Returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in COMMANDS:
        return cast(int, import_module(f"dbrx_fn.{words[0]}").main(words[1:]))
    return run(_list, parser(), words)


def parser() -> argparse.ArgumentParser:
    """Options that need no command."""
    width = max(map(len, COMMANDS))
    options = Parser(
        prog=program(),
        usage=f"{program()} [--help] [--version] COMMAND ...",
        description="DBRX, a mixture-of-experts language model, on MLX.",
        epilog="\n".join(
            (
                "commands:",
                *(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()),
                "",
                f"{program()} COMMAND --help lists a command's options.",
            )
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--version", action="version", version=f"dbrx_fn {dbrx_fn.__version__}")
    options.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return options


def _list(chosen: argparse.Namespace) -> None:
    if chosen.command:
        raise InputError(f"{chosen.command[0]!r} is not a command: give one of {', '.join(COMMANDS)}.")
    print_result(parser().format_help().rstrip())


if __name__ == "__main__":
    sys.exit(main())
