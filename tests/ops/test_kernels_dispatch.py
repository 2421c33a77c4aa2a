"""Dispatch plans by kernels are those of stock operations."""

from collections.abc import Callable
from inspect import unwrap

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.kernels.dispatch import packed_plan, plan
from dbrx_fn.ops.kernels.segments import LONG_ROWS, MEDIUM_ROWS, long_segments, medium_segments, pack_rows
from tests.support.kernel_operands import matrix, normal

pytestmark = pytest.mark.skipif(not on_hopper(), reason="the kernels are for Hopper GPUs")


def choices(tokens: int, experts: int, top_k: int) -> mx.array:
    """An expert that gets nothing, one that gets most, and tokens that name one twice."""
    top_experts = mx.random.randint(1, experts, (tokens, top_k), key=mx.random.key(tokens)).astype(mx.uint32)
    return mx.where(mx.arange(tokens)[:, None] % 3 < 2, experts // 2, top_experts).astype(mx.uint32)


some_routings = pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(tokens, *sizes) for tokens in (2, 7, 33, 300, 3000) for sizes in ((16, 4), (6, 2), (32, 1))],
)


@some_routings
@pytest.mark.parametrize("rows", [8, 64, 256])
def test_the_plan_is_the_stock_operations_plan(tokens: int, experts: int, top_k: int, rows: int) -> None:
    top_experts = choices(tokens, experts, top_k)
    found = plan(top_experts, experts=experts, rows=rows)
    expected = unwrap(plan)(top_experts, experts=experts, rows=rows)
    for name, ours, twin in zip(found._fields, found, expected, strict=True):
        assert np.array_equal(np.array(ours), np.array(twin)), name


@some_routings
@pytest.mark.parametrize(("rows", "unit"), [(64, 8), (256, 8), (4, 1)])
def test_the_packed_plan_is_the_stock_operations_plan(
    tokens: int, experts: int, top_k: int, rows: int, unit: int
) -> None:
    top_experts = choices(tokens, experts, top_k)
    found = packed_plan(top_experts, experts=experts, rows=rows, unit=unit)
    expected = unwrap(packed_plan)(top_experts, experts=experts, rows=rows, unit=unit)
    for name, ours, twin in zip(found._fields, found, expected, strict=True):
        assert np.array_equal(np.array(ours), np.array(twin)), name


@pytest.mark.parametrize("multiply", [medium_segments, long_segments])
def test_the_plan_is_right_behind_a_product_that_is_a_graph_of_its_own(multiply: Callable[..., mx.array]) -> None:
    """MLX puts the plan's kernel into the product's CUDA graph, where it would keep clusters that the product has."""
    params, rows = matrix(Format(4, 64), 0, 512, 512), MEDIUM_ROWS if multiply is medium_segments else LONG_ROWS
    packed = pack_rows(normal(1, rows, 512), params, rows=rows)
    top_experts = mx.random.randint(0, 16, (300, 4), key=mx.random.key(2)).astype(mx.uint32)
    mx.eval(params, packed, top_experts)
    expected = [np.array(part) for part in plan(top_experts, experts=16, rows=256)]
    for _ in range(5):
        mx.eval(multiply(packed, params))
        found = plan(top_experts, experts=16, rows=256)
        mx.eval(found)
        assert all(map(np.array_equal, map(np.array, found), expected))
