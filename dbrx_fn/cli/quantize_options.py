"""The commands' options for quantization: which matrices, and in which format."""

import argparse
import re

from dbrx_fn.errors import InputError
from dbrx_fn.model.params import KINDS
from dbrx_fn.model.quantization import Quantization
from dbrx_fn.ops.formats import MODES, Format, format_of_mode

FORMAT_HELP = f"FORMAT is a number of bits (4), bits and group size (4:32), {', '.join(MODES[1:])}, or none."


def add_quantize_options(options: argparse.ArgumentParser) -> None:
    """Adds `--quantize FORMAT`, and one option for each kind of matrix."""
    options.add_argument("--quantize", metavar="FORMAT", help="quantize all matrices but the router's")
    for kind in KINDS:
        options.add_argument(f"--{kind}", metavar="FORMAT", help=f"format of the {kind}; overrides --quantize")


def chosen_quantization(chosen: argparse.Namespace) -> Quantization | None:
    """The quantization that these options ask for, or `None` without any of them.

    Raises:
        InputError: if an option isn't a format.
    """
    named = {kind: getattr(chosen, kind) for kind in KINDS}
    if chosen.quantize is None and all(text is None for text in named.values()):
        return None
    usual = None if chosen.quantize is None else _format("quantize", chosen.quantize)
    formats = {
        kind: (None if kind == "router" else usual) if text is None else _format(kind, text)
        for kind, text in named.items()
    }
    return Quantization(**formats)


def _format(option: str, text: str) -> Format | None:
    if text == "none":
        return None
    if text in MODES[1:]:
        return format_of_mode(text)
    parts = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if parts is None:
        raise InputError(
            f"--{option} is {text!r} where bits (4), bits and group size (4:32), {', '.join(MODES[1:])} or none is"
            " expected."
        )
    try:
        return Format(int(parts[1]), int(parts[2] or 64))
    except InputError as error:
        raise InputError(f"--{option} is {text}: {error}") from None
