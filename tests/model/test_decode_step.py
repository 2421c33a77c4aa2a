"""The CPU's kernel for single tokens: as exact as its stock twin, and each row's bits are its own."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dbrx_fn
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model import decode_step
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.quantization import dequantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cpu import library
from dbrx_fn.ops.kernels.cpu.library import default_threads, has_kernels, set_threads
from dbrx_fn.runtime.device import as_if
from tests.support import oracle
from tests.support.single_tokens import (
    FORMATS,
    LENGTHS,
    SHORT,
    TOKENS,
    VOCAB,
    case,
    in_format,
    prompted,
    raw_config,
    takes,
    tokens_at,
)
from tests.support.trees import Case, as_float64, case_of, tensors_of

pytestmark = pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_logits_are_no_further_from_float64_than_the_twin_s(form: Format | None) -> None:
    config, params = case().config, in_format(case(), form)
    exact = oracle_logits(params, case(), 3)
    errors = []
    for kernels in (True, False):
        cache = prompted(params, config, SHORT)
        found = []
        for step in range(3):
            tokens = tokens_at(SHORT, step)
            assert takes(params, tokens, cache)
            with as_if(kernels=kernels):
                logits, cache = forward(params, tokens, cache)
            found.append(as_float64(logits[:, 0]))
        errors.append(np.linalg.norm(np.array(found) - exact))
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] <= 2e-6 * np.linalg.norm(exact)


def oracle_logits(params: Params, made: Case, steps: int) -> np.ndarray:
    """float64 `[step row vocab]`."""
    dense = params if params is made.params else dequantize(params, made.config)
    rows = [
        oracle.forward(made.raw, tensors_of(dense), TOKENS[row, : length + steps])[length:]
        for row, length in enumerate(SHORT)
    ]
    return np.array(rows).swapaxes(0, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_floats_are_closer_to_float64_than_the_twin_s(dtype: Any) -> None:
    made = case_of(raw_config(), np.random.default_rng(1), dtype)
    exact = oracle_logits(made.params, made, 1)[0]
    cache, tokens = prompted(made.params, made.config, SHORT), tokens_at(SHORT)
    assert takes(made.params, tokens, cache)
    ours, after = forward(made.params, tokens, cache)
    with as_if(kernels=False):
        twin, _ = forward(made.params, tokens, cache)
    assert ours.dtype == twin.dtype == after.keys[0].dtype == getattr(mx, dtype)
    assert np.linalg.norm(as_float64(ours[:, 0]) - exact) <= 1.1 * np.linalg.norm(as_float64(twin[:, 0]) - exact)


@settings(max_examples=40)
@given(
    group=st.integers(1, 3),
    kv=st.integers(1, 3),
    half=st.integers(3, 20),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 70),
    experts=st.integers(1, 9),
    top=st.integers(1, 9),
    norm=st.sampled_from([None, 1.0, 2.0, 3.5]),
    clip=st.sampled_from([None, 0.5, 8.0]),
    batch=st.integers(1, 5),
    position=st.integers(1, 30),
)
def test_every_shape_is_the_twin_s(
    group: int,
    kv: int,
    half: int,
    layers: int,
    ffn: int,
    experts: int,
    top: int,
    norm: float | None,
    clip: float | None,
    batch: int,
    position: int,
) -> None:
    raw = raw_config(
        d_model=2 * half * group * kv,
        n_heads=group * kv,
        kv_n_heads=kv,
        n_layers=layers,
        clip_qkv=clip,
        ffn_hidden_size=ffn,
        moe_num_experts=experts,
        moe_top_k=min(top, experts),
        moe_normalize_expert_weights=norm,
    )
    made = case_of(raw, np.random.default_rng(half))
    lengths = tuple(position + row for row in range(batch))
    cache, tokens = prompted(made.params, made.config, lengths, 64), tokens_at(lengths)
    assert takes(made.params, tokens, cache)
    logits, after, experts_found = forward(made.params, tokens, cache, with_experts=True)
    with as_if(kernels=False):
        twin, twin_after, twin_experts = forward(made.params, tokens, cache, with_experts=True)
    assert np.abs(np.array(logits - twin)).max() <= 1e-4 * np.abs(np.array(twin)).max()
    assert np.array_equal(np.sort(np.array(experts_found), -1), np.sort(np.array(twin_experts), -1))
    assert after.lengths == twin_after.lengths
    for ours, stock in zip(after.keys + after.values, twin_after.keys + twin_after.values, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(stock), atol=1e-4)


def bits(params: Params, prompt: Cache, rows: tuple[int, ...]) -> list[bytes]:
    """Each of these rows' logits and keys after three steps. `prompt` is a cache of `LENGTHS`."""
    index = mx.array(rows)
    cache = replace(
        prompt,
        lengths=tuple(LENGTHS[row] for row in rows),
        keys=tuple(keys[index] for keys in prompt.keys),
        values=tuple(values[index] for values in prompt.values),
    )
    found = []
    for step in range(3):
        tokens = mx.array([[int(TOKENS[row, LENGTHS[row] + step])] for row in rows], mx.int32)
        logits, cache = forward(params, tokens, cache)
        found.append(np.array(logits))
    return [
        b"".join(step[n].tobytes() for step in found) + b"".join(np.array(keys[n]).tobytes() for keys in cache.keys)
        for n in range(len(rows))
    ]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_s_bits_are_the_same_alone_and_in_any_batch(form: Format | None) -> None:
    params = in_format(case(), form)
    prompt = prompted(case().params, case().config, LENGTHS)
    together = bits(params, prompt, (0, 1, 2, 3, 4))
    assert bits(params, prompt, (4, 2, 0)) == [together[row] for row in (4, 2, 0)]
    for row in (0, 1, 3):
        assert bits(params, prompt, (row,)) == [together[row]]


