"""The runner of every command: options, signals, errors as one sentence, and the exit status.

| status | after |
| --- | --- |
| 0 | success, or the reader of standard output went away |
| 1 | success, and the result is that something isn't right (`check`, `inspect`) |
| 2 | an error that a user can mend, reported in one sentence on standard error |
| 130, 143 | Ctrl-C, SIGTERM |

Messages never end the work: if standard error can't be written to, they are dropped. A failure of standard output is
reported at the end.
"""

import argparse
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from textwrap import shorten
from typing import Any, NoReturn, TextIO, cast

from dbrx_fn.cli.interrupts import BY_SCRIPT, SCRIPT
from dbrx_fn.cli.terminal import plain, print_message, printed_warnings
from dbrx_fn.errors import DbrxError, InputError, lacks_memory
from dbrx_fn.runtime.group import Group, group, joined

INTERRUPTED = 130
TERMINATED = 143
"""The shells' exit statuses for a command that Ctrl-C or SIGTERM ended."""

_OUTPUT = "standard output"
SAME_PRESS = 1.0
"""Signals within this many seconds count as one, since `timeout` and some other programs send a signal twice."""


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which then ends a command like Ctrl-C, with another exit status."""


class Parser(argparse.ArgumentParser):
    """A parser with `plain` error messages, since unknown words may be file names that a shell has expanded."""

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def program(name: str = "") -> str:
    """How to call a command, in the form in which this process was called. Without a name: all commands."""
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
    together: bool = False,
) -> int:
    """Runs a command and returns its exit status.

    The first Ctrl-C raises `KeyboardInterrupt` in the command. Another one, a second or more later, ends the process.

    Args:
        command: called with the options. It returns the status, or `None` for 0.
        parser: the parser of the options.
        arguments: the command line's, if not given.
        kept: what an interruption leaves and how to continue, as a clause without a full stop.
        smaller: what to do when memory runs out, as a clause without a full stop.
        takes_sigterm: whether SIGTERM does the same as Ctrl-C, for commands that then save or remove something. If not,
            it ends the process at once, even during a wait for the device, when Python sees no signal.
        together: whether several processes can run the command together (`dbrx_fn.runtime.group`). If not, it refuses
            to be started by mlx.launch.

    Raises:
        SystemExit: by the parser, for `--help` and for unknown options.
    """
    options = argparse.Namespace()

    def left() -> str | None:
        return kept(options) if kept is not None and vars(options) else None

    def started() -> int:
        processes = group()
        processes.how_to_go_on = lambda: left() or "start all of them again"
        parser.parse_args(arguments, options)
        if not together:
            processes.refuse_others("This command")
        return command(options) or 0

    with _standard_streams():
        try:
            with joined() as processes, _follows(processes):
                # Only the leader handles signals. The others end when it does.
                taken = [signal.SIGINT, *([signal.SIGTERM] if takes_sigterm else [])] if processes.leads else []
                if processes.size > 1:
                    _end_late(processes)
                status = _ended(started, taken, left, smaller)
                processes.finish()
                return status
        except InputError as error:
            print_message(f"error: {error}")
            return 2


def _ended(
    command: Callable[[], int], signals: Sequence[signal.Signals], left: Callable[[], str | None], smaller: str
) -> int:
    """Runs a command to its end, with errors as one sentence. Returns the exit status."""
    try:
        with _signals_raise(signals), printed_warnings():
            return _run(command)
    except DbrxError as error:
        _tell(str(error))
    except KeyboardInterrupt as stop:
        group().wait_for_watchers()
        if (said := left()) is not None:
            print_message(f"interrupted: {said}.")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        what = "written" if error.filename == _OUTPUT else "read or written"
        _tell(f"{error.filename or 'a file'} can't be {what} ({error.strerror or error}).")
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            group().wait_for_watchers()
            raise
        said = shorten(str(error), 200, placeholder="…") or "out of memory"
        _tell(f"this doesn't fit in memory ({said}): {smaller}.")
    return 2


def _tell(sentence: str) -> None:
    """Prints an error. That of a process that doesn't lead is told by the leader."""
    group().wait_for_watchers()
    print_message(f"error: {sentence}")
    group().fail(sentence)


@contextmanager
def _follows(processes: Group) -> Iterator[None]:
    """Makes a process silent, and deaf to Ctrl-C, unless it leads."""
    if processes.leads:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield


def _end_late(processes: Group) -> None:
    """Makes SIGTERM end this process only after its watchers had time to tell why, unless it is handled otherwise.

    mlx.launch sends it to all processes as soon as it notices that one has died.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while os.read(reading, 1) != bytes([signal.SIGTERM]) or signal.getsignal(signal.SIGTERM) is not _later:
            pass
        processes.wait_for_watchers()
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()
    # Python writes the signal's number to the pipe at once, even while the main thread waits for the device.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _later)


def _later(number: int, frame: object) -> None:
    """The handler of a signal that another thread follows."""


def _run(command: Callable[[], int]) -> int:
    try:
        status = command()
    except SystemExit:
        # --help ends here.
        sys.stdout.flush()
        group().finish()
        raise
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    return status


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Replaces standard output and error by streams that work even if they are closed, and are silent at Python's end.

    Writing to a closed standard output fails. Characters that its encoding lacks are replaced.
    """
    out, error = cast(TextIO | None, sys.stdout), cast(TextIO | None, sys.stderr)
    # A file opened for reading fails like a closed one. It also keeps later files from getting a standard number.
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
    """A stream whose failures carry its name, and repeat at each later use. A nameless one drops the text instead."""

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
                # OSError makes a BrokenPipeError of that error number.
                self._failure = OSError(error.errno, error.strerror, self._name)
                self._discard()
        if self._failure is not None and self._name is not None:
            raise self._failure

    def _discard(self) -> None:
        """Sends all further output to nowhere, so Python's last flush doesn't fail."""
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
        """Repeats an interruption that Python dropped because it was raised while an object was freed."""
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
    taken = [number for number, how in found.items() if how in (signal.SIG_DFL, signal.default_int_handler, _later)]
    try:
        for number in taken:
            signal.signal(number, interrupt)
        sys.unraisablehook = again
        yield
    finally:
        sys.unraisablehook = told
        for number in taken:
            signal.signal(number, found[number])
