"""What an engine is doing and has done, in numbers."""

from dataclasses import dataclass

from dbrx_fn.serving.prefix_store import PrefixStatistics


@dataclass(frozen=True)
class Statistics:
    """What an engine is doing and has done.

    `waiting`, `reading`, `decoding`: current numbers of requests.
    `rows`, `positions`: shape of the batch that decodes. Some of its rows may be idle.
    `finished`: requests that ended, by reason: "stop", "length", "cancelled", "failed".
    `prompt_tokens`, `cached_tokens`, `made_tokens`: totals. Prompt tokens include cached ones.
    `put_aside`: how often a request lost its cache to others.
    `prefixes`: statistics of the prefix store, if there is one.
    """

    waiting: int = 0
    reading: int = 0
    decoding: int = 0
    rows: int = 0
    positions: int = 0
    finished: tuple[tuple[str, int], ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    made_tokens: int = 0
    put_aside: int = 0
    prefixes: PrefixStatistics | None = None
