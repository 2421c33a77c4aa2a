"""How an engine looks up cached prefixes, without waiting for the disk while other requests compute."""

from collections.abc import Iterable, Mapping

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

    def ready(self, waiting: Requests, reading: Requests, *, idle: bool) -> list[Served]:
        """The oldest waiting requests whose prefixes are in memory. Reading the others' from disk begins.

        A request isn't ready while another one reads the same chunks, as the choices of one prompt would.

        Args:
            waiting: all requests without a cache.
            reading: those in prefill.
            idle: the engine has no other work, so it may wait for the disk. Then all of them are ready.
        """
        if self._store is None:
            return list(waiting.values())
        oldest = [waiting[number] for number in sorted(waiting)[:_AHEAD]]
        known, self._lookups = self._lookups, {}
        for served in oldest:
            # The prompt's log-probabilities are wanted, so the entire prompt must be computed.
            if not served.request.prompt_logprobs:
                self._lookups[served.number] = known.get(served.number) or self._store.begin(
                    served.tokens, served.adapter
                )
        pending = {number for number, lookup in self._lookups.items() if not lookup.is_ready}
        found: list[Served] = []
        for served in oldest:
            if (idle or served.number not in pending) and not self._is_read_by((*reading.values(), *found), served):
                found.append(served)
        return found

    def _is_read_by(self, others: Iterable[Served], served: Served) -> bool:
        """Whether one of the others reads all chunks that this request could take from the store."""
        prompt = served.request.prompt
        length = 0 if self._store is None else (len(prompt) - 1) // self._store.chunk * self._store.chunk
        if not length or served.request.prompt_logprobs:
            return False
        return any(
            other.adapter == served.adapter and other.request.prompt[:length] == prompt[:length] for other in others
        )

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
