"""What all commands share of how they speak to a terminal: results, messages, warnings, progress."""

import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm


def plain(text: str) -> str:
    """A text of one line as it can be shown anywhere: what isn't printable is escaped as Python writes it.

    File names, tensors' names and templates may come from strangers; raw, their control characters would steer the
    terminal, and those for the direction of writing would turn a sentence around.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """A text of any lines, as a model makes it, without what would steer a terminal: that is escaped."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    # Those that turn the direction of what comes after them.
    return control or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"


def print_result(text: str) -> None:
    """Prints a command's result on standard output, each line `plain`; a reader that went away is no error."""
    with suppress(BrokenPipeError):
        print("\n".join(plain(line) for line in text.split("\n")), flush=True)


def print_message(sentence: str) -> None:
    """Prints a line about the work on standard error, `plain`, and above a progress bar if there is one."""
    tqdm.write(plain(sentence), file=sys.stderr)


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Prints warnings as plain lines on standard error, each once, without the place in the code they came from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_message(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def byte_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar, on a terminal only; yields what it is told bytes done and bytes in all with."""
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def size_text(nbytes: float) -> str:
    """A number of bytes as people read it: `245.1 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"
