"""The CPU's kernel for rows times a matrix, against float64 and against its stock twin."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cpu import products
from dbrx_fn.ops.kernels.cpu.library import default_threads, has_kernels, set_threads
from dbrx_fn.ops.linear import expert_linear, linear
from dbrx_fn.runtime.device import as_if
from tests.support.cpu_matrices import KINDS, Kind, in_float64, matrix

pytestmark = pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    scales=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    groups=st.integers(1, 9),
    odd=st.integers(0, 40),
    outer=st.integers(1, 40),
    rows=st.integers(1, 30),
)
def test_a_product_is_float64s_and_a_row_s_bits_are_its_own(
    kind: Kind, scales: mx.Dtype, groups: int, odd: int, outer: int, rows: int
) -> None:
    inner = kind.group_size * groups if isinstance(kind, Format) else 32 * groups + odd
    held = matrix(kind, (outer, inner), scales)
    x = mx.random.normal((rows, inner), key=mx.random.key(1))
    assert products.fits(held, x)
    found = products.linear(held, x)
    exact = np.array(x).astype(np.float64) @ in_float64(held, kind).T
    size = np.abs(np.array(x)).astype(np.float64) @ np.abs(in_float64(held, kind)).T
    assert found.shape == (rows, outer)
    assert np.all(np.abs(np.array(found) - exact) <= 3e-7 * size)
    alone = [products.linear(held, x[n : n + 1]) for n in range(rows)]
    assert mx.array_equal(mx.concatenate(alone), found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_error_is_no_larger_than_the_twin_s(kind: Kind) -> None:
    held, x = matrix(kind, (300, 768)), mx.random.normal((4, 768), key=mx.random.key(2))
    exact = np.array(x).astype(np.float64) @ in_float64(held, kind).T
    with as_if(kernels=False):
        stock = linear(held, x)
    errors = [np.linalg.norm(np.array(made) - exact) for made in (linear(held, x), stock)]
    assert errors[0] <= 1.1 * errors[1]


def test_biases_of_another_dtype_than_the_scales_are_left_to_stock_operations() -> None:
    held, x = matrix(Format(4, 64), (8, 128), mx.bfloat16), mx.random.normal((3, 128), key=mx.random.key(2))
    expected = linear(held, x)
    held["biases"] = held["biases"].astype(mx.float32)
    assert mx.allclose(linear(held, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_among_more_than_pass_at_once_has_the_bits_that_it_has_alone(kind: Kind) -> None:
    held, x = matrix(kind, (70, 384)), mx.random.normal((700, 384), key=mx.random.key(2))
    among = products.linear(held, x)
    for first, last in ((0, 1), (239, 242), (698, 700)):
        assert mx.array_equal(products.linear(held, x[first:last]), among[first:last])


def test_bits_are_the_same_for_any_number_of_threads() -> None:
    held, x = matrix(Format(4, 64), (300, 768)), mx.random.normal((50, 768), key=mx.random.key(2))
    made = []
    try:
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            made.append(np.array(products.linear(held, x)).tobytes())
    finally:
        set_threads(default_threads())
    assert len(set(made)) == 1


IN_LITTLE_MEMORY = """
import resource
from pathlib import Path
import mlx.core as mx
from dbrx_fn.ops.kernels.cpu.library import set_threads
from dbrx_fn.ops.linear import linear
held, x = {"weight": mx.random.normal((300, 64))}, mx.random.normal((5, 64))
before = linear(held, x)
mx.eval(before)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
set_threads(256)
print(mx.array_equal(linear(held, x), before).item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_that_may_not_have_all_threads_computes_with_fewer() -> None:
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    outer=st.integers(1, 70),
    experts=st.integers(1, 5),
    segments=st.integers(1, 12),
    rows=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 99),
)
def test_segments_times_their_experts_are_float64s_and_a_row_s_bits_are_its_own(
    kind: Kind, outer: int, experts: int, segments: int, rows: int, seed: int
) -> None:
    inner = 2 * kind.group_size if isinstance(kind, Format) else 19
    held = matrix(kind, (experts, outer, inner))
    x = mx.random.normal((segments, rows, inner), key=mx.random.key(seed))
    chosen = np.sort(np.random.default_rng(seed).integers(0, experts, segments))
    found = expert_linear(held, x, mx.array(chosen.astype(np.int32)), cached=True)
    floats, exact_x = in_float64(held, kind)[chosen], np.array(x).astype(np.float64)
    exact, size = (np.einsum("soi,sri->sro", a, b) for a, b in ((floats, exact_x), (abs(floats), abs(exact_x))))
    assert np.all(np.abs(np.array(found) - exact) <= 3e-7 * size)
    for segment, expert in enumerate(chosen.tolist()):
        own = {name: leaf[expert] for name, leaf in held.items()}  # type: ignore[index]
        assert mx.array_equal(products.linear(own, x[segment]), found[segment])  # type: ignore[arg-type]


def test_segments_of_more_rows_than_pass_at_once_have_the_bits_of_their_own_product() -> None:
    held, x = matrix(Format(4, 64), (3, 70, 384)), mx.random.normal((9, 100, 384), key=mx.random.key(2))
    found = expert_linear(held, x, mx.array([0, 0, 0, 0, 0, 2, 2, 2, 2]), cached=True)
    own = {name: leaf[2] for name, leaf in held.items()}  # type: ignore[index]
    assert mx.array_equal(products.linear(own, x[5:]), found[5:])  # type: ignore[arg-type]
    with as_if(kernels=False):
        stock = expert_linear(held, x, mx.array([0, 0, 0, 0, 0, 2, 2, 2, 2]), cached=True)
    np.testing.assert_allclose(np.array(found), np.array(stock), atol=2e-4)


def test_transformations_are_the_twin_s() -> None:
    held = matrix(mx.float32, (40, 64))
    x = mx.random.normal((2, 3, 64), key=mx.random.key(3))

    def twin(x: mx.array) -> mx.array:
        return mx.exp(x) @ held["weight"].T

    def ours(x: mx.array) -> mx.array:
        return products.linear(held, mx.exp(x))

    def close(a: mx.array, b: mx.array) -> bool:
        return bool(mx.allclose(a, b, rtol=1e-4, atol=1e-4))

    assert close(mx.grad(lambda x: ours(x).sum())(x), mx.grad(lambda x: twin(x).sum())(x))
    assert close(mx.vmap(ours)(x), twin(x))
    assert close(mx.vmap(ours, 1)(x), mx.vmap(twin, 1)(x))
    assert close(mx.compile(ours)(x), twin(x))
    assert close(ours(x.swapaxes(0, 1)), twin(x.swapaxes(0, 1)))
    assert close(mx.jvp(ours, [x], [x])[1][0], mx.jvp(twin, [x], [x])[1][0])
    by_weight = mx.grad(lambda w: products.linear({"weight": w}, x).sum())(held["weight"])
    assert close(by_weight, mx.grad(lambda w: (x @ w.T).sum())(held["weight"]))
