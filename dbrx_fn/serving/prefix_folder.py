"""A folder of chunk files, of bounded size, for one process at a time. It survives a crash of the process.

A file is written under a hidden name and renamed when it is whole. It isn't flushed to disk. If a crash
of the machine damages a file, its sum shows that. A damaged file is a miss, and is removed.

A file's modification time is the time of its last use, so the order of use survives too. The engine's thread only hands
over bytes. One thread writes, and a few read.
"""

import contextlib
import os
import re
import stat
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown_path
from dbrx_fn.files.work_folder import hidden, work_folder
from dbrx_fn.runtime.device import backend
from dbrx_fn.serving.prefix_chunks import Chunk, Form, KeysAndValues
from dbrx_fn.serving.prefix_file import as_bits, read_chunk, size_in_file, write_chunk
from dbrx_fn.serving.recency import Recency

_MOST_WAITING = 2**29
"""Bytes that may wait to be written."""

_MOST_READERS = 4
"""Number of reading threads. They mostly compute sums, which Python does in parallel."""


class PrefixFolder:
    """Files of chunks of one form. Only the engine's thread may call the methods; any thread may read the counts."""

    def __init__(self, path: Path, most: int, form: Form) -> None:
        """Opens or makes the folder. If it holds too much, the least recently used files are removed.

        Args:
            path: the folder. Other files in it are left alone.
            most: the most bytes of all its files.
            form: its chunks' form. Files of other forms stay until they are the least recently used.

        Raises:
            InputError: if another process has it open, or it can't be made, or is a link or a file.
        """
        self._form = form
        self._closing = contextlib.ExitStack()
        taken = f"{shown_path(path)} keeps the prefixes of another process: wait until it ends, or name another folder."
        self._folder = self._closing.enter_context(work_folder(path, taken))
        self._offered: deque[tuple[Chunk, mx.array, Sequence[str]]] = deque()
        self.dropped = self.evicted = self.spoilt = 0
        found = sorted(self._found())
        self._lock = threading.Lock()
        # Guarded by the lock.
        self._recency = Recency(most, [(name, size) for _, name, size in found])
        self._waiting: dict[str, int] = {}
        self._used: dict[str, int] = {}
        self._last_use = found[-1][0] if found else 0
        self._has_told = False
        for name in self._recency.make_room(0) or []:
            self._folder.remove(_file(name))
        readers = min(_MOST_READERS, max(1, (os.cpu_count() or 1) // 2))
        self._writer = ThreadPoolExecutor(1, "dbrx_fn prefix writer")
        self._readers = ThreadPoolExecutor(readers, "dbrx_fn prefix reader")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._recency.total

    def holds(self, chunk: Chunk) -> bool:
        """Whether there is a file for a chunk, or will be."""
        with self._lock:
            return chunk.name in self._recency or chunk.name in self._waiting

    def offer(self, chunk: Chunk, array: KeysAndValues, chain: Sequence[str]) -> bool:
        """Takes a chunk that `hand_over` will have written.

        Args:
            chunk: its name and tokens.
            array: its keys and values.
            chain: names of all chunks of the text, from its start. None of them is evicted for this one.

        Returns:
            Whether it was taken. It isn't if too many bytes wait.
        """
        size = size_in_file(self._form, chunk)
        with self._lock:
            if size > self._recency.most or (self._waiting and sum(self._waiting.values()) + size > _MOST_WAITING):
                self.dropped += 1
                return False
            self._waiting[chunk.name] = size
        bits = as_bits(array)
        if backend() == "cuda":
            # Access by the host moves an array to memory that the GPU reads slowly. So the host reads a copy.
            bits = bits | mx.array(0, bits.dtype)
        # Started now, the copy needn't wait for work that is launched later.
        mx.async_eval(bits)
        self._offered.append((chunk, bits, chain))
        return True

    def hand_over(self) -> bool:
        """Hands one chunk to the writing thread, once the device has computed it. Returns whether more were offered.

        Raises:
            RuntimeError: MLX's, if the device failed to compute it.
        """
        if self._offered:
            chunk, bits, chain = self._offered[0]
            data = np.asarray(bits).data
            self._offered.popleft()
            self._writer.submit(self._write, chunk, data, chain)
        return bool(self._offered)

    def withdraw(self) -> None:
        """Forgets chunks that were offered and not yet handed over."""
        with self._lock:
            for chunk, _, _ in self._offered:
                del self._waiting[chunk.name]
        self._offered.clear()

    def use(self, chain: Sequence[str]) -> None:
        """Marks the chunks of a text, given from its start, as just used."""
        with self._lock:
            is_idle = not self._used
            self._use(chain)
            if is_idle and self._used:
                self._writer.submit(self._write_uses)

    def read(self, chunk: Chunk) -> Future[list[mx.array] | None] | None:
        """A future of `read_chunk`'s result, or of `None` if the file is damaged. `None` if there is no file."""
        with self._lock:
            if chunk.name not in self._recency:
                return None
        return self._readers.submit(self._read, chunk)

    def close(self) -> None:
        """Writes what was offered, and lets others open the folder."""
        self._readers.shutdown(cancel_futures=True)
        with contextlib.suppress(RuntimeError):
            while self.hand_over():
                pass
        self._writer.shutdown()
        self._closing.close()

    def _found(self) -> list[tuple[int, str, int]]:
        """Last use, name and size of each chunk file. Incomplete files of a killed process are removed."""
        found: list[tuple[int, str, int]] = []
        for file in self._folder.names():
            own = re.fullmatch(r"([0-9a-f]{64})\.safetensors|\.[0-9a-f]{64}\.safetensors\.unfinished", file)
            if own is None:
                continue
            status = os.stat(file, dir_fd=self._folder.descriptor, follow_symlinks=False)
            if own[1] is not None and stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, own[1], status.st_size))
            else:
                # If it is a folder it can't be removed, and does no harm.
                with contextlib.suppress(OSError):
                    self._folder.remove(file)
        return found

    def _use(self, chain: Sequence[str]) -> None:
        """Marks chunks as used, here and for `_write_uses`. The caller holds the lock."""
        for name in self._recency.use(chain):
            self._used[name] = self._next_use()

    def _next_use(self) -> int:
        """A time in nanoseconds, later than any that it returned before."""
        self._last_use = max(time.time_ns(), self._last_use + 1)
        return self._last_use

    # On the other threads.

    def _write(self, chunk: Chunk, data: memoryview, chain: Sequence[str]) -> None:
        file = _file(chunk.name)
        with self._lock:
            size = self._waiting[chunk.name]
            own_use = self._next_use()
            # Chunks before it must count as used after it, even if the process is killed between two of the next lines.
            self._use(chain)
            given_up = self._recency.make_room(size, keep=frozenset(chain))
        try:
            for name in given_up or []:
                self._folder.remove(_file(name))
            self._write_uses()
            if given_up is not None:
                with self._folder.create(hidden(file), private=True) as opened:
                    write_chunk(opened, self._form, chunk, data)
                    opened.flush()
                    os.utime(opened.fileno(), ns=(own_use, own_use))
                self._folder.rename(hidden(file), file)
        except OSError as error:
            given_up = None
            self._tell(error)
            with contextlib.suppress(OSError):
                self._folder.remove(hidden(file))
        with self._lock:
            del self._waiting[chunk.name]
            if given_up is None:
                self.dropped += 1
            else:
                self.evicted += len(given_up)
                self._recency.add(chunk.name, size)
                self._recency.use(chain)

    def _write_uses(self) -> None:
        with self._lock:
            used, self._used = self._used, {}
        for name, when in used.items():
            with contextlib.suppress(OSError):
                os.utime(_file(name), ns=(when, when), dir_fd=self._folder.descriptor, follow_symlinks=False)

    def _read(self, chunk: Chunk) -> list[mx.array] | None:
        file = _file(chunk.name)
        try:
            opened = self._folder.open(file)
            if opened is not None:
                with opened:
                    return read_chunk(opened, self._form, chunk)
        except (MemoryError, RuntimeError):
            # MLX raises this if memory is short.
            return None
        except (OSError, ValueError, InputError):
            # A link or another special file raises InputError.
            pass
        with self._lock:
            self.spoilt += 1
            self._recency.remove(chunk.name)
            with contextlib.suppress(OSError):
                self._folder.remove(file)
        return None

    def _tell(self, error: OSError) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                f"{shown_path(self._folder.path)} can't be written ({error.strerror or error}), so new prefixes are"
                " kept in memory alone: free some room.",
                stacklevel=1,
            )


def _file(name: str) -> str:
    return f"{name}.safetensors"
