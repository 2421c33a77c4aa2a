"""The option of all commands that load a model with adapters."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown, shown_path

_WRITTEN_BY = "written by train --lora, mlx-lm or PEFT"


class OneFolder(argparse.Action):
    """Stores the folder of an option that can be given once. Otherwise argparse would drop all but the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Stores it, or raises `InputError` if there is one already."""
        if (given := getattr(namespace, self.dest)) is not None:
            raise InputError(
                f"{option} is given twice, as {shown_path(given)} and {shown_path(values)}, where one folder is"
                " expected: leave one out, or merge one into the model first (fuse)."
            )
        setattr(namespace, self.dest, values)


def add_adapter_option(options: argparse.ArgumentParser, help: str = "") -> None:
    """Adds `--adapter-path`, mlx-lm's name. The value is for `load`.

    Args:
        options: the command's parser.
        help: what it does beyond loading, if anything, as a clause.
    """
    options.add_argument(
        "--adapter-path",
        action=OneFolder,
        type=Path,
        metavar="FOLDER",
        help=f"adapters to load beside the model, {_WRITTEN_BY}{help and f'; {help}'}",
    )


def add_adapters_option(options: argparse.ArgumentParser) -> None:
    """Adds `--adapter-path` for a command that can hold several. The values are for `chosen_adapters`."""
    options.add_argument(
        "--adapter-path",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help=f"adapters to load beside the model, {_WRITTEN_BY}. With a NAME, requests choose them by this name as"
        " their model, the option may be repeated, and the model alone is served too",
    )


def chosen_adapters(values: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """The folder of the model's own adapters, if there is one, and the others' folders by name.

    A value whose first "=" comes before any "/" has a name, so the folder "a=b" is "./a=b".

    Raises:
        InputError: if a name is empty or given twice, or if one of several values has no name.
    """
    named: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name:
            if len(values) == 1:
                return Path(value), {}
            raise InputError(
                f"--adapter-path {shown_path(Path(value))} has no name, where several are given: write it as"
                " NAME=FOLDER."
            )
        if not (name and name.isprintable() and folder):
            raise InputError(f"--adapter-path is {shown(value)} where NAME=FOLDER is expected.")
        if name in named:
            raise InputError(f"--adapter-path gives the name {shown(name)} twice: give each adapter one of its own.")
        named[name] = Path(folder)
    return None, named
