"""Rows of one batch use different adapters, each as if it were alone with its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.adapters import fuse_adapters
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.params import KINDS, check_params, nest
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.stacked_adapters import choose_adapters, stack_adapters, stacked_count
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import as_if
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
QUANTIZED = quantize(PARAMS, CONFIG, Quantization(*[Format(4, 32)] * 4))
TOKENS = mx.array(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (5, 12)))
MIX = [2, 0, 1, 3, 1]


def adapted_trees(params: Params) -> list[Params]:
    """Trees with adapters of other targets and ranks; the last one only in the last layer."""
    trees = [
        with_random_adapters(params, CONFIG, ("attention", "experts"), rank=4, seed=1),
        with_random_adapters(params, CONFIG, KINDS, rank=2, seed=2),
    ]
    whole = dict(tree_flatten(with_random_adapters(params, CONFIG, ("experts", "head"), rank=3, seed=3)))
    kept = {path: leaf for path, leaf in whole.items() if not ("lora_" in path and ".blocks.0." in path)}
    return [*trees, nest(kept, CONFIG)]


def token_by_token(params: Params, tokens: mx.array) -> mx.array:
    cache, made = init_cache(CONFIG, len(tokens), 16), []
    for place in range(tokens.shape[1]):
        logits, cache = forward(params, tokens[:, place : place + 1], cache)
        made.append(logits)
    return mx.concatenate(made, axis=1)


@pytest.mark.parametrize("params", [PARAMS, QUANTIZED], ids=["dense", "quantized"])
def test_each_row_has_the_logits_of_its_own_adapter(params: Params) -> None:
    trees = adapted_trees(params)
    stack = stack_adapters(params, CONFIG, trees)
    assert stacked_count(stack) == 3
    chosen = choose_adapters(stack, MIX)
    expected = [as_float64(score([params, *trees][one], TOKENS, CONFIG)[0][row]) for row, one in enumerate(MIX)]
    plain = as_float64(score(params, TOKENS, CONFIG)[0])
    for logits in (score(chosen, TOKENS, CONFIG)[0], token_by_token(chosen, TOKENS)):
        for row, one in enumerate(MIX):
            assert relative_error(logits[row], expected[row]) <= 5e-6
            assert (relative_error(plain[row], expected[row]) > 1e-3) == (one > 0)


def test_a_row_without_an_adapter_is_bitwise_that_of_the_model_alone() -> None:
    chosen = choose_adapters(stack_adapters(PARAMS, CONFIG, adapted_trees(PARAMS)), MIX)
    # Most kernels don't know adapters, so one tree would be computed by them and the other wouldn't.
    with as_if(kernels=False):
        for logits in (token_by_token, lambda params, tokens: score(params, tokens, CONFIG)[0]):
            found, expected = (np.array(logits(params, TOKENS)[1]) for params in (chosen, PARAMS))
            np.testing.assert_array_equal(found, expected)


def test_an_adapter_that_overflows_changes_only_its_own_rows() -> None:
    wild = dict(tree_flatten(with_random_adapters(PARAMS, CONFIG, ("experts", "attention"))))
    wild |= {path: leaf * 3e38 for path, leaf in wild.items() if path.endswith("lora_a")}
    stack = stack_adapters(PARAMS, CONFIG, [nest(wild, CONFIG), adapted_trees(PARAMS)[0]])
    logits = as_float64(score(choose_adapters(stack, [2, 1, 0, 2, 0]), TOKENS, CONFIG)[0])
    assert np.isnan(logits[1]).all()
    expected = as_float64(score(choose_adapters(stack, [2, 0, 0, 2, 0]), TOKENS, CONFIG)[0])
    # Not bitwise: OpenBLAS's AVX2 kernels round a row by its place, and the row that overflowed chose other experts.
    assert relative_error(np.delete(logits, 1, 0), np.delete(expected, 1, 0)) <= 5e-6


def test_another_mix_needs_no_other_trace(caplog: pytest.LogCaptureFixture) -> None:
    stack = stack_adapters(PARAMS, CONFIG, adapted_trees(PARAMS))

    def signatures(rows: Sequence[int]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
            mx.eval(token_by_token(choose_adapters(stack, rows), TOKENS[:3, :3]))
        return [record.getMessage() for record in caplog.records]

    with as_if(backend="metal"):
        assert any(said.endswith(" block") for said in signatures([0, 1, 2]))
        assert not signatures([3, 3, 0])
        assert not signatures([0, 0, 0])


def test_short_floats_keep_their_dtype() -> None:
    config = replace(CONFIG, dtype="bfloat16")
    plain = nest({path: leaf.astype(mx.bfloat16) for path, leaf in dict(tree_flatten(PARAMS)).items()}, config)
    stack = stack_adapters(plain, config, [with_random_adapters(plain, config, KINDS)])
    assert score(choose_adapters(stack, [1, 0]), TOKENS[:2], config)[0].dtype == mx.bfloat16


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    trees = adapted_trees(PARAMS)
    stack = stack_adapters(PARAMS, CONFIG, trees)
    check_params(stack, CONFIG)
    with pytest.raises(InputError, match=r"Wqkv.weight has an adapter already: stack adapters beside the tree without"):
        stack_adapters(trees[0], CONFIG, trees)
    with pytest.raises(InputError, match=r"trees\[1\] has no adapters: load them with load_adapters"):
        stack_adapters(PARAMS, CONFIG, [trees[0], PARAMS])
    with pytest.raises(InputError, match=r"wte has several adapters, where one at most is expected"):
        stack_adapters(PARAMS, CONFIG, [stack])
    with pytest.raises(InputError, match=r"several adapters, where one at most is expected"):
        fuse_adapters(stack, CONFIG)
    with pytest.raises(InputError, match=r"several adapters, where one at most is expected"):
        save_adapters("nowhere", stack, CONFIG)
    anything: Any = "lear"
    for row in (4, -1, anything):
        with pytest.raises(InputError, match=rf"rows names adapter {row!r} where the tree has 1 to 3, and 0 is none"):
            choose_adapters(stack, [0, row])
    with pytest.raises(CheckpointError, match=r"lora_scale is \[3, 2\] where \[5, 2\] \(rows rank\) is expected"):
        score(choose_adapters(stack, [0, 1, 2]), TOKENS, CONFIG)
