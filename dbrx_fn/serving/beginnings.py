"""How an engine looks up cached prefixes, without waiting for the disk while other requests compute."""

from collections.abc import Mapping

from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.serving.prefix_chunks import restored
from dbrx_fn.serving.prefix_store import Lookup, PrefixStatistics, PrefixStore
from dbrx_fn.serving.served import Served

Requests = Mapping[int, Served]
"""Requests by their numbers."""

_AHEAD = 4
"""The most waiting requests whose prefixes are read from disk at once. It bounds memory."""


class Beginnings:
    """An engine's optional prefix store, and lookups for its waiting requests. Only the engine's thread may use it."""

    def __init__(self, store: PrefixStore | None, config: Config) -> None:
        self._store, self._config = store, config
        self._lookups: dict[int, Lookup] = {}
        self._chunks: dict[int, tuple[object, ...]] = {}

    def ready(self, waiting: Requests, reading: Requests, *, idle: bool) -> list[Served]:
        """The oldest waiting requests whose prefixes are in memory. Reading the others' from disk begins.

        A request isn't ready while another one reads the same chunks, as the choices of one prompt would.

        Args:
            waiting: all requests without a cache.
            reading: those in prefill.
            idle: the engine has no other work, so it may wait for the disk.
        """
        if self._store is None:
            return list(waiting.values())
        self._chunks = {
            number: self._chunks.get(number) or _whole_chunks(served, self._store.chunk)
            for number, served in (*waiting.items(), *reading.items())
        }
        being_read = {self._chunks[number] for number in reading}
        oldest: list[Served] = []
        for number in sorted(waiting):
            if self._chunks[number] not in being_read and len(oldest) < _AHEAD:
                oldest.append(waiting[number])
                being_read.add(self._chunks[number])
        known, self._lookups = self._lookups, {}
        for served in oldest:
            # The prompt's log-probabilities are wanted, so the entire prompt must be computed.
            if not served.request.prompt_logprobs:
                self._lookups[served.number] = known.get(served.number) or self._store.begin(
                    served.tokens, served.adapter
                )
        pending = {number for number, lookup in self._lookups.items() if not lookup.is_ready}
        return [served for served in oldest if idle or served.number not in pending]

    def cache(self, served: Served, capacity: int) -> Cache:
        """A cache of one row with the stored prefix of a request; empty unless `ready` has returned the request."""
        lookup = self._lookups.pop(served.number, None)
        if self._store is None or lookup is None:
            return init_cache(self._config, 1, capacity)
        return restored(self._store.finish(lookup), self._config, capacity)

    def put(self, served: Served, tokens: tuple[int, ...], cache: Cache, row: int) -> None:
        """`PrefixStore.put`, for tokens of this request."""
        if self._store is not None:
            self._store.put(tokens, cache, row, served.adapter)

    def write_some(self) -> bool:
        """`PrefixStore.write_some`."""
        return self._store is not None and self._store.write_some()

    def statistics(self) -> PrefixStatistics | None:
        """`PrefixStore.statistics`, if there is one. Any thread may ask."""
        return None if self._store is None else self._store.statistics()

    def forget(self) -> None:
        """Forgets chunks that the device may have failed to compute."""
        self._lookups = {}
        if self._store is not None:
            self._store.forget_memory()

    def close(self) -> None:
        """Closes the store."""
        self._lookups = {}
        if self._store is not None:
            self._store.close()


def _whole_chunks(served: Served, chunk: int) -> tuple[object, ...]:
    """What is equal for requests that could take the same chunks from the store, and different for all others."""
    length = (len(served.request.prompt) - 1) // chunk * chunk
    if not length or served.request.prompt_logprobs:
        return (served.number,)
    # A hash is compared in each turn faster than the tokens. If two were equal by chance, one request would only wait.
    return served.adapter, length, hash(served.request.prompt[:length])
