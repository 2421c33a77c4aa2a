"""The CPU's kernel for single tokens takes adapters, as exactly as its stock twin, and a row's bits stay its own."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.adapters import Adapters, add_adapters, fuse_adapters
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import KINDS, Kind, nest
from dbrx_fn.model.quantization import dequantize
from dbrx_fn.model.stacked_adapters import choose_adapters, stack_adapters
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cpu.library import default_threads, has_kernels, set_threads
from dbrx_fn.runtime.device import as_if
from tests.support import oracle
from tests.support.adapters import with_random_adapters
from tests.support.single_tokens import (
    FORMATS,
    LENGTHS,
    SHORT,
    TOKENS,
    case,
    in_format,
    prompted,
    raw_config,
    takes,
    tokens_at,
)
from tests.support.trees import Case, as_float64, case_of, relative_error, tensors_of

pytestmark = pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")

EACH: list[tuple[Kind, ...]] = [*((kind,) for kind in KINDS), KINDS]


def exact_logits(params: Params, made: Case) -> np.ndarray:
    """float64 logits `[row vocab]` of `SHORT`'s next tokens, by a dense tree with the adapters merged."""
    fused = fuse_adapters(dequantize(params, made.config), made.config)
    return np.array(
        [oracle.forward(made.raw, tensors_of(fused), TOKENS[row, : n + 1])[n] for row, n in enumerate(SHORT)]
    )


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kinds", EACH, ids="-".join)
def test_logits_are_no_further_from_float64_than_the_twin_s(kinds: tuple[Kind, ...], form: Format | None) -> None:
    config, tokens = case().config, tokens_at(SHORT)
    params = with_random_adapters(in_format(case(), form), config, kinds, rank=8)
    exact, cache = exact_logits(params, case()), prompted(params, config, SHORT)
    plain, _ = forward(in_format(case(), form), tokens, cache)
    assert relative_error(plain[:, 0], exact) > 1e-3
    assert takes(params, tokens, cache)
    ours, _ = forward(params, tokens, cache)
    with as_if(kernels=False):
        twin, _ = forward(params, tokens, cache)
    errors = [np.linalg.norm(as_float64(made[:, 0]) - exact) for made in (ours, twin)]
    assert errors[0] <= max(1.1 * errors[1], 1e-6 * np.linalg.norm(exact))
    assert relative_error(ours, as_float64(twin)) <= 5e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_floats_are_closer_to_float64_than_the_twin_s(dtype: Dtype) -> None:
    made = case_of(raw_config(), np.random.default_rng(1), dtype)
    params = with_random_adapters(made.params, made.config, KINDS, rank=8)
    wide = {path: leaf.astype(mx.float32) for path, leaf in dict(tree_flatten(params)).items()}
    exact = exact_logits(nest(wide, case().config), replace(made, config=case().config))
    cache, tokens = prompted(params, made.config, SHORT), tokens_at(SHORT)
    assert takes(params, tokens, cache)
    ours, _ = forward(params, tokens, cache)
    with as_if(kernels=False):
        twin, _ = forward(params, tokens, cache)
    assert ours.dtype == getattr(mx, dtype)
    errors = [np.linalg.norm(as_float64(made[:, 0]) - exact) for made in (ours, twin)]
    assert errors[0] <= 1.1 * errors[1]


