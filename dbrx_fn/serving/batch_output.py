"""The answers of a batch. The file only grows, by whole lines, so an interrupted batch can go on.

Each line's `id` is `batch_req_INPUT_OPTIONS_WEIGHTS_LINE`. The first three are prefixes of SHA-256 sums. A killed
process may leave an incomplete line. The next process removes it.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dbrx_fn.errors import InputError
from dbrx_fn.files.file_lock import try_lock
from dbrx_fn.files.json_file import shown_path
from dbrx_fn.serving.openai_objects import Object, json_bytes

_DIGITS = 12
_HEAD = re.compile(rb'\{"id":"batch_req_([0-9a-f]{12})_([0-9a-f]{12})_([0-9a-f]{12})_([1-9][0-9]{0,17})",')
_LONGEST_HEAD = 100


class BatchOutput:
    """An open file of answers; made by `batch_output`."""

    def __init__(self, path: Path, descriptor: int, sums: tuple[str, str], last: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._sums = tuple(digest[:_DIGITS] for digest in sums)
        self._weights: str | None = None
        # One byte per line, since there may be millions of lines.
        self._answered = bytearray(last + 1)
        self._read()

    @property
    def count(self) -> int:
        """The number of answered lines."""
        return self._answered.count(1)

    def has(self, number: int) -> bool:
        """Whether a line is answered."""
        return bool(self._answered[number])

    def begin(self, weights: str) -> None:
        """Sets the weights that the following answers are made with.

        Args:
            weights: their fingerprint.

        Raises:
            InputError: if the file holds answers of other weights.
        """
        if self._weights not in (None, weights[:_DIGITS]):
            raise self._refusal("holds answers of other weights")
        self._weights = weights[:_DIGITS]

    def write(self, number: int, answer: Object) -> None:
        """Appends the answer of a line.

        Raises:
            InputError: if it can't be written. Earlier answers stay. The incomplete line is removed when the file is
                next opened.
        """
        identity = "_".join(["batch_req", *self._sums, str(self._weights), str(number)])
        line = memoryview(json_bytes({"id": identity, **answer}) + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise InputError(
                f"{shown_path(self._path)} can't be written ({error.strerror}): free some room, and start again, which"
                " goes on from there."
            ) from None
        self._answered[number] = 1

    def _read(self) -> None:
        """Reads which lines are answered, and removes an incomplete last line."""
        with open(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            start = 0
            while head := file.readline(_LONGEST_HEAD):
                found = _HEAD.match(head)
                ended = _skip_line(file, head)
                if found is None and (ended or not self._may_be_cut(head)):
                    raise self._refusal("holds something other than a batch's answers")
                if found is not None:
                    self._check(found)
                if not ended:
                    os.ftruncate(self._descriptor, start)
                    return
                if found is not None:
                    self._answered[int(found[4])] = 1
                start = file.tell()

    def _check(self, found: re.Match[bytes]) -> None:
        given, options, weights = (part.decode() for part in found.groups()[:3])
        if given != self._sums[0] or int(found[4]) >= len(self._answered):
            raise self._refusal("holds answers to another file")
        if options != self._sums[1]:
            raise self._refusal("holds answers that were made with other options")
        if self._weights not in (None, weights):
            raise self._refusal("holds answers of several models")
        self._weights = weights

    def _may_be_cut(self, head: bytes) -> bool:
        """Whether these bytes may be the beginning of a line of this batch."""
        ours = ('{"id":"' + "_".join(["batch_req", *self._sums])).encode()
        rest = rb"_[0-9a-f]{0,12}(_[0-9]*\"?)?"
        return ours.startswith(head) or re.fullmatch(re.escape(ours) + rest, head) is not None

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"{shown_path(self._path)} {reason}: name another file for --out.")


@contextmanager
def batch_output(path: Path, input_sum: str, last: int, options_sum: str) -> Iterator[BatchOutput]:
    """Opens the file of a batch's answers, which may be new or hold some already.

    Args:
        path: the file. It is locked until the block ends.
        input_sum: SHA-256 of the requests, in hexadecimal.
        last: the last line's number.
        options_sum: SHA-256 of all options that answers depend on, in hexadecimal.

    Raises:
        InputError: if it can't be written, another process writes to it, or it holds something else. The file stays as
            it is.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown_path(path)} can't be written ({reason}): name another file for --out.") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{shown_path(path)} is not a regular file: name another file for --out.")
        if try_lock(descriptor) is False:
            raise InputError(f"{shown_path(path)} is being written by another process: wait for it, or end it.")
        yield BatchOutput(path, descriptor, (input_sum, options_sum), last)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _skip_line(file: BinaryIO, head: bytes) -> bool:
    """Reads to the end of a line. Returns whether the line is complete."""
    while head and not head.endswith(b"\n"):
        head = file.readline(2**20)
    return bool(head)
