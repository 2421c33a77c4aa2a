"""What is traced: the block once for each shape that it meets, and never for a token, a position or a layer.

On the CPU, where layers are called as they are, that is how often they are checked; both are counted alike.
Every test has a `moe_loss_weight` of its own, which makes its config a new static value, for which nothing is traced
yet.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.model.cache import Cache, grow_cache, init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params, nest
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import Backend, as_if, compiles


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
    # The CPU's kernel for single tokens takes the place of every block.
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"), as_if(kernels=False):
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


INNER = {"norm_attn_norm", "attn", "moe", "router", "mix_experts"}
POSITIONS_AND_BLOCK = {"in_cache", "block"}
EVERYTHING = POSITIONS_AND_BLOCK | {"embed", "head"}


@pytest.mark.parametrize("machine", ["cpu", "metal", "cuda"])
def test_each_cause_has_the_traces_that_the_documentation_says(traces: Traces, machine: Backend) -> None:
    """The table in `docs/architecture.md`."""
    config, params = model(1014)
    found: dict[str, set[str]] = {}

    def run(cause: str, cache: Cache, time: int, params: Params = params, **options: Any) -> Cache:
        after: Cache = forward(params, tokens(time, cache.batch_size), cache, **options)[1]
        counts = traces.all()
        inner = {name for name in INNER if counts.pop(name, 0)}
        assert inner == (INNER if "block" in counts else set()) or not compiles(), cause
        assert set(counts.values()) <= {1}, cause
        found[cause] = set(counts)
        return after

    with as_if(backend=machine):
        prompted = run("first", init_cache(config, 9, 300), 16)
        other = init_params(config, mx.random.key(1))
        run("other parameters, another length", init_cache(config, 9, 300), 9, other)
        run("first padding of the caller's", init_cache(config, 9, 300), 9, lengths=[9, 0, 4, 9, 1, 0, 0, 2, 3])
        run("other lengths", init_cache(config, 9, 300), 16, lengths=[0, 2, 0, 16, 1, 0, 0, 2, 3])
        run("another bucket", prompted, 17)
        decoded = run("first decoded token", prompted, 1)
        run("a further token", decoded, 1)
        run("past 128", replace(prompted, lengths=(16, 120, *(16,) * 7)), 16)
        run("first last_only", init_cache(config, 9, 300), 16, last_only=True)
        run("another capacity", grow_cache(prompted, 301), 1)
        run("padding wraps", replace(prompted, lengths=(290, *(0,) * 8)), 10)
        run("another batch size", init_cache(config, 6, 300), 16)
        deeper = replace(config, n_layers=3, max_seq_len=99, initializer_range=1.0)
        run("another depth", init_cache(deeper, 9, 300), 16, init_params(deeper, mx.random.key(0)))
        half = replace(config, dtype="bfloat16")
        run("another dtype", init_cache(half, 9, 300), 16, init_params(half, mx.random.key(0)))
        run("another field", init_cache(model(1015)[0], 9, 300), 16)
        blocks = [dict(reversed(list(layer.items()))) for layer in params["transformer"]["blocks"]]
        turned: Any = {**params, "transformer": {**params["transformer"], "blocks": blocks}}
        run("another order", init_cache(config, 9, 300), 16, turned)

    assert found == {
        "first": EVERYTHING,
        "other parameters, another length": set(),
        "first padding of the caller's": {"embed"},
        "other lengths": set(),
        "another bucket": EVERYTHING,
        "first decoded token": EVERYTHING,
        "a further token": set(),
        "past 128": POSITIONS_AND_BLOCK,
        "first last_only": {"block"},
        "another capacity": POSITIONS_AND_BLOCK,
        "padding wraps": POSITIONS_AND_BLOCK,
        "another batch size": EVERYTHING,
        "another depth": set(),
        "another dtype": EVERYTHING,
        "another field": EVERYTHING,
        "another order": {"block"},
    }