@pytest.mark.parametrize("form", [None, Format(4, 64)], ids=str)
def test_bits_are_the_same_for_any_number_of_threads(form: Format | None) -> None:
    params, found = in_format(case(), form), []
    prompt = prompted(case().params, case().config, LENGTHS)
    try:
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            found.append(bits(params, prompt, (0, 1, 2)))
    finally:
        set_threads(default_threads())
    assert found[1:] == found[:1] * 3


def test_long_rows_attend_as_the_twin_does() -> None:
    params, config = case().params, case().config
    cache = prompted(params, config, LENGTHS)
    logits, _ = forward(params, tokens_at(LENGTHS), cache)
    with as_if(kernels=False):
        twin, _ = forward(params, tokens_at(LENGTHS), cache)
    np.testing.assert_allclose(np.array(logits), np.array(twin), atol=5e-6 * float(mx.abs(twin).max()))


def test_greedy_tokens_are_those_of_stock_operations() -> None:
    params, config = load(dbrx_fn.SMALL)
    ours = list(stream_tokens(params, config, [1, 2, 3], max_tokens=120))
    with as_if(kernels=False):
        assert list(stream_tokens(params, config, [1, 2, 3], max_tokens=120)) == ours


def test_the_old_cache_is_still_a_value() -> None:
    params, config = case().params, case().config
    cache = prompted(params, config, LENGTHS)
    before = [np.array(array) for array in cache.keys + cache.values]
    first, _ = forward(params, tokens_at(LENGTHS), cache)
    mx.eval(first)
    again, _ = forward(params, tokens_at(LENGTHS), cache)
    assert mx.array_equal(first, again)
    for array, held in zip(cache.keys + cache.values, before, strict=True):
        assert np.array_equal(np.array(array), held)


def test_layers_of_an_empty_cache_may_share_their_arrays() -> None:
    params, config = case().params, case().config
    # A batch and a capacity that no other test has: the first cache of its kind decides how such steps are launched.
    empty = init_cache(config, 7, 100)
    shared = replace(empty, keys=empty.keys[:1] * config.n_layers, values=empty.keys[:1] * config.n_layers)
    found = []
    for kernels in (True, False):
        cache = shared
        with as_if(kernels=kernels):
            for step in range(4):
                logits, cache = forward(params, mx.full((7, 1), step), cache)
        found.append(logits)
    assert takes(params, mx.full((7, 1), 0), shared)
    np.testing.assert_allclose(np.array(found[0]), np.array(found[1]), rtol=1e-4, atol=1e-5)


