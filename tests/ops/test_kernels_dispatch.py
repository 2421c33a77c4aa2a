"""The dispatch plan by its kernel is the plan by stock operations."""

from inspect import unwrap

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.kernels.dispatch import plan

pytestmark = pytest.mark.skipif(not on_hopper(), reason="the kernels are for Hopper GPUs")


@pytest.mark.parametrize("tokens", [2, 7, 33, 300, 3000])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (6, 2), (32, 1)])
@pytest.mark.parametrize("rows", [8, 64, 256])
def test_the_plan_is_the_stock_operations_plan(tokens: int, experts: int, top_k: int, rows: int) -> None:
    top_experts = mx.random.randint(1, experts, (tokens, top_k), key=mx.random.key(tokens)).astype(mx.uint32)
    # An expert that gets nothing, one that gets most, and tokens that name one twice.
    top_experts = mx.where(mx.arange(tokens)[:, None] % 3 < 2, experts // 2, top_experts).astype(mx.uint32)
    found = plan(top_experts, experts=experts, rows=rows)
    expected = unwrap(plan)(top_experts, experts=experts, rows=rows)
    for name, ours, twin in zip(found._fields, found, expected, strict=True):
        assert np.array_equal(np.array(ours), np.array(twin)), name
