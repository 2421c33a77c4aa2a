"""What Metal and CUDA choose, computed on this machine: their segments, their spans of attention, stock operations.

`as_if` names the back end to choose for. Rounding differs between arrangements, so errors are compared as their root
mean square over several models: what another machine computes is as near to the oracle as what this one does.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.shapes import attended, time_bucket
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.ops.cpu import on_linux_cpu
from dbrx_fn.ops.dispatch import segment_rows
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import Backend, as_if, backend, on_cpu
from dbrx_fn.training.step import Recipe, gradients
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import Case, as_float64, case_of, random_case, relative_error, tensors_of

pytestmark = pytest.mark.skipif(not on_cpu(), reason="a GPU's own arrangement is what all other tests compute there")

Measured = Callable[[str, float], float]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MACHINES: tuple[Backend, ...] = ("metal", "cuda")
TIME, CAPACITY, LONG = 40, 300, 1024

LARGEST: dict[Dtype, float] = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
"""The largest error that a model may have, as a part of its largest logit."""

AS_OWN = 1.5
"""How much larger than this machine's own a typical error may be; 1.3 was seen."""


class Errors(NamedTuple):
    """Of logits to the oracle, as parts of the largest: their root mean square, and the largest."""

    typical: float
    largest: float


def long_case(dtype: Dtype) -> Case:
    """Of two experts that all tokens go to, for the longest segments."""
    return case_of(
        {
            "model_type": "dbrx",
            "d_model": 48,
            "n_heads": 2,
            "n_layers": 1,
            "max_seq_len": 2048,
            "vocab_size": 64,
            "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 1, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 2, "moe_top_k": 2},
        },
        np.random.default_rng(0),
        dtype,
    )


@functools.cache
def dense_cases(dtype: Dtype) -> list[tuple[Case, Ints]]:
    """Models and their tokens. In half precision each token goes to every expert, as rounding changes close choices."""
    everywhere = {} if dtype == "float32" else {"moe_num_experts": 4, "moe_top_k": 4}
    random = [random_case(seed, dtype, **everywhere) for seed in range(6)]
    cases = [(case, rng.integers(case.config.vocab_size, size=TIME)) for case, rng in random]
    long = long_case(dtype)
    return [*cases, (long, np.random.default_rng(1).integers(long.config.vocab_size, size=LONG))]


@functools.cache
def quantized_cases(dtype: Dtype) -> list[tuple[Case, Ints]]:
    """A quantized model of each format; its tensors are what it stands for."""
    raw = QUANTIZABLE | {"n_layers": 1, "ffn_config": QUANTIZABLE["ffn_config"] | {"moe_top_k": 4}}
    cases = []
    for seed, form in enumerate((Format(4, 64), Format(8, 128), Format(4, 32, "mxfp4"))):
        rng = np.random.default_rng(seed)
        case = case_of(raw, rng, dtype)
        params = quantize(case.params, case.config, Quantization(form, form, form, form, None))
        in_float32: Any = tree_map(
            lambda leaf: leaf.astype(mx.float32) if mx.issubdtype(leaf.dtype, mx.floating) else leaf, params
        )
        tensors = tensors_of(dequantize(in_float32, replace(case.config, dtype="float32")))
        tokens = rng.integers(case.config.vocab_size, size=TIME)
        cases.append((replace(case, params=params, tensors=tensors), tokens))
    return cases


@functools.cache
def expected_of(dtype: Dtype, *, quantized: bool) -> list[tuple[Case, Ints, Floats]]:
    """Models, their tokens, and the oracle's logits."""
    cases = quantized_cases(dtype) if quantized else dense_cases(dtype)
    return [(case, tokens, case.expected(tokens)) for case, tokens in cases]


