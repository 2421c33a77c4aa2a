"""Checks of single operations: experts with many tokens, heads at far positions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import mlx.core as mx

from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.comparison import LIMITS, Comparison, compare
from dbrx_fn.checking.operands import HEAD_DIM, MIXTURES, POSITIONS, THETA, WIDTH, Mixture, turned_heads
from dbrx_fn.checking.reference import expected
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.layers.rotary import turn, turns
from dbrx_fn.ops.experts import mix_experts


def check_experts(
    group: Callable[[Dtype], str], *, dtypes: Sequence[Dtype] = get_args(Dtype), **choices: Any
) -> Iterator[Check]:
    """Checks of the experts' sum for few and many tokens, so that segments have every length.

    Args:
        group: the report's row for a dtype.
        dtypes: which.
        **choices: of `Check`, as for `as_if`.
    """
    for dtype in dtypes:
        for mixture in MIXTURES:
            case = f"{mixture.name}, {dtype}"
            yield Check(group(dtype), case, LIMITS[dtype], partial(_experts, mixture, dtype), **choices)


def check_positions() -> Iterator[Check]:
    """Checks of the rotary embedding up to the context's end."""
    case = f"heads of {HEAD_DIM}, theta {THETA:g}, positions {', '.join(map(str, POSITIONS))}"
    yield Check("positions to 32,767, float32", case, LIMITS["float32"], _positions)


def _experts(mixture: Mixture, dtype: Dtype) -> Comparison:
    params, x, weights, experts = mixture.arrays(dtype)
    # As with a cache, which uses kernels on some GPUs.
    mixed = mix_experts(params, x, weights, experts, activation="silu", cached=True)
    compared = compare(mixed.reshape(-1)[:: mixture.step], expected(mixture.name))
    return replace(compared, place=divmod(compared.place[0] * mixture.step, WIDTH))


def _positions() -> Comparison:
    cosines, sines = turns(mx.array([POSITIONS], mx.int32), head_dim=HEAD_DIM, theta=THETA)
    heads = turn(mx.array(turned_heads())[None, None], cosines, sines)
    return compare(heads[0, 0], expected("positions"))
