"""How an engine uses a store of prefixes: whose beginning is known, without a wait while others compute."""

from collections.abc import Iterable

from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.serving.prefix_chunks import restored
from dbrx_fn.serving.prefix_store import Lookup, PrefixStatistics, PrefixStore
from dbrx_fn.serving.served import Served

_AHEAD = 4
"""Waiting requests whose beginnings are read from disk at once. It bounds the memory that this takes."""


class Beginnings:
    """The store that an engine may have, and the lookups for its waiting requests. It is for the engine's thread."""

    def __init__(self, store: PrefixStore | None, config: Config) -> None:
        self._store, self._config = store, config
        self._lookups: dict[int, Lookup] = {}

    def ready(self, waiting: Iterable[Served], *, can_wait: bool) -> list[Served]:
        """Those of the oldest waiting requests whose beginnings are at hand; the disk is asked for the others'.

        Args:
            waiting: all requests without a cache.
            can_wait: nobody else needs the thread, so it may wait for the disk, and all are ready.
        """
        if self._store is None:
            return list(waiting)
        oldest = sorted(waiting, key=lambda served: served.number)[:_AHEAD]
        known, self._lookups = self._lookups, {}
        for served in oldest:
            # Log-probabilities of a prompt are to be computed, so all of it is read.
            if not served.request.prompt_logprobs:
                self._lookups[served.number] = known.get(served.number) or self._store.begin(served.tokens)
        pending = {number for number, lookup in self._lookups.items() if not lookup.is_ready}
        return [served for served in oldest if can_wait or served.number not in pending]

    def cache(self, served: Served, capacity: int) -> Cache:
        """A cache of one row that holds what is known of a request's text: nothing, unless `ready` has named it."""
        lookup = self._lookups.pop(served.number, None)
        if self._store is None or lookup is None:
            return init_cache(self._config, 1, capacity)
        return restored(self._store.finish(lookup), self._config, capacity)

    def put(self, tokens: tuple[int, ...], cache: Cache, row: int) -> None:
        """`PrefixStore.put`."""
        if self._store is not None:
            self._store.put(tokens, cache, row)

    def write_some(self) -> bool:
        """`PrefixStore.write_some`."""
        return self._store is not None and self._store.write_some()

    def statistics(self) -> PrefixStatistics | None:
        """`PrefixStore.statistics`, if there is one. Any thread may ask."""
        return None if self._store is None else self._store.statistics()

    def forget(self) -> None:
        """Forgets what the device may have failed to compute."""
        self._lookups = {}
        if self._store is not None:
            self._store.forget_memory()

    def close(self) -> None:
        """Closes the store."""
        self._lookups = {}
        if self._store is not None:
            self._store.close()
