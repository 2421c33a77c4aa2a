"""A fingerprint is the same for equal trees, and another one after any change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from dbrx_fn import SMALL, dequantize, load
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.fingerprint import fingerprint, weights_fingerprint
from dbrx_fn.serving.limits import Limits

# Rows of odd size, and more words in a leaf than the sample has.
CONFIG = Config(
    d_model=36,
    n_heads=2,
    n_layers=2,
    vocab_size=301,
    attn=AttnConfig(kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=91, moe_num_experts=3, moe_top_k=2),
    dtype="bfloat16",
)


def leaves_of(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(CONFIG, mx.random.key(0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bit_of_any_leaf_counts(params: Params, data: st.DataObject) -> None:
    leaves = leaves_of(params)
    path = data.draw(st.sampled_from(sorted(leaves)))
    bits = np.array(leaves[path].view(mx.uint16))
    place = np.unravel_index(data.draw(st.integers(0, bits.size - 1)), bits.shape)
    bits[place] ^= np.uint16(1 << data.draw(st.integers(0, 15)))
    changed: Params = tree_unflatten([*(leaves | {path: mx.array(bits).view(mx.bfloat16)}).items()])
    assert weights_fingerprint(changed, CONFIG) != weights_fingerprint(params, CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        lambda leaf: -leaf,
        lambda leaf: leaf[::-1],
        lambda leaf: leaf[:, ::-1],
        lambda leaf: mx.concatenate([leaf[1:], leaf[:1]]),
        lambda leaf: leaf[None],
        lambda leaf: leaf.astype(mx.float16),
        lambda leaf: mx.zeros_like(leaf),
    ],
)
def test_what_is_arranged_otherwise_is_another(params: Params, change: Callable[[mx.array], mx.array]) -> None:
    leaves = leaves_of(params)
    for path, leaf in leaves.items():
        if leaf.ndim > 1:
            changed: Any = tree_unflatten([*(leaves | {path: change(leaf)}).items()])
            assert weights_fingerprint(changed, CONFIG) != weights_fingerprint(params, CONFIG), path


def test_another_config_is_another_unless_no_cache_depends_on_it(params: Params) -> None:
    told = weights_fingerprint(params, CONFIG)
    assert weights_fingerprint(params, replace(CONFIG, attn=replace(CONFIG.attn, rope_theta=5e5))) != told
    assert weights_fingerprint(params, replace(CONFIG, max_seq_len=77)) == told


def test_equal_trees_have_one_and_quantized_ones_their_own() -> None:
    loaded, config = load(SMALL)
    again, _ = load(SMALL)
    assert weights_fingerprint(loaded, config) == weights_fingerprint(again, config)
    assert weights_fingerprint(dequantize(loaded, config), config) != weights_fingerprint(loaded, config)


def test_what_rounding_depends_on_counts_for_prefixes(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(rows=4, positions=10_000, capacity=512)
    exact = replace(limits, exact=True)
    told = fingerprint(params, CONFIG, limits, "1.0")
    assert fingerprint(params, CONFIG, replace(limits, rows=8, capacity=1024), "1.0") == told
    others = [
        fingerprint(params, CONFIG, limits, "1.1"),
        fingerprint(init_params(CONFIG, mx.random.key(1)), CONFIG, limits, "1.0"),
        fingerprint(params, CONFIG, exact, "1.0"),
        fingerprint(params, CONFIG, replace(exact, capacity=1024), "1.0"),
    ]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    others.append(fingerprint(params, CONFIG, limits, "1.0"))
    assert len({told, *others}) == 6
