"""Caches whose content tells which tokens it belongs to, for tests of stores of prefixes."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.serving.prefix_chunks import Prefix

CONFIG = Config(
    d_model=24,
    n_heads=4,
    n_layers=2,
    vocab_size=30,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    initializer_range=0.2,
    dtype="float32",
)
CHUNK = 4
CHUNK_BYTES = 4 * 2 * CHUNK * 6 * 4
"""Bytes of a chunk in float32: [2*layers kv_heads chunk head_dim]."""


TEXTS = st.lists(st.integers(0, 1), max_size=22).map(lambda bits: [bit for bit in bits for _ in range(2)])
"""Few enough chunks that beginnings are shared."""


class Naive:
    """The same as sets of tuples: whole texts up to each chunk's end, and when each was last used."""

    def __init__(self, most: int) -> None:
        self.most, self.now, self.used = most, 0, dict[tuple[int, ...], int]()

    def beginnings(self, tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[:end]) for end in range(CHUNK, len(tokens) + 1, CHUNK)]

    def use(self, tokens: list[int]) -> None:
        self.now += 1
        self.used |= {text: self.now for text in self.beginnings(tokens) if text in self.used}

    def longest(self, tokens: list[int]) -> int:
        found = [text for text in self.beginnings(tokens[:-1]) if text in self.used]
        self.use(list(found[-1]) if found else [])
        return len(found) * CHUNK

    def put(self, tokens: list[int]) -> None:
        self.use(tokens)
        for text in self.beginnings(tokens):
            while text not in self.used and len(self.used) >= self.most:
                last = [
                    held
                    for held in self.used
                    if held != tuple(tokens[: len(held)]) and not any(held == more[:-CHUNK] for more in self.used)
                ]
                if not last:
                    return
                del self.used[min(last, key=lambda held: self.used[held])]
            self.used[text] = self.now


def content(tokens: Sequence[int]) -> np.ndarray:
    """Numbers `[2*layers kv_heads time head_dim]`; those of a position depend on its token and all before it."""
    columns = [np.random.default_rng(tokens[: end + 1]).normal(size=(4, 2, 6)) for end in range(len(tokens))]
    return np.stack(columns, axis=2).astype(np.float32) if columns else np.zeros((4, 2, 0, 6), np.float32)


def cache_of(tokens: Sequence[int], *, dtype: Dtype = "float32", config: Config = CONFIG) -> Cache:
    """A cache of one row that holds the content of some tokens, with NaN behind them."""
    array = mx.array(np.pad(content(tokens), [(0, 0), (0, 0), (0, 3), (0, 0)], constant_values=np.nan))
    parts = tuple(array.astype(getattr(mx, dtype))[part : part + 1] for part in range(4))
    return Cache(config, (len(tokens),), parts[:2], parts[2:])


def assert_holds(prefix: Prefix, tokens: Sequence[int], dtype: Dtype = "float32") -> None:
    """A prefix is the content of its tokens, bit for bit."""
    expected = mx.array(content(tokens[: prefix.length])).astype(getattr(mx, dtype))
    actual = mx.concatenate([*prefix.chunks], axis=2) if prefix.chunks else expected
    assert actual.dtype == expected.dtype
    assert mx.array_equal(actual, expected)
