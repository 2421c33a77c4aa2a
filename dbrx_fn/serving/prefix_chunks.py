"""Chunks of prefixes: their names, their keys and values copied from a cache, and a cache restored from them.

A text is cut into chunks of equal size from its start. A chunk's name is the SHA-256 sum of the name before it and of
its own tokens, so equal names mean equal texts up to the chunk's end. The first of all names is a sum of everything
else that keys and values depend on.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.errors import CacheError
from dbrx_fn.generation.cache_file import cache_fields
from dbrx_fn.model.cache import Cache, check_memory, init_cache
from dbrx_fn.model.config import Config

KeysAndValues = Float[mx.array, "2*layers kv_heads chunk head_dim"]
"""What all layers hold of one chunk: each layer's keys, then each layer's values."""

VERSION = "1"


@dataclass(frozen=True)
class Chunk:
    """One chunk of a text. `before` identifies all that precedes it.

    `name`: 64 hexadecimal digits.
    `before`: the name of the chunk before it; of a first chunk, the form's `root` or one made from that.
    `tokens`: its tokens.
    """

    name: str
    before: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What all chunks that may be joined have in common.

    `config`: the model's.
    `fingerprint`: any text; another text for whatever else changes keys and values, above all other weights.
    `size`: tokens in a chunk.
    """

    config: Config
    fingerprint: str
    size: int

    @cached_property
    def facts(self) -> str:
        """Everything but tokens that keys and values depend on, as JSON."""
        facts = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "chunk": self.size,
            "config": cache_fields(self.config),
        }
        return json.dumps(facts, sort_keys=True)

    @cached_property
    def root(self) -> str:
        """The name before each first chunk."""
        return hashlib.sha256(self.facts.encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a chunk's keys and values: `[2*layers kv_heads chunk head_dim]`."""
        return 2 * self.config.n_layers, self.config.layer.local_kv_heads, self.size, self.config.head_dim

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of keys and values."""
        dtype: mx.Dtype = getattr(mx, self.config.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a chunk's keys and values."""
        return math.prod(self.shape) * self.dtype.size

    def chunks(self, tokens: Sequence[int], adapter: int = 0) -> list[Chunk]:
        """The complete chunks of a text. Tokens after the last complete chunk are left out.

        Chunks that different adapters computed have different names: `adapter` is the place in the stack, 0 for none.
        """
        found, before = list[Chunk](), self.root
        if adapter:
            before = hashlib.sha256(f"{before} adapter {adapter}".encode()).hexdigest()
        for start in range(0, len(tokens) - self.size + 1, self.size):
            own = array("q", tokens[start : start + self.size])
            name = hashlib.sha256(before.encode() + own.tobytes()).hexdigest()
            found.append(Chunk(name, before, tuple(own)))
            before = name
        return found


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text's beginning that needn't be computed again.

    `length`: number of its tokens.
    `chunks`: its keys and values, one array per chunk.
    """

    length: int
    chunks: tuple[KeysAndValues, ...]


def cut(cache: Cache, row: int, start: int, stop: int) -> KeysAndValues:
    """A copy of positions `start` to `stop` - 1 of a cache's row. Until evaluated, it keeps the cache in memory."""
    return mx.stack([held[row, :, start:stop] for held in cache.keys + cache.values])


def restored(prefix: Prefix, config: Config, capacity: int) -> Cache:
    """A cache of one row that holds a prefix, bit for bit. It is lazy, and doesn't wait for the device.

    Args:
        prefix: as `PrefixStore` found it.
        config: the model's.
        capacity: positions of the row.

    Raises:
        CacheError: if the prefix is longer than `capacity`, or the cache won't fit in memory.
    """
    if prefix.length > capacity:
        raise CacheError(
            f"A prefix of {prefix.length} tokens doesn't fit a cache of {capacity} positions: give more capacity."
        )
    if not prefix.chunks:
        return init_cache(config, 1, capacity)
    check_memory(config, 1, capacity)
    room = (1, config.layer.local_kv_heads, capacity - prefix.length, config.head_dim)
    rest = mx.zeros(room, prefix.chunks[0].dtype)
    # Each layer gets a buffer of its own. A view of a shared one would be copied when the next token is written.
    joined = [
        mx.concatenate([*(chunk[part : part + 1] for chunk in prefix.chunks), rest], axis=2)
        for part in range(2 * config.n_layers)
    ]
    return Cache(config, (prefix.length,), tuple(joined[: config.n_layers]), tuple(joined[config.n_layers :]))
