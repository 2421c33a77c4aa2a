"""How often the block is traced: once for each shape that it meets, and never for a token, a position or a layer.

On the CPU, where layers are called as they are, that is how often it is checked; both are counted alike.
Every test has a `moe_loss_weight` of its own, which makes its config a new static value, for which nothing is traced
yet.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.model.cache import grow_cache, init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params, nest
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params


class Traces:
    """Counts traces."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def count(self) -> int:
        """Traces of the block since the last call."""
        return self.all()["block"]

    def all(self) -> Counter[str]:
        """Traces of everything since the last call, by name."""
        messages = [record.getMessage() for record in self.caplog.records if record.name == "dbrx_fn.compile"]
        self.caplog.clear()
        return Counter(message.split()[1] for message in messages)


@pytest.fixture
def traces(caplog: pytest.LogCaptureFixture) -> Iterator[Traces]:
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        yield Traces(caplog)


def model(number: int, n_layers: int = 2) -> tuple[Config, Params]:
    config = Config(
        d_model=12,
        n_heads=2,
        n_layers=n_layers,
        vocab_size=20,
        attn=AttnConfig(clip_qkv=2.0),
        ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2, moe_loss_weight=float(number)),
        dtype="float32",
    )
    return config, init_params(config, mx.random.key(0))


def tokens(time: int, batch: int = 1) -> mx.array:
    return mx.ones((batch, time), mx.int32)


def test_prompts_are_traced_by_bucket(traces: Traces) -> None:
    config, params = model(1001)
    counts = []
    for time in (9, 12, 16, 10, 17, 25, 32, 11):
        forward(params, tokens(time), init_cache(config, 1, 64))
        counts.append(traces.count())
    assert counts == [1, 0, 0, 0, 1, 0, 0, 0]


def test_decoding_is_traced_once(traces: Traces) -> None:
    config, params = model(1002)
    logits, cache = forward(params, tokens(9), init_cache(config, 1, 64))
    assert traces.count() == 1
    counts = []
    while cache.lengths[0] < cache.capacity:
        logits, cache = forward(params, tokens(1), cache)
        counts.append(traces.count())
    assert counts == [1] + [0] * 54
    assert logits.shape == (1, 1, config.vocab_size)


def test_nothing_at_all_is_traced_per_token(traces: Traces) -> None:
    config, params = model(1012)
    cache = init_cache(config, 1, 64)
    _, cache = forward(params, tokens(3), cache)
    _, cache = forward(params, tokens(1), cache)
    traces.all()
    for _ in range(20):
        _, cache = forward(params, tokens(1), cache)
    assert not traces.all()


def test_growing_the_cache_is_one_more_trace(traces: Traces) -> None:
    config, params = model(1003)
    _, cache = forward(params, tokens(1), init_cache(config, 1, 16))
    assert traces.count() == 1
    cache = grow_cache(cache, 17)
    counts = []
    for _ in range(5):
        _, cache = forward(params, tokens(1), cache)
        counts.append(traces.count())
    assert counts == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_all_layers_share_a_trace(traces: Traces, n_layers: int) -> None:
    config, params = model(1100 + n_layers, n_layers)
    _, cache = forward(params, tokens(9), init_cache(config, 1, 64))
    assert traces.count() == 1
    forward(params, tokens(1), cache)
    assert traces.count() == 1


def test_another_batch_size_is_one_more_trace(traces: Traces) -> None:
    config, params = model(1004)
    counts = []
    for batch in (1, 3, 1, 3):
        forward(params, tokens(9, batch), init_cache(config, batch, 64))
        counts.append(traces.count())
    assert counts == [1, 1, 0, 0]


def test_lengths_and_positions_are_no_traces(traces: Traces) -> None:
    config, params = model(1005)
    counts = []
    cache = init_cache(config, 3, 64)
    for lengths in ([9, 1, 4], [0, 9, 2], [9, 9, 9], [1, 0, 9]):
        _, cache = forward(params, tokens(9, 3), cache, lengths=lengths)
        counts.append(traces.count())
    assert counts == [1, 0, 0, 0]


def test_padding_that_has_no_room_is_one_more_trace(traces: Traces) -> None:
    """10 tokens are padded to 16, for which there is room behind at most 4 of 20."""
    config, params = model(1006)
    cache = init_cache(config, 1, 20)
    counts = []
    for _ in range(11):
        traces.count()
        forward(params, tokens(10), cache)
        counts.append(traces.count())
        _, cache = forward(params, tokens(1), cache)
    assert counts == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_chunks_are_traced_once(traces: Traces) -> None:
    config, params = model(1007)
    forward(params, tokens(32), init_cache(config, 1, 64), chunk_size=8)
    assert traces.count() == 1


def test_trees_from_arrays_in_any_order_share_a_trace(traces: Traces) -> None:
    """MLX traces anew where a dict's keys come in another order, which `nest` puts right."""
    config, params = model(1008)
    forward(params, tokens(1), init_cache(config, 1, 16))
    assert traces.count() == 1
    leaves: Any = tree_flatten(params)
    forward(nest(dict(reversed(leaves)), config), tokens(1), init_cache(config, 1, 16))
    assert traces.count() == 0
