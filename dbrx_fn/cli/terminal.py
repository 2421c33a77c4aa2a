"""Output of the commands: results, messages, warnings, progress."""

import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30


def plain(text: str) -> str:
    """A one-line text with unprintable characters escaped as in Python.

    File names, tensors' names and templates may come from strangers. Their control characters would otherwise steer the
    terminal, and characters for the direction of writing would reverse a sentence.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """A text of many lines, such as a model's, with the characters escaped that would steer a terminal."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    # The ranges are characters that change the direction of writing.
    return control or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"


def dimmed(text: str, stream: TextIO) -> str:
    """The text, dimmed if it goes to a terminal that shows colours."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[2m{text}\x1b[22m"


def print_result(text: str) -> None:
    """Prints a command's result on standard output, each line `plain`. A closed pipe is no error."""
    with suppress(BrokenPipeError):
        print("\n".join(plain(line) for line in text.split("\n")), flush=True)


def print_message(sentence: str) -> None:
    """Prints a `plain` line on standard error, above a progress bar if there is one."""
    tqdm.write(plain(sentence), file=sys.stderr)


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Prints warnings as plain lines on standard error, each once and without its place in the code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_message(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def byte_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on a terminal. Yields a function of bytes done and bytes in all."""
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


@contextmanager
def show_waiting(what: str) -> Iterator[None]:
    """Shows what the user waits for while the block runs, on a terminal only."""
    with tqdm(desc=what, bar_format="{desc}", disable=None, leave=False):
        yield


@contextmanager
def batch_progress(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Shows lines done, of `total`, and tokens per second, on a terminal only; yields what counts more of both."""
    began, tokens, shown = time.monotonic(), 0, 0.0
    with tqdm(total=total, initial=done, unit=" lines", disable=None) as bar:

        def progress(lines: int, made: int) -> None:
            nonlocal tokens, shown
            tokens, now = tokens + made, time.monotonic()
            bar.update(lines)
            if now - shown > 0.5:
                shown = now
                bar.set_postfix_str(f"{tokens / max(now - began, 1e-3):.0f} tokens/s")

        yield progress


@contextmanager
def pass_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the number of batches done: a bar on a terminal, elsewhere a line every half minute."""
    with tqdm(desc=name, unit="batch", disable=None, leave=False, smoothing=0.05) as bar:
        start = said = time.perf_counter()

        def passed(done: int, total: int) -> None:
            nonlocal said
            bar.total = total
            bar.update(done - bar.n)
            now = time.perf_counter()
            if bar.disable and now - said >= _SECONDS_BETWEEN_LINES:
                said = now
                left = tqdm.format_interval((now - start) * (total - done) / done)
                print_message(f"{name}: {done:,} of {total:,} batches, {left} left")

        yield passed


def size_text(nbytes: float) -> str:
    """A number of bytes with a unit, such as `245.1 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"
