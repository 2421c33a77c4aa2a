"""The option of all commands that load a model with adapters."""

import argparse
from pathlib import Path


def add_adapter_option(options: argparse.ArgumentParser, help: str = "") -> None:
    """Adds `--adapter-path`, mlx-lm's name. The value is for `load`.

    Args:
        options: the command's parser.
        help: what it does beyond loading, if anything, as a clause.
    """
    options.add_argument(
        "--adapter-path",
        type=Path,
        metavar="FOLDER",
        help=f"adapters to load beside the model, written by train --lora, mlx-lm or PEFT{help and f'; {help}'}",
    )
