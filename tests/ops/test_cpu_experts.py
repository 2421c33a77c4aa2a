"""The CPU's kernel for the experts, against a loop in float64 and against its stock twin."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.ops.experts import ExpertsParams, mix_experts
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cpu import experts as kernel
from dbrx_fn.ops.kernels.cpu.library import has_kernels, set_threads
from dbrx_fn.runtime.device import as_if
from tests.support.cpu_matrices import KINDS, Kind, in_float64, matrix

pytestmark = pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")

Call = tuple[ExpertsParams, mx.array, mx.array, mx.array]


def call(kind: Kind, *, experts: int, d_model: int, hidden: int, tokens: int, top_k: int, chosen: int = 0) -> Call:
    """Arguments for the experts. Tokens choose among the first `chosen` experts, or among all."""
    inner = matrix(kind, (experts, hidden, d_model)), matrix(kind, (experts, hidden + 1, d_model))
    up = {name: leaf[:, 1:] for name, leaf in inner[1].items()}  # type: ignore[index]
    params = {"w1": inner[0], "v1": up, "w2": matrix(kind, (experts, d_model, hidden))}
    keys = mx.random.split(mx.random.key(tokens), 3)
    x = mx.random.normal((tokens, d_model), key=keys[0])
    weights = mx.random.uniform(shape=(tokens, top_k), key=keys[1])
    return params, x, weights, mx.random.randint(0, chosen or experts, (tokens, top_k), key=keys[2])  # type: ignore[return-value]


def ours(args: Call) -> mx.array:
    params, x, weights, top = args
    assert kernel.fits(params, x, weights, top, activation="silu")
    return mix_experts(params, x, weights, top, activation="silu", cached=True)


def in_a_loop(args: Call, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """The output in float64, and the size of what is added up."""
    params, x, weights, top = args
    w1, v1, w2 = (in_float64(params[name], kind) for name in ("w1", "v1", "w2"))
    rows = np.array(x).astype(np.float64)
    out, size = np.zeros_like(rows), np.zeros_like(rows)
    for token, (chosen, shares) in enumerate(zip(np.array(top), np.array(weights), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = w1[expert] @ rows[token], v1[expert] @ rows[token]
            hidden = gate / (1 + np.exp(-gate)) * up
            widest = (np.abs(w1[expert]) @ np.abs(rows[token])) * (np.abs(v1[expert]) @ np.abs(rows[token]))
            out[token] += share * (w2[expert] @ hidden)
            size[token] += share * (np.abs(w2[expert]) @ widest)
    return out, size


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    experts=st.integers(1, 6),
    chosen=st.integers(1, 6),
    groups=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    odd=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 4),
)
def test_it_is_the_loop_over_tokens_for_any_routing(
    kind: Kind, experts: int, chosen: int, groups: tuple[int, int], odd: tuple[int, int], tokens: int, top_k: int
) -> None:
    widths = [
        kind.group_size * n if isinstance(kind, Format) else 32 * n + more for n, more in zip(groups, odd, strict=True)
    ]
    args = call(
        kind,
        experts=experts,
        d_model=widths[0],
        hidden=widths[1],
        tokens=tokens,
        top_k=top_k,
        chosen=min(chosen, experts),
    )
    found, (exact, size) = np.array(ours(args)), in_a_loop(args, kind)
    assert np.all(np.abs(found - exact) <= 5e-7 * size)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_s_bits_are_its_own(kind: Kind) -> None:
    params, x, weights, top = call(kind, experts=4, d_model=256, hidden=384, tokens=50, top_k=3)
    among = np.array(ours((params, x, weights, top)))
    for first, last in ((0, 1), (17, 18), (5, 7), (20, 41)):
        some = ours((params, x[first:last], weights[first:last], top[first:last]))
        assert np.array_equal(np.array(some), among[first:last])


@pytest.mark.parametrize("kind", [mx.float32, Format(4, 64)], ids=str)
def test_bits_are_the_same_for_any_number_of_threads(kind: Kind) -> None:
    # One expert has more rows than pass by at once.
    args = call(kind, experts=5, d_model=128, hidden=320, tokens=400, top_k=2, chosen=2)
    made = []
    try:
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            made.append(np.array(ours(args)).tobytes())
    finally:
        set_threads(2)
    assert len(set(made)) == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_error_is_no_larger_than_the_twin_s(kind: Kind) -> None:
    args = call(kind, experts=4, d_model=512, hidden=768, tokens=64, top_k=2)
    exact, _ = in_a_loop(args, kind)
    with as_if(kernels=False):
        stock = mix_experts(*args, activation="silu")
    errors = [np.linalg.norm(np.array(made) - exact) for made in (ours(args), stock)]
    assert errors[0] <= 1.1 * errors[1]


def test_an_expert_that_does_not_exist_reads_no_other_memory() -> None:
    params, x, weights, top = call(mx.float32, experts=3, d_model=64, hidden=32, tokens=9, top_k=2)
    wrong = mx.where(mx.arange(9)[:, None] == 4, 2**30, top)
    found, right = (np.array(ours((params, x, weights, one))) for one in (wrong, top))
    kept = np.arange(9) != 4
    assert np.array_equal(found[kept], right[kept])


def test_gradients_are_the_twin_s() -> None:
    params, x, weights, top = call(mx.float32, experts=3, d_model=40, hidden=24, tokens=7, top_k=2)

    def loss(cached: bool) -> Callable[..., mx.array]:
        def of(params: ExpertsParams, x: mx.array, weights: mx.array) -> mx.array:
            mixed = mix_experts(params, x, weights, top, activation="silu", cached=cached)
            return (mixed * mx.arange(40)).sum()

        return of

    found, stock = (mx.grad(loss(cached), argnums=[0, 1, 2])(params, x, weights) for cached in (True, False))
    for name in ("w1", "v1", "w2"):
        assert mx.allclose(found[0][name]["weight"], stock[0][name]["weight"], rtol=1e-4, atol=1e-3)
    assert mx.allclose(found[1], stock[1], rtol=1e-4, atol=1e-3)
    assert mx.allclose(found[2], stock[2], rtol=1e-4, atol=1e-3)
