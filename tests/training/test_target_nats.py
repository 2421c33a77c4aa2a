"""Targets' nats a chunk at a time are those of all logits at once, and so are their gradients."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.model.adapters import is_adapter
from dbrx_fn.model.layers.ends import head
from dbrx_fn.model.partition import partition
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.training.target_nats import chunk_tokens, target_nats, token_nats
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of({**QUANTIZABLE, "vocab_size": 4096}, np.random.default_rng(0))
CONFIG = CASE.config
RNG = np.random.default_rng(1)
X = mx.array(RNG.standard_normal((3, 16, CONFIG.d_model)).astype(np.float32))
TARGETS = mx.array(RNG.integers(CONFIG.vocab_size, size=(3, 13)).astype(np.int32))
WEIGHTS = mx.array(RNG.random((3, 13)).astype(np.float32))


def chunks_of(tokens: int) -> int:
    nbytes = 4 * CONFIG.vocab_size * tokens
    assert chunk_tokens(CONFIG.vocab_size, nbytes) == tokens
    return nbytes


def at_once(params: Params, x: mx.array) -> mx.array:
    logits = head(params["transformer"]["norm_f"], params["lm_head"], x, config=CONFIG.layer)
    return token_nats(logits[:, : TARGETS.shape[1]], TARGETS)


@pytest.mark.parametrize("tokens", [1, 5, 13, 38, 39])
def test_chunks_change_no_nats_and_no_gradient(tokens: int) -> None:
    def chunked(params: Params, x: mx.array) -> mx.array:
        nats = target_nats(params, x, TARGETS, config=CONFIG.layer, chunk_bytes=chunks_of(tokens))
        return (nats * WEIGHTS).sum()

    whole = mx.grad(lambda params, x: (at_once(params, x) * WEIGHTS).sum(), argnums=(0, 1))(CASE.params, X)
    parts = mx.grad(chunked, argnums=(0, 1))(CASE.params, X)
    assert relative_error(chunked(CASE.params, X), float((at_once(CASE.params, X) * WEIGHTS).sum())) <= 1e-6
    assert relative_error(parts[1], as_float64(whole[1])) <= 1e-5
    expected: dict[str, mx.array] = dict(tree_flatten(whole[0]))
    made: dict[str, mx.array] = dict(tree_flatten(parts[0]))
    for path, found in made.items():
        if "norm_f" in path or "lm_head" in path:
            assert relative_error(found, as_float64(expected[path])) <= 1e-5
        else:
            assert not found.any()


@pytest.mark.parametrize("quantized", [True, False])
def test_only_the_trained_leaves_of_the_head_get_gradients(quantized: bool) -> None:
    form = Quantization(None, None, None, Format(4, 64))
    params = quantize(CASE.params, CONFIG, form) if quantized else CASE.params
    trained, frozen = partition(with_random_adapters(params, CONFIG, ("head",)), CONFIG, is_adapter)

    def nats(trained: Params, tokens: int) -> mx.array:
        found = target_nats(trained, X, TARGETS, config=CONFIG.layer, frozen=frozen, chunk_bytes=chunks_of(tokens))
        return (found * WEIGHTS).sum()

    whole: Any = mx.grad(lambda trained: nats(trained, TARGETS.size))(trained)
    parts: Any = mx.grad(lambda trained: nats(trained, 7))(trained)
    assert parts["lm_head"].keys() == {"lora_a", "lora_b"}
    for name, found in parts["lm_head"].items():
        assert relative_error(found, as_float64(whole["lm_head"][name])) <= 1e-6


def test_chunks_take_less_memory() -> None:
    """The logits of all tokens in float32 take 0.8 MB for each 48 tokens, and their gradients as much."""
    x, targets = mx.repeat(X, 16, axis=0), mx.repeat(mx.pad(TARGETS, [(0, 0), (0, 3)]), 16, axis=0)
    mx.eval(x, targets, CASE.params)

    def peak(chunk_bytes: int) -> int:
        def total(params: Params, x: mx.array) -> mx.array:
            return target_nats(params, x, targets, config=CONFIG.layer, chunk_bytes=chunk_bytes).sum()

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(total, argnums=(0, 1))(CASE.params, x))
        return mx.get_peak_memory() - before

    logits = 4 * targets.size * CONFIG.vocab_size
    weight = 4 * CONFIG.vocab_size * CONFIG.d_model
    assert peak(logits) > 2 * logits
    assert peak(logits // 16) < logits // 2 + 4 * weight
