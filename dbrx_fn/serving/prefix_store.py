"""Keeps keys and values of prefixes, so that requests with the same prefix don't compute them again.

    store = PrefixStore(config, fingerprint)
    prefix = store.longest(tokens)
    cache = restored(prefix, config, capacity)
    …                                               # forward computes tokens[prefix.length:]
    store.put(tokens, cache)
    store.close()

Prefixes are kept in complete chunks. If `forward` is always called with chunks of this size, it gives the same bits
after a restored prefix as without a store (`docs/exactness.md`).
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import mlx.core as mx

from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import Config
from dbrx_fn.serving.prefix_chunks import Chunk, Form, KeysAndValues, Prefix, cut
from dbrx_fn.serving.prefix_folder import PrefixFolder
from dbrx_fn.serving.recency import Recency

Reading = Future[list[mx.array] | None]
"""The bits of a chunk that is being read from disk, as `read_chunk` gives them."""


@dataclass(frozen=True)
class PrefixStatistics:
    """What a store has done since it was opened, and what it holds now.

    `hits`, `misses`: lookups that found at least one chunk, and others.
    `tokens`: total number of tokens that lookups found.
    `memory_bytes`, `disk_bytes`: of the chunks that are held.
    `memory_evictions`, `disk_evictions`: chunks that were evicted for others.
    `dropped`: chunks that weren't written, since too many waited or the disk was full.
    `spoilt`: files that were found to be damaged or missing.
    """

    hits: int
    misses: int
    tokens: int
    memory_bytes: int
    memory_evictions: int
    disk_bytes: int
    disk_evictions: int
    dropped: int
    spoilt: int


@dataclass(frozen=True, eq=False)
class Lookup:
    """A lookup that `PrefixStore.begin` started.

    `chunks`: all chunks of the text.
    `parts`: for each stored chunk from the first on, its keys and values, or a future of their bits on disk.
    """

    chunks: tuple[Chunk, ...]
    parts: tuple[KeysAndValues | Reading, ...]

    @property
    def is_ready(self) -> bool:
        """Whether all reading from disk has ended."""
        return all(part.done() for part in self.parts if isinstance(part, Future))


class PrefixStore:
    """Chunks of prompts' beginnings in memory, and on disk if there is a folder for them.

    Memory and disk are bounded. The least recently used chunks are evicted first. Only the thread that computes may use
    a store; `statistics` may be called from any thread.
    """

    def __init__(
        self,
        config: Config,
        fingerprint: str,
        *,
        chunk: int = 512,
        memory: int = 2**30,
        folder: Path | None = None,
        disk: int = 10 * 2**30,
    ) -> None:
        """Opens a store.

        Args:
            config: the model's.
            fingerprint: any text; another text for whatever else changes keys and values (`fingerprint`).
            chunk: tokens in a chunk.
            memory: bytes of keys and values that are kept in memory, at most.
            folder: where they are kept on disk, for one process at a time. `None` keeps nothing on disk.
            disk: bytes of files in the folder, at most.

        Raises:
            InputError: if a number is out of its range, or the folder can't be used.
        """
        for name, value, least in (("chunk", chunk, 1), ("memory", memory, 0), ("disk", disk, 0)):
            if value < least:
                raise InputError(f"{name} is {value} where at least {least} is expected.")
        self.chunk = chunk
        self._form = Form(config, fingerprint, chunk)
        self._folder = None if folder is None else PrefixFolder(folder, disk, self._form)
        self._held: dict[str, tuple[Chunk, KeysAndValues]] = {}
        self._recency = Recency(memory)
        self._hits = self._misses = self._tokens = self._evictions = 0

    def longest(self, tokens: Sequence[int], adapter: int = 0) -> Prefix:
        """The longest stored prefix of `tokens`, in complete chunks. At least the last token is left out.

        Only what the same adapter computed is found: `adapter` is its place in the tree's stack, 0 for none.

        Waits for the disk if chunks are only there. `begin` and `finish` do the same without waiting.
        """
        return self.finish(self.begin(tokens, adapter))

    def begin(self, tokens: Sequence[int], adapter: int = 0) -> Lookup:
        """Starts reading from disk what `longest` would find there. Doesn't wait."""
        chunks = self._form.chunks(tokens[:-1], adapter)
        parts = list[KeysAndValues | Reading]()
        for chunk in chunks:
            part: KeysAndValues | Reading | None = self._in_memory(chunk)
            if part is None and self._folder is not None:
                part = self._folder.read(chunk)
            if part is None:
                break
            parts.append(part)
        return Lookup(tuple(chunks), tuple(parts))

    def finish(self, lookup: Lookup) -> Prefix:
        """The prefix that was found, with chunks stored since. Waits for the disk if the lookup isn't ready."""
        found = list[KeysAndValues]()
        names = [chunk.name for chunk in lookup.chunks]
        self._recency.use(names)
        has_room = True
        for chunk, part in zip_longest(lookup.chunks, lookup.parts):
            array = held = self._in_memory(chunk)
            if array is None:
                array = self._from_disk(part) if isinstance(part, Future) else part
            if array is None:
                break
            found.append(array)
            if held is None and has_room:
                has_room = self._make_room(names)
                if has_room:
                    self._keep(chunk, array)
        self._use(names[: len(found)])
        prefix = Prefix(len(found) * self._form.size, tuple(found))
        self._hits += bool(found)
        self._misses += not found
        self._tokens += prefix.length
        return prefix

    def put(self, tokens: Sequence[int], cache: Cache, row: int = 0, adapter: int = 0) -> None:
        """Stores the complete chunks of the tokens that a row of a cache holds. Chunks already stored cost nothing.

        Doesn't wait for the device. Chunks for the disk wait until `write_some` is called.

        Args:
            tokens: the row's. They may go on beyond what the cache holds.
            cache: of any batch size and capacity, computed by `forward` in chunks of the store's size.
            row: one of its rows.
            adapter: what computed it, as in `longest`.

        Raises:
            CacheError: if the cache is of another config, or has no such row.
        """
        if cache.config != self._form.config:
            raise CacheError("The cache was made for another config than the store: make both with the same one.")
        if not 0 <= row < cache.batch_size:
            raise CacheError(f"row is {row} where a cache of {cache.batch_size} rows has 0 to {cache.batch_size - 1}.")
        chunks = self._form.chunks(tokens[: cache.lengths[row]], adapter)
        names = [chunk.name for chunk in chunks]
        self._use(names)
        has_room, folder = True, self._folder
        for number, chunk in enumerate(chunks):
            array = self._in_memory(chunk)
            has_room = has_room and (array is not None or self._make_room(names))
            to_keep, to_write = array is None and has_room, folder is not None and not folder.holds(chunk)
            if array is None and (to_keep or to_write):
                start = number * self._form.size
                array = cut(cache, row, start, start + self._form.size)
                # An evaluated copy doesn't keep the cache in memory.
                mx.async_eval(array)
            if array is not None and to_keep:
                self._keep(chunk, array)
            if array is not None and folder is not None and to_write and not folder.offer(chunk, array, names):
                folder = None
        self._use(names)

    def write_some(self) -> bool:
        """Hands one chunk that waits for the disk to the writing thread. Returns whether there are more.

        It waits until the device has computed that chunk. So each turn of an engine hands over only one, after its
        other work.
        """
        return self._folder is not None and self._folder.hand_over()

    def statistics(self) -> PrefixStatistics:
        """The store's current statistics."""
        folder = self._folder
        return PrefixStatistics(
            hits=self._hits,
            misses=self._misses,
            tokens=self._tokens,
            memory_bytes=self._recency.total,
            memory_evictions=self._evictions,
            disk_bytes=0 if folder is None else folder.nbytes,
            disk_evictions=0 if folder is None else folder.evicted,
            dropped=0 if folder is None else folder.dropped,
            spoilt=0 if folder is None else folder.spoilt,
        )

    def forget_memory(self) -> None:
        """Drops all chunks in memory or waiting to be handed over. To be called when the device failed to compute."""
        self._held.clear()
        self._recency = Recency(self._recency.most)
        if self._folder is not None:
            self._folder.withdraw()

    def close(self) -> None:
        """Frees the memory, and writes the chunks that wait for the disk. The store can't be used afterwards."""
        if self._folder is not None:
            self._folder.close()
        self._held.clear()
        self._recency = Recency(0)

    def _in_memory(self, chunk: Chunk) -> KeysAndValues | None:
        known, array = self._held.get(chunk.name, (None, None))
        return array if known == chunk else None

    def _from_disk(self, part: Reading) -> KeysAndValues | None:
        bits = part.result()
        if bits is None:
            return None
        array = mx.stack(bits).view(self._form.dtype)
        mx.async_eval(array)
        return array

    def _use(self, chain: Sequence[str]) -> None:
        self._recency.use(chain)
        if self._folder is not None:
            self._folder.use(chain)

    def _make_room(self, chain: Sequence[str]) -> bool:
        """Makes room in memory for one more chunk without evicting those of `chain`. Returns whether it could."""
        given_up = self._recency.make_room(self._form.nbytes, keep=frozenset(chain))
        for name in given_up or []:
            del self._held[name]
        self._evictions += len(given_up or [])
        return given_up is not None

    def _keep(self, chunk: Chunk, array: KeysAndValues) -> None:
        self._held[chunk.name] = chunk, array
        self._recency.add(chunk.name, array.nbytes)
