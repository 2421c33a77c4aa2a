"""`forward` computes what transformers and mlx-lm compute, wherever those compute what the config says."""

import functools
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.activations import ACT2FN

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Activation
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.activations import ACTIVATIONS
from tests.peers import reference
from tests.support.checkpoints import random_config, write_fused
from tests.support.trees import Case, as_float64, case_of, random_case, relative_error

Measured = Callable[[str, float], float]

SEEDS = range(24)
MLX_LM_SEEDS = list(
    islice((s for s in count() if reference.mlx_lm_is_right(random_config(np.random.default_rng(s)))), 24)
)
BAR = 5e-6


@functools.cache
def case_and_tokens(seed: int) -> tuple[Case, list[int]]:
    """A model and 1 to 40 tokens; the first seed's are 40, the second's 1."""
    case, rng = random_case(seed)
    time = {0: 40, 1: 1}.get(seed, int(rng.integers(1, 41)))
    return case, rng.integers(case.config.vocab_size, size=time).tolist()


def our_logits(case: Case, tokens: list[int], capacity: int = 0) -> NDArray[np.float64]:
    """Logits `[time vocab]`."""
    logits, _ = forward(case.params, mx.array([tokens]), init_cache(case.config, 1, capacity))
    return as_float64(logits[0])


def our_greedy(case: Case, tokens: list[int], n: int) -> list[int]:
    """The `n` likeliest next tokens, through the cache."""
    cache = init_cache(case.config, 1, len(tokens) + n)
    out: list[int] = []
    step = list(tokens)
    for _ in range(n):
        logits, cache = forward(case.params, mx.array([step]), cache, last_only=True)
        step = [int(np.array(logits[0, 0]).argmax())]
        out += step
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers(seed: int, measured: Measured) -> None:
    case, tokens = case_and_tokens(seed)
    model = reference.transformers_model(case.raw, case.tensors, "float64")
    ours = our_logits(case, tokens)
    assert (
        measured(
            "float32 to transformers in float64", relative_error(ours, reference.transformers_logits(model, tokens))
        )
        <= BAR
    )
    assert relative_error(ours, reference.transformers_logits(reference.in_float64(model), tokens)) <= BAR


@pytest.mark.parametrize("seed", MLX_LM_SEEDS)
def test_logits_equal_mlx_lm(seed: int, tmp_path: Path, measured: Measured) -> None:
    case, tokens = case_and_tokens(seed)
    write_fused(tmp_path, case.raw, case.tensors)
    theirs = reference.mlx_lm_logits(reference.mlx_lm_model(tmp_path), tokens)
    assert measured("float32 to mlx-lm", relative_error(our_logits(case, tokens), theirs)) <= BAR


def smallest_margin(case: Case, tokens: list[int], continuation: list[int]) -> float:
    """By how much, as a part of the largest logit, the likeliest token leads where that is the closest."""
    logits = np.sort(case.expected(tokens + continuation[:-1])[len(tokens) - 1 :], axis=1)
    return float(((logits[:, -1] - logits[:, -2]) / np.abs(logits).max()).min())


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_continuations_equal_transformers(seed: int) -> None:
    case, tokens = case_and_tokens(seed)
    theirs = reference.transformers_greedy(reference.transformers_model(case.raw, case.tensors), tokens, 64)
    margin = smallest_margin(case, tokens, theirs)
    assert our_greedy(case, tokens, 64) == theirs, f"the closest choice has a margin of {margin:.1e}"


@pytest.mark.parametrize("seed", MLX_LM_SEEDS)
def test_greedy_continuations_equal_mlx_lm(seed: int, tmp_path: Path) -> None:
    case, tokens = case_and_tokens(seed)
    write_fused(tmp_path, case.raw, case.tensors)
    theirs = reference.mlx_lm_greedy(reference.mlx_lm_model(tmp_path), tokens, 64)
    margin = smallest_margin(case, tokens, theirs)
    assert our_greedy(case, tokens, 64) == theirs, f"the closest choice has a margin of {margin:.1e}"


@pytest.mark.parametrize("act", get_args(Activation))
def test_activations_are_transformers_own(act: Activation) -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected: Any = ACT2FN[act](torch.from_numpy(x).double())
    assert relative_error(ACTIVATIONS[act](mx.array(x)), expected.numpy()) <= 1e-6


def bfloat16_errors(seed: int, *, all_experts: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far our and transformers' bfloat16 logits are from float64 ones, both of the same rounded weights.

    Of each of 40 positions, the length of the difference as a part of the length of the exact logits.
    """
    rng = np.random.default_rng(seed)
    raw = random_config(rng)
    if all_experts:
        raw["ffn_config"]["moe_top_k"] = raw["ffn_config"]["moe_num_experts"]
    case = case_of(raw, rng, "bfloat16")
    tokens = rng.integers(case.config.vocab_size, size=40).tolist()
    expected = case.expected(tokens)
    theirs = reference.transformers_logits(reference.transformers_model(raw, case.tensors, "bfloat16"), tokens)

    def error(logits: NDArray[Any]) -> NDArray[np.float64]:
        lengths: NDArray[np.float64] = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
        return lengths

    return error(our_logits(case, tokens)), error(theirs)


def root_mean_square(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt((errors**2).mean()))


@pytest.mark.parametrize("seed", SEEDS)
def test_bfloat16_is_as_exact_as_transformers_where_nothing_is_chosen(seed: int, measured: Measured) -> None:
    """Every token goes to every expert, so that only rounding counts; seen: 0.88 to 1.16 times transformers' error."""
    ours, theirs = bfloat16_errors(seed, all_experts=True)
    assert (
        measured("bfloat16, all experts, times transformers", root_mean_square(ours) / root_mean_square(theirs)) <= 1.25
    )
    assert np.median(ours) <= 1.25 * np.median(theirs)


def test_bfloat16_is_as_exact_as_transformers_where_experts_are_chosen(measured: Measured) -> None:
    """Of all positions of all models together, and their median.

    Rounding can turn a close choice of experts, in either implementation and at different positions, and that position
    and those after it are then off by far more than rounding. Which of the two is hit more in one model is luck (seen:
    mean squares' roots from 0.06 to 22 times transformers'), and the median is what luck doesn't touch (seen: 1.08).
    """
    errors = [bfloat16_errors(seed, all_experts=False) for seed in SEEDS]
    ours, theirs = (np.concatenate(one) for one in zip(*errors, strict=True))
    measured("bfloat16, all positions, times transformers, mean", root_mean_square(ours) / root_mean_square(theirs))
    assert (
        measured("bfloat16, all positions, times transformers, median", float(np.median(ours) / np.median(theirs)))
        <= 1.25
    )