def compared(case: Case, tokens: Ints, expected: Floats) -> Iterator[tuple[mx.array, Floats]]:
    """Logits of all that there is to call, and what they must be."""
    params, config, time = case.params, case.config, len(tokens)
    row = mx.array(tokens[None])
    yield forward(params, row, init_cache(config, 1, 0))[0][0], expected
    yield score(params, row, config)[0][0], expected
    yield forward(params, row, init_cache(config, 1, time + CAPACITY))[0][0], expected
    if time > TIME:
        return
    # A prompt, two single tokens, and more than one again.
    cache, half = init_cache(config, 1, CAPACITY), time // 2
    for start, stop in ((0, half), (half, half + 1), (half + 1, half + 2), (half + 2, time)):
        logits, cache = forward(params, row[:, start:stop], cache)
        yield logits[0], expected[start:stop]
    # Two rows that stand at different positions, then a token of each.
    cache = init_cache(config, 2, CAPACITY)
    logits, cache = forward(params, mx.concatenate([row, row]), cache, lengths=[time - 1, 5])
    yield logits[0, :-1], expected[:-1]
    yield logits[1, :5], expected[:5]
    logits, cache = forward(params, mx.array(tokens[[[-1], [5]]]), cache)
    yield logits[:, 0], expected[[-1, 5]]


@functools.cache
def errors(machine: Backend, dtype: Dtype, *, quantized: bool) -> Errors:
    parts = []
    with as_if(backend=machine):
        for case, tokens, expected in expected_of(dtype, quantized=quantized):
            largest = np.abs(expected).max()
            for found, right in compared(case, tokens, expected):
                assert found.dtype == getattr(mx, dtype)
                parts.append(np.ravel(as_float64(found) - right) / largest)
    differences = np.concatenate(parts)
    return Errors(float(np.sqrt((differences**2).mean())), float(np.abs(differences).max()))


def test_another_machine_sees_other_spans_and_takes_stock_operations() -> None:
    for machine in MACHINES:
        with as_if(backend=machine):
            assert (attended(1, 5, CAPACITY), attended(30, 30, CAPACITY)) == (CAPACITY, 32)
            assert not on_linux_cpu()
    assert (attended(1, 5, CAPACITY), attended(30, 30, CAPACITY)) == (128, 128)
    assert on_linux_cpu() == (sys.platform == "linux")


def test_the_cases_have_the_segments_that_other_machines_choose() -> None:
    rows: dict[Backend, set[int]] = {}
    for machine in MACHINES:
        with as_if(backend=machine):
            rows[machine] = {
                segment_rows(time * case.config.ffn.moe_top_k, case.config.ffn.moe_num_experts, getattr(mx, dtype))
                for dtype in get_args(Dtype)
                for case, tokens in dense_cases(dtype)
                for time in (1, time_bucket(len(tokens), 0))
            }
    assert rows == {"metal": {1}, "cuda": {1, 16, 64, 128}}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_logits_are_as_near_to_the_oracle(dtype: Dtype, quantized: bool, measured: Measured) -> None:
    # The CPU's kernels are more exact than stock operations, which the other machines' choices arrange.
    with as_if(kernels=False):
        own = errors(backend(), dtype, quantized=quantized)
    for machine in (backend(), *MACHINES):
        found = errors(machine, dtype, quantized=quantized)
        name = f"{dtype} {'quantized' if quantized else 'dense'} to the oracle as on {machine}"
        assert measured(f"{name}, largest", found.largest) <= LARGEST[dtype]
        assert measured(f"{name}, typical", found.typical) <= AS_OWN * own.typical


def gradients_of(case: Case, tokens: Ints, dtype: Dtype = "float32") -> dict[str, mx.array]:
    config, recipe = replace(case.config, dtype=dtype), Recipe(steps=1, dtype=dtype, z_loss_weight=0.1)
    found = gradients(
        case.params,
        mx.array(tokens.reshape(2, -1)),
        None,
        mx.array(1.0),
        mx.random.key(0),
        config=config,
        recipe=recipe,
    )
    return dict(tree_flatten(found.tree))


@pytest.mark.parametrize("machine", MACHINES)
def test_gradients_are_those_of_this_machines_arrangement(machine: Backend, measured: Measured) -> None:
    # Of seed 0 an entry of q lies on the clip's edge, where rounding decides whether it has a gradient.
    for case, tokens in dense_cases("float32")[1:]:
        own = gradients_of(case, tokens)
        with as_if(backend=machine):
            found = gradients_of(case, tokens)
        for path, leaf in own.items():
            error = relative_error(found[path], as_float64(leaf))
            assert measured(f"gradients arranged for {machine}", error) <= 1e-5, path
