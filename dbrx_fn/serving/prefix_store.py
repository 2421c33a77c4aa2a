"""Keys and values of prompts' beginnings, so that another request with the same beginning doesn't compute them again.

    store = PrefixStore(config, fingerprint)
    prefix = store.longest(tokens)
    cache = restored(prefix, config, capacity)
    …                                               # forward computes tokens[prefix.length:]
    store.put(tokens, cache)

Beginnings are kept in whole chunks. Continued from the end of a chunk, `forward` gives the bits that it gives without a
store, if it is always called with chunks of this size (`docs/exactness.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import Config
from dbrx_fn.serving.prefix_chunks import Chunk, Form, KeysAndValues, Prefix, cut
from dbrx_fn.serving.recency import Recency


@dataclass(frozen=True)
class PrefixStatistics:
    """What a store has done since it was opened, and what it holds.

    `hits`, `misses`: lookups that found at least one chunk, and others.
    `tokens`: all that were found.
    `memory_bytes`: keys and values in memory.
    `memory_evictions`: chunks that memory gave up for others.
    """

    hits: int
    misses: int
    tokens: int
    memory_bytes: int
    memory_evictions: int


class PrefixStore:
    """Chunks of prompts' beginnings in memory. What was used the longest ago is given up first.

    One thread may use it, the one that computes; `statistics` may be called from any.
    """

    def __init__(self, config: Config, fingerprint: str, *, chunk: int = 512, memory: int = 2**30) -> None:
        """Opens a store.

        Args:
            config: the model's.
            fingerprint: any text; another text for whatever else changes keys and values (`weights_fingerprint`).
            chunk: tokens in a chunk.
            memory: bytes of keys and values that are kept in memory, at most.

        Raises:
            InputError: if a number is out of its range.
        """
        for name, value, least in (("chunk", chunk, 1), ("memory", memory, 0)):
            if value < least:
                raise InputError(f"{name} is {value} where at least {least} is expected.")
        self._form = Form(config, fingerprint, chunk)
        self._held: dict[str, tuple[Chunk, KeysAndValues]] = {}
        self._recency = Recency(memory)
        self._hits = self._misses = self._tokens = self._evictions = 0

    def longest(self, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of `tokens` that is known: whole chunks, and at least one token less than all."""
        chunks = self._form.chunks(tokens[:-1])
        found = list[KeysAndValues]()
        for chunk in chunks:
            array = self._in_memory(chunk)
            if array is None:
                break
            found.append(array)
        self._recency.use([chunk.name for chunk in chunks[: len(found)]])
        prefix = Prefix(len(found) * self._form.size, tuple(found))
        self._hits += bool(found)
        self._misses += not found
        self._tokens += prefix.length
        return prefix

    def put(self, tokens: Sequence[int], cache: Cache, row: int = 0) -> None:
        """Keeps the whole chunks among the tokens that a row of a cache holds. Known ones cost nothing.

        Args:
            tokens: the row's. They may go on beyond what the cache holds.
            cache: of any batch size and capacity, computed by `forward` in chunks of the store's size.
            row: one of its rows.

        Raises:
            CacheError: if the cache is of another config, or has no such row.
        """
        if cache.config != self._form.config:
            raise CacheError("The cache was made for another config than the store: make both with the same one.")
        if not 0 <= row < cache.batch_size:
            raise CacheError(f"row is {row} where a cache of {cache.batch_size} rows has 0 to {cache.batch_size - 1}.")
        chunks = self._form.chunks(tokens[: cache.lengths[row]])
        names = [chunk.name for chunk in chunks]
        self._recency.use(names)
        for number, chunk in enumerate(chunks):
            if self._in_memory(chunk) is None:
                start = number * self._form.size
                array = cut(cache, row, start, start + self._form.size)
                if not self._keep(chunk, array, names):
                    break
                # Evaluated, it doesn't keep the cache.
                mx.async_eval(array)
        self._recency.use(names)

    def statistics(self) -> PrefixStatistics:
        """What has been done, and what is held."""
        return PrefixStatistics(
            hits=self._hits,
            misses=self._misses,
            tokens=self._tokens,
            memory_bytes=self._recency.total,
            memory_evictions=self._evictions,
        )

    def close(self) -> None:
        """Gives the memory back."""
        self._held.clear()
        self._recency = Recency(0)

    def _in_memory(self, chunk: Chunk) -> KeysAndValues | None:
        known, array = self._held.get(chunk.name, (None, None))
        return array if known == chunk else None

    def _keep(self, chunk: Chunk, array: KeysAndValues, chain: Sequence[str]) -> bool:
        """Keeps a chunk in memory, if there is room beside those of `chain`."""
        given_up = self._recency.make_room(array.nbytes, keep=frozenset(chain))
        if given_up is None:
            return False
        for name in given_up:
            del self._held[name]
        self._evictions += len(given_up)
        self._held[chunk.name] = chunk, array
        self._recency.add(chunk.name, array.nbytes)
        return True
