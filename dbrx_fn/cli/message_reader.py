"""Reads chat messages from a terminal, with line editing, or from a pipe."""

import sys
from contextlib import suppress
from typing import NamedTuple

from dbrx_fn.errors import InputError

_QUOTE = '"""'
_LARGEST_LINE = 16 * 2**20
"""The most bytes of a line from a pipe."""


class Message(NamedTuple):
    """One input. It is a command if it begins with a slash and isn't quoted."""

    text: str
    is_command: bool


class MessageReader:
    """Reads messages from standard input.

    A message is a line. A line that ends with a backslash goes on in the next one. A message between triple quotes may
    have many lines. On a terminal each message is prompted for. The prompts go to standard output if it is a terminal
    too, and otherwise to standard error.
    """

    def __init__(self) -> None:
        self.on_terminal = sys.stdin is not None and sys.stdin.isatty()
        if self.on_terminal:
            # Importing it gives `input` line editing and history. Not every Python has it.
            with suppress(ImportError):
                import readline  # noqa: F401

    def read(self) -> Message | None:
        """The next message; `None` at the end.

        Raises:
            InputError: if a line isn't UTF-8, or is too long.
            KeyboardInterrupt: after Ctrl-C.
        """
        line = self._line(">>> ")
        if line is None:
            return None
        quoted = line.startswith(_QUOTE)
        lines = [line.removeprefix(_QUOTE)] if quoted else [line]
        while not lines[-1].endswith(_QUOTE) if quoted else lines[-1].endswith("\\"):
            line = self._line("... ")
            if not quoted:
                lines[-1] = lines[-1].removesuffix("\\")
            if line is None:
                break
            lines.append(line)
        lines[-1] = lines[-1].removesuffix(_QUOTE) if quoted else lines[-1]
        return Message("\n".join(lines), lines[0].startswith("/") and not quoted)

    def _line(self, prompt: str) -> str | None:
        try:
            return self._typed(prompt) if self.on_terminal else _piped()
        except UnicodeError as error:
            raise InputError(f"A message isn't UTF-8 ({error}): convert it first.") from None

    def _typed(self, prompt: str) -> str | None:
        try:
            if sys.stdout.isatty():
                line = input(prompt)
            else:
                print(prompt, end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
        except EOFError:
            print(file=sys.stderr)
            return None
        # Bytes that aren't UTF-8 may reach Python as lone surrogates.
        return line.removesuffix("\n").encode("utf-8", "surrogateescape").decode("utf-8")


def _piped() -> str | None:
    if sys.stdin is None:
        return None
    line = sys.stdin.buffer.readline(_LARGEST_LINE + 1)
    if len(line) > _LARGEST_LINE:
        raise InputError(f"A line of standard input has more than {_LARGEST_LINE} bytes: shorten it.")
    return line.decode("utf-8").removesuffix("\n").removesuffix("\r") if line else None