@settings(max_examples=40)
@given(
    half=st.integers(3, 20),
    kv=st.integers(1, 3),
    ffn=st.integers(1, 70),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    kinds=st.lists(st.sets(st.sampled_from(KINDS), min_size=1), min_size=3, max_size=3),
    several=st.booleans(),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_adapters_of_every_size_are_the_twin_s(
    half: int,
    kv: int,
    ffn: int,
    ranks: list[int],
    kinds: list[set[Kind]],
    several: bool,
    batch: int,
    seed: int,
) -> None:
    width = 4 * half * kv
    raw = raw_config(d_model=width, n_heads=2 * kv, kv_n_heads=kv, ffn_hidden_size=ffn)
    made = case_of(raw, np.random.default_rng(seed))
    most = {"router": made.config.ffn.moe_num_experts, "experts": min(ffn, width)}
    trees: list[Params] = []
    for rank, own in zip(ranks, kinds, strict=False):
        fitting = min(rank, *(most.get(kind, width) for kind in own))
        trees.append(with_random_adapters(made.params, made.config, sorted(own), rank=fitting, seed=len(trees)))
    params, lengths = trees[0], tuple(3 + row for row in range(batch))
    if several:
        stack = stack_adapters(made.params, made.config, trees)
        params = choose_adapters(stack, [(seed + row) % (len(trees) + 1) for row in range(batch)])
    cache, tokens = prompted(params, made.config, lengths, 64), tokens_at(lengths)
    assert takes(params, tokens, cache)
    logits, after, experts = forward(params, tokens, cache, with_experts=True)
    with as_if(kernels=False):
        twin, twin_after, twin_experts = forward(params, tokens, cache, with_experts=True)
    assert relative_error(logits, as_float64(twin)) <= 5e-6
    assert np.array_equal(np.sort(np.array(experts), -1), np.sort(np.array(twin_experts), -1))
    for ours, stock in zip(after.keys + after.values, twin_after.keys + twin_after.values, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(stock), atol=1e-4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_fresh_adapters_leave_the_logits_bitwise_as_they_were(form: Format | None) -> None:
    config, plain = case().config, in_format(case(), form)
    fresh = add_adapters(plain, config, Adapters(8, targets=KINDS), mx.random.key(0))
    cache, tokens = prompted(plain, config, LENGTHS), tokens_at(LENGTHS)
    assert takes(fresh, tokens, cache)
    assert mx.array_equal(forward(fresh, tokens, cache)[0], forward(plain, tokens, cache)[0])


def mixed_rows(params: Params, rows: tuple[int, ...], prompt: Cache, stack: Params | None) -> list[bytes]:
    """Each of these rows' logits and keys after two steps. `prompt` is a cache of `LENGTHS`."""
    index, found = mx.array(rows), []
    cache = replace(
        prompt,
        lengths=tuple(LENGTHS[row] for row in rows),
        keys=tuple(keys[index] for keys in prompt.keys),
        values=tuple(values[index] for values in prompt.values),
    )
    own = params if stack is None else choose_adapters(stack, [row % 3 for row in rows])
    for step in range(2):
        tokens = mx.array([[int(TOKENS[row, LENGTHS[row] + step])] for row in rows], mx.int32)
        assert takes(own, tokens, cache)
        logits, cache = forward(own, tokens, cache)
        found.append(np.array(logits))
    return [
        b"".join(step[n].tobytes() for step in found) + b"".join(np.array(keys[n]).tobytes() for keys in cache.keys)
        for n in range(len(rows))
    ]


@pytest.mark.parametrize("form", [None, Format(4, 64), Format(8, 64)], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_row_s_bits_are_the_same_in_any_batch_and_with_any_number_of_threads(
    form: Format | None, several: bool
) -> None:
    config, plain = case().config, in_format(case(), form)
    params = with_random_adapters(plain, config, KINDS, rank=3)
    other = with_random_adapters(plain, config, ("attention", "experts"), rank=20, seed=1)
    stack = stack_adapters(plain, config, [params, other]) if several else None
    prompt = prompted(plain, config, LENGTHS)
    together = mixed_rows(params, (0, 1, 2, 3, 4), prompt, stack)
    assert mixed_rows(params, (4, 2, 0), prompt, stack) == [together[row] for row in (4, 2, 0)]
    for row in range(5):
        assert mixed_rows(params, (row,), prompt, stack) == [together[row]]
    if several:
        # Rows without an adapter have the bits of the model alone.
        assert mixed_rows(plain, (0, 3), prompt, None) == [together[0], together[3]]
    try:
        for threads in (1, 3, 8):
            set_threads(threads)
            assert mixed_rows(params, (0, 1, 2, 3, 4), prompt, stack) == together
    finally:
        set_threads(default_threads())


def test_an_adapter_that_overflows_changes_only_its_own_rows() -> None:
    config, plain = case().config, case().params
    wild = dict(tree_flatten(with_random_adapters(plain, config, KINDS)))
    wild |= {path: leaf * 3e38 for path, leaf in wild.items() if path.endswith("lora_a")}
    stack = stack_adapters(plain, config, [nest(wild, config), with_random_adapters(plain, config, KINDS, seed=1)])
    cache, tokens = prompted(plain, config, SHORT), tokens_at(SHORT)
    logits, _ = forward(choose_adapters(stack, [2, 1, 0]), tokens, cache)
    expected, _ = forward(choose_adapters(stack, [2, 0, 0]), tokens, cache)
    assert mx.isnan(logits[1]).all()
    assert mx.array_equal(logits[mx.array([0, 2])], expected[mx.array([0, 2])])


def test_derivatives_are_those_of_stock_operations() -> None:
    config = case().config
    params: Any = with_random_adapters(case().params, config, KINDS)
    cache, tokens = prompted(params, config, SHORT), tokens_at(SHORT)
    head = params["lm_head"]

    def loss(a: mx.array, b: mx.array) -> mx.array:
        changed: Any = {**params, "lm_head": {**head, "lora_a": a, "lora_b": b}}
        logits, _ = forward(changed, tokens, cache)
        return (logits**2).sum()

    ours = mx.grad(loss, argnums=[0, 1])(head["lora_a"], head["lora_b"])
    with as_if(kernels=False):
        stock = mx.grad(loss, argnums=[0, 1])(head["lora_a"], head["lora_b"])
    for found, expected in zip(ours, stock, strict=True):
        assert relative_error(found, as_float64(expected)) <= 1e-4


def test_scales_of_another_batch_are_refused() -> None:
    config = case().config
    stack = stack_adapters(case().params, config, [with_random_adapters(case().params, config, KINDS)])
    cache, tokens = prompted(case().params, config, SHORT), tokens_at(SHORT)
    other = choose_adapters(stack, [0, 1])
    assert not takes(other, tokens, cache)
    with pytest.raises(CheckpointError, match=r"lora_scale is \[2, 4\] where \[3, 4\] \(rows rank\) is expected"):
        forward(other, tokens, cache)
