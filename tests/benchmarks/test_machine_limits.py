"""A machine's limits are limits: the best rates that it showed, and no less for what its caches hold."""

import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from statistics import median

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_fn.benchmarks.inference import measure_inference, our_program
from dbrx_fn.benchmarks.machine import MachineLimits, measure_limits, read_seconds
from dbrx_fn.benchmarks.machine_rates import best_rate, memory_rates
from dbrx_fn.benchmarks.plan import Cases, drawn_weights, plan_random
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.costs import decode_work

LIMITS = MachineLimits(
    backend="cpu",
    device="a model",
    mlx="0",
    blas=None,
    dtype="float32",
    memory=1,
    memory_rates=((10, 50.0), (100, 20.0), (1000, 25.0), (10_000, 5.0)),
    matmul_rate=1e12,
)


@pytest.fixture(scope="module")
def measured_limits() -> MachineLimits:
    return measure_limits("float32")


@pytest.mark.parametrize(
    ("size", "rate"),
    [(1, 50), (10, 50), (99, 50), (100, 25), (999, 25), (1000, 25), (9999, 25), (10_000, 5), (10**9, 5)],
)
def test_what_a_cache_may_hold_is_read_at_its_rate(size: int, rate: float) -> None:
    assert LIMITS.bandwidth(size) == rate


@given(
    st.dictionaries(st.integers(1, 2**40), st.floats(1, 1e15), min_size=1).map(
        lambda rates: tuple(sorted(rates.items()))
    ),
    st.integers(0, 2**41),
)
def test_no_rate_of_as_many_bytes_or_more_is_above_the_limit(rates: tuple[tuple[int, float], ...], size: int) -> None:
    limits = replace(LIMITS, memory_rates=rates)
    assert all(rate <= limits.bandwidth(size) for measured, rate in rates if measured >= size)
    assert limits.bandwidth(size) <= limits.bandwidth(size // 2)


def test_a_rate_is_that_of_the_fastest_repetition() -> None:
    waits = iter([0, 0.05, 0.4, 0.02, *repeat(0.4, 9)])
    rate = best_rate(lambda _: time.sleep(next(waits)))
    assert 1 / 0.4 < rate <= 1 / 0.02


def test_short_operations_are_waited_for_together() -> None:
    counts: list[int] = []
    best_rate(counts.append, most=8)
    assert counts == [1, 1, *[8] * (len(counts) - 2)]
    assert len(counts) > 3


def test_no_product_reads_a_matrix_faster_than_the_limit() -> None:
    """Of a size that the processor's caches hold."""
    matrix, row = mx.random.normal((512, 1024)), mx.random.normal((1, 1024))

    def rate() -> float:
        start = time.perf_counter()
        mx.eval([row @ matrix.T for _ in range(50)])
        return 50 * matrix.nbytes / (time.perf_counter() - start)

    def holds() -> bool:
        limits = replace(LIMITS, memory_rates=memory_rates())
        return median([rate() for _ in range(9)]) < 1.5 * limits.bandwidth(matrix.nbytes)

    # Other programs take some of the machine, now more and now less.
    assert any(holds() for _ in range(3))


def test_nothing_measured_exceeds_its_bound(measured_limits: MachineLimits) -> None:
    config = Config(
        d_model=256,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        vocab_size=1000,
        attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
        ffn=FFNConfig(ffn_hidden_size=256, moe_num_experts=8, moe_top_k=2),
        dtype="float32",
    )
    planned = plan_random("small", config, None, None, None)
    program = our_program(drawn_weights(planned), config)
    figures = measure_inference([program], planned, Cases((64, 256), (64,), (1, 8), 8, 3), measured_limits)
    assert len(figures) == 6
    for figure in figures:
        assert figure.bytes is not None
        assert figure.bound is not None
        assert figure.fraction_of_bound is not None
        assert 0 < figure.fraction_of_bound < 1
        assert figure.bound >= figure.bytes / measured_limits.bandwidth(figure.bytes)
    alone = decode_work(config, {}, 64 + Cases((), (), (), 8, 3).steps / 2, 1)
    assert [figure.bytes for figure in figures if figure.batch_size == 1 and figure.what == "decode"] == [alone.bytes]


def test_files_are_read_whole(tmp_path: Path) -> None:
    for name, size in (("empty", 0), ("one", 1), ("long", 40_000_000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert 0 < read_seconds(sorted(tmp_path.iterdir())) < 20