def test_a_process_knows_a_bounded_number_of_launches_and_one_twin_of_a_model() -> None:
    params, config = case().params, case().config
    assert takes(params, mx.zeros((1, 1), mx.int32), init_cache(config, 1, 1))
    twins = len(library._twins)
    for capacity in range(1, decode_step._MOST_KNOWN + 20):
        assert takes(params, mx.zeros((1, 1), mx.int32), init_cache(config, 1, capacity))
        assert len(decode_step._known) <= decode_step._MOST_KNOWN
    assert len(library._twins) == twins


def test_a_row_without_a_token_keeps_its_cache_and_changes_no_other() -> None:
    params, config = case().params, case().config
    cache = prompted(params, config, LENGTHS)
    full = replace(cache, lengths=(*cache.lengths[:1], cache.capacity, *cache.lengths[2:]))
    all_logits, _ = forward(params, tokens_at(LENGTHS), cache)
    logits, after = forward(params, tokens_at(LENGTHS), full, lengths=(1, 0, 1, 1, 1))
    assert after.lengths == (301, 384, 121, 256, 257)
    for row in (0, 2, 3, 4):
        assert mx.array_equal(logits[row], all_logits[row])
    for now, then in zip(after.keys + after.values, cache.keys + cache.values, strict=True):
        assert mx.array_equal(now[1], then[1])


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_an_unknown_id_makes_only_its_row_nan(token: int) -> None:
    params, config = case().params, case().config
    cache = prompted(params, config, LENGTHS)
    tokens = tokens_at(LENGTHS)
    expected, _ = forward(params, tokens, cache)
    tokens[2] = token
    logits, after = forward(params, tokens, cache)
    assert mx.isnan(logits[2]).all()
    later, _ = forward(params, tokens_at(LENGTHS, 1), after)
    assert mx.isnan(later[2]).all()
    for row in (0, 1, 3, 4):
        assert mx.array_equal(logits[row], expected[row])
        assert not mx.isnan(later[row]).any()


def test_derivatives_are_those_of_stock_operations() -> None:
    params, config = case().params, case().config
    cache, tokens = prompted(params, config, LENGTHS), tokens_at(LENGTHS)

    def loss(norm: mx.array, keys: mx.array) -> mx.array:
        changed: Any = {**params, "transformer": {**params["transformer"], "norm_f": {"weight": norm}}}
        logits, after = forward(changed, tokens, replace(cache, keys=(keys, *cache.keys[1:])))
        return (logits**2).sum() + after.values[1].sum()

    weight = params["transformer"]["norm_f"]["weight"]
    ours = mx.grad(loss, argnums=[0, 1])(weight, cache.keys[0])
    with as_if(kernels=False):
        stock = mx.grad(loss, argnums=[0, 1])(weight, cache.keys[0])
    for found, expected in zip(ours, stock, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4 * float(mx.abs(expected).max()))


def test_stock_operations_take_what_the_kernel_cannot() -> None:
    config, params = case().config, case().params
    cache, tokens = prompted(params, config, LENGTHS), tokens_at(LENGTHS)
    assert takes(params, tokens, cache)
    assert not takes(params, mx.concatenate([tokens, tokens], axis=1), cache)
    assert not takes(params, tokens, init_cache(config, len(LENGTHS), 0))
    for form in (Format(6, 64), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")):
        assert not takes(in_format(case(), form), tokens, cache)
    gelu = replace(config, ffn=replace(config.ffn, ffn_act_fn="gelu"))
    assert not takes(params, tokens, replace(cache, config=gelu))
    with as_if(kernels=False):
        assert not takes(params, tokens, cache)
