"""How every command starts and ends: options, signals, and an exit status with at most one sentence.

| status | after |
| --- | --- |
| 0 | all was done, or the reader of standard output went away |
| 1 | all was done, and it says that something isn't right (`check`) |
| 2 | anything that a user can mend, told in one sentence on standard error |
| 130, 143 | Ctrl-C, SIGTERM |

Messages never end the work: what standard error doesn't take is dropped. What standard output doesn't take is told at
the end.
"""

import argparse
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from textwrap import shorten
from typing import Any, NoReturn, TextIO, cast

from dbrx_fn.cli.interrupts import BY_SCRIPT, SCRIPT
from dbrx_fn.cli.terminal import plain, print_message, printed_warnings
from dbrx_fn.errors import DbrxError, lacks_memory

INTERRUPTED = 130
TERMINATED = 143
"""The exit statuses by which shells know that Ctrl-C or SIGTERM ended a command."""

_OUTPUT = "standard output"
SAME_PRESS = 1.0
"""Seconds. `timeout` and some that start programs send one signal twice."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it ends a command as Ctrl-C does but for its status."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors show the words that it doesn't know `plain`: a shell may have found them in a folder."""

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def program(name: str = "") -> str:
    """What calls a command, for its help: as this process was called; without a name, what calls them all."""
    if BY_SCRIPT:
        return f"{SCRIPT} {name}".strip()
    return f"python -m dbrx_fn.{name}".rstrip(".")


def run(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    *,
    kept: Callable[[argparse.Namespace], str] | None = None,
    smaller: str = "take a smaller model or a larger machine",
    takes_sigterm: bool = False,
) -> int:
    """Runs a command and returns its exit status.

    At the first Ctrl-C, `KeyboardInterrupt` is raised in it; another one, a second or more later, ends the process.

    Args:
        command: called with the options; returns the status, `None` for 0.
        parser: of the options.
        arguments: the command line's, if not given.
        kept: what is left after an interruption and how to go on, as a clause without a full stop.
        smaller: what to do where memory runs out, as a clause without a full stop.
        takes_sigterm: whether SIGTERM does the same as Ctrl-C, for what is saved or removed then. If not, it ends the
            process at once, also while that waits for the device, where Python notices no signal.

    Raises:
        SystemExit: by the parser, for `--help` and for options that it doesn't know.
    """
    options = argparse.Namespace()
    with _standard_streams():
        try:
            with _signals_raise([signal.SIGINT, *([signal.SIGTERM] if takes_sigterm else [])]), printed_warnings():
                return _run(command, parser, arguments, options)
        except DbrxError as error:
            print_message(f"error: {error}")
        except KeyboardInterrupt as stop:
            if kept is not None and vars(options):
                print_message(f"interrupted: {kept(options)}.")
            return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        except BrokenPipeError:
            return 0
        except OSError as error:
            what = "written" if error.filename == _OUTPUT else "read or written"
            print_message(f"error: {error.filename or 'a file'} can't be {what} ({error.strerror or error}).")
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            said = shorten(str(error), 200, placeholder="…") or "out of memory"
            print_message(f"error: this doesn't fit in memory ({said}): {smaller}.")
        return 2


def _run(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    options: argparse.Namespace,
) -> int:
    try:
        parser.parse_args(arguments, options)
        status = command(options)
    except SystemExit:
        # After --help.
        sys.stdout.flush()
        raise
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    return status or 0


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Standard output and error that can be written to whatever they are, and that say nothing more when Python ends.

    A closed standard output fails when it is written to. Characters that its encoding lacks are replaced.
    """
    out, error = cast(TextIO | None, sys.stdout), cast(TextIO | None, sys.stderr)
    # Open for reading fails as closed does, and no file that is opened later takes the number of a standard one.
    own_out = out or os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    own_error = error or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(own_out, io.TextIOWrapper):
        own_out.reconfigure(errors="replace")
    sys.stdout = cast(TextIO, _Stream(own_out, _OUTPUT))
    sys.stderr = cast(TextIO, _Stream(own_error, None))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        for own, given in ((own_out, out), (own_error, error)):
            if given is None:
                own.close()
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)


class _Stream:
    """A stream that fails under its name, at each use from the first failure on; without a name it drops the text."""

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream, self._name = stream, name
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                action()
            except OSError as error:
                # By its number, OSError makes a BrokenPipeError where it is one.
                self._failure = OSError(error.errno, error.strerror, self._name)
                self._discard()
        if self._failure is not None and self._name is not None:
            raise self._failure

    def _discard(self) -> None:
        """Lets the file take everything from now on, so that Python doesn't complain when it flushes at its end."""
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def _signals_raise(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Turns signals into exceptions, unless the caller handles or ignores them."""
    began: float | None = None

    def interrupt(number: int, _: object) -> None:
        nonlocal began
        now = time.monotonic()
        if began is None:
            began = now
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if now - began > SAME_PRESS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised while it frees an object: the interruption comes once more then."""
        nonlocal began
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            began = None
            number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
            threading.Timer(0.05, os.kill, [os.getpid(), number]).start()
        else:
            told(unraisable)

    told = sys.unraisablehook
    in_main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in numbers if in_main}
    taken = [number for number, how in found.items() if how in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in taken:
            signal.signal(number, interrupt)
        sys.unraisablehook = again
        yield
    finally:
        sys.unraisablehook = told
        for number in taken:
            signal.signal(number, found[number])
