"""DBRX at its full size, 132 billion parameters, as a graph of which nothing is computed.

Nothing here may be evaluated, by mistake either: it would ask for 245 GiB.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import DBRX
from dbrx_fn.model.params import check_params, init_params
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params

LARGEST_ALLOCATION = 2**24
"""Far below any matrix of the model; there are small constants."""

BLOCK_SHAPES = {
    "norm_attn_norm.norm_1.weight": (6144,),
    "norm_attn_norm.attn.Wqkv.weight": (8192, 6144),
    "norm_attn_norm.attn.out_proj.weight": (6144, 6144),
    "norm_attn_norm.norm_2.weight": (6144,),
    "ffn.router.layer.weight": (16, 6144),
    "ffn.experts.mlp.w1.weight": (16, 10752, 6144),
    "ffn.experts.mlp.v1.weight": (16, 10752, 6144),
    "ffn.experts.mlp.w2.weight": (16, 6144, 10752),
}
SHAPES = {
    "transformer.wte.weight": (100352, 6144),
    **{f"transformer.blocks.{n}.{name}": shape for n in range(40) for name, shape in BLOCK_SHAPES.items()},
    "transformer.norm_f.weight": (6144,),
    "lm_head.weight": (100352, 6144),
}


@pytest.fixture(autouse=True)
def nothing_allocated() -> Iterator[None]:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    yield
    assert mx.get_active_memory() - before < LARGEST_ALLOCATION
    assert mx.get_peak_memory() - before < LARGEST_ALLOCATION


def full_params() -> Params:
    return init_params(DBRX, mx.random.key(0))


def test_parameters() -> None:
    params = full_params()
    leaves: Any = tree_flatten(params)
    assert {path: leaf.shape for path, leaf in leaves} == SHAPES
    assert {leaf.dtype for _, leaf in leaves} == {mx.bfloat16}
    assert sum(leaf.nbytes for _, leaf in leaves) == 2 * 131_596_523_520
    check_params(params, DBRX)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_prompt_and_a_step_through_the_cache(batch_size: int) -> None:
    params = full_params()
    cache = init_cache(DBRX, batch_size, 512)
    for time, length in ((500, 500), (1, 501)):
        logits, cache = forward(params, mx.zeros((batch_size, time), mx.int32), cache)
        assert logits.shape == (batch_size, time, 100352)
        assert logits.dtype == mx.bfloat16
        assert cache.lengths == (length,) * batch_size
        assert len(cache.keys) == len(cache.values) == 40
        assert {array.shape for array in cache.keys + cache.values} == {(batch_size, 8, 512, 128)}
        assert {array.dtype for array in cache.keys + cache.values} == {mx.bfloat16}
    logits, _ = forward(params, mx.zeros((batch_size, 7), mx.int32), cache, last_only=True)
    assert logits.shape == (batch_size, 1, 100352)


def test_a_prompt_without_a_cache() -> None:
    logits, cache = forward(full_params(), mx.zeros((2, 4096), mx.int32), init_cache(DBRX, 2, 0))
    assert logits.shape == (2, 4096, 100352)
    assert logits.dtype == mx.bfloat16
    assert {array.shape for array in cache.keys + cache.values} == {(2, 8, 0, 128)}


def test_the_whole_context() -> None:
    cache = init_cache(DBRX, 1, 0)
    logits, _ = forward(full_params(), mx.zeros((1, 32_768), mx.int32), cache, last_only=True)
    assert logits.shape == (1, 1, 100352)
