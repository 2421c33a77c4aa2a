"""What a step must compute and read, against numbers counted by hand."""

from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.model.config import DBRX, AttnConfig, Config, FFNConfig
from dbrx_fn.model.costs import (
    Work,
    cache_bytes,
    decode_work,
    expected_experts,
    prefill_work,
    read_weight_bytes,
    training_operations,
    weight_bytes,
)
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.ops.formats import Format

TINY = Config(
    d_model=8,
    n_heads=2,
    n_layers=3,
    vocab_size=20,
    attn=AttnConfig(kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=4, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)
PROJECTIONS = 8 * (8 + 4 + 4) + 8 * 8 + 8 * 4 + 2 * 3 * 8 * 4
"""Weights of a tiny layer that one token passes through: Wqkv, out_proj, router, two experts."""
KEYS_AND_VALUES = 8 * (4 + 4)


def test_operations_of_training_are_those_of_every_product() -> None:
    time, d_model, layers = 6, 8, 3
    scores_and_values = 2 * d_model * time / 2
    forward = layers * (PROJECTIONS + scores_and_values) + d_model * 20
    norms = (2 * layers + 1) * d_model
    assert training_operations(TINY, time) == 3 * 2 * (forward + norms)


def test_operations_and_bytes_of_a_tiny_model() -> None:
    norms = (2 * 3 + 1) * 8
    # The last layer makes keys and values of all tokens, and the rest of the last one only.
    of_all = 2 * (PROJECTIONS + 2 * 8) + 8 + KEYS_AND_VALUES
    of_last = PROJECTIONS - KEYS_AND_VALUES + 2 * 8 + 8 * 20
    pairs = 2 * (1 + 2 + 3) + 3
    assert prefill_work(TINY, {}, 3).operations == 2 * (3 * of_all + of_last) + 4 * 8 * pairs
    expert, experts_of_three = 3 * 8 * 4 * 4, 4 * (1 - (1 / 2) ** 3)
    all_read = read_weight_bytes(TINY, {}, 3)
    assert prefill_work(TINY, {}, 3).bytes == all_read - (experts_of_three - 2) * expert + 3 * 3 * 2 * 4 * 4
    # One token: two experts of each layer, one row of the embedding, all of the head; its own key and value beside 5.
    decoded = decode_work(TINY, {}, 5, 1)
    assert decoded.operations == 2 * (3 * PROJECTIONS + norms + 8 * 20) + 3 * 4 * 8 * 6
    assert decoded.bytes == 4 * (3 * PROJECTIONS + norms + 8 * 20 + 8) + 3 * 6 * 2 * 4 * 4


def test_the_released_model_in_4_bits() -> None:
    formats = wanted_formats(DBRX, Quantization())
    token = decode_work(DBRX, formats, 0, 1)
    assert token.bytes == pytest.approx(20.2e9, rel=0.005)
    assert token.operations == pytest.approx(72e9, rel=0.01)
    # 4 bits, and 32 for each 64 of them.
    assert weight_bytes(DBRX, formats) == pytest.approx(131.6e9 * 4.5 / 8, rel=0.001)


def test_four_layers_in_bfloat16() -> None:
    config = replace(DBRX, n_layers=4)
    expert = 3 * 6144 * 10_752
    attention = 6144 * 8192 + 6144 * 6144
    embedding = 100_352 * 6144
    rest = 4 * (attention + 16 * 6144 + 2 * 6144) + embedding + 6144
    assert weight_bytes(config, {}) == 2 * (4 * 16 * expert + rest + embedding)
    assert read_weight_bytes(config, {}, 1) == 2 * (4 * 4 * expert + rest + 6144)
    # Two tokens need 16 * (1 - (3/4)^2) = 7 of 16 experts.
    assert read_weight_bytes(config, {}, 2) == 2 * (4 * 7 * expert + rest + 2 * 6144)


def test_keys_and_values_of_the_released_model_take_160_kib_a_token() -> None:
    assert cache_bytes(DBRX, 1) == 160 * 1024
    more = decode_work(DBRX, {}, 8192, 8).bytes - decode_work(DBRX, {}, 512, 8).bytes
    assert more == 8 * (8192 - 512) * 160 * 1024


def test_bytes_of_weights_are_those_of_the_tree() -> None:
    leaves: dict[str, mx.array] = dict(tree_flatten(init_params(TINY, mx.random.key(0))))
    assert weight_bytes(TINY, {}) == sum(leaf.nbytes for leaf in leaves.values())


@given(tokens=st.integers(1, 200))
def test_a_prompt_is_as_much_work_as_its_tokens_one_by_one_but_for_what_only_their_logits_need(tokens: int) -> None:
    one_by_one = sum(decode_work(TINY, {}, context, 1).operations for context in range(tokens))
    # The last layer but for keys and values with their norm, the last norm, and the head.
    weights = PROJECTIONS - KEYS_AND_VALUES + 8 + 8 + 8 * 20
    attention = 4 * 8 * (tokens * (tokens - 1) // 2)
    assert prefill_work(TINY, {}, tokens).operations == one_by_one - (tokens - 1) * 2 * weights - attention


@given(context=st.integers(0, 200), batch_size=st.integers(1, 40), together=st.integers(1, 16))
def test_several_tokens_at_once_are_as_much_work_as_one_by_one_but_read_weights_and_cache_once(
    context: int, batch_size: int, together: int
) -> None:
    at_once = decode_work(TINY, {}, context, batch_size, together)
    one_by_one = [decode_work(TINY, {}, context + n, batch_size) for n in range(together)]
    assert at_once.operations == sum(work.operations for work in one_by_one)
    cache = batch_size * cache_bytes(TINY, context + together)
    assert at_once.bytes == read_weight_bytes(TINY, {}, batch_size * together) + cache


@given(batch_size=st.integers(1, 1000), bits=st.sampled_from([None, 2, 4, 8]))
def test_a_batch_reads_more_than_one_token_and_no_more_than_all(batch_size: int, bits: int | None) -> None:
    config = replace(DBRX, n_layers=1)
    formats = {} if bits is None else wanted_formats(config, Quantization(experts=Format(bits, 64)))
    one, some, more = (read_weight_bytes(config, formats, tokens) for tokens in (1, batch_size, batch_size + 1))
    assert one <= some < more <= weight_bytes(config, formats)
    assert expected_experts(config, 1) == 4
    assert 4 <= expected_experts(config, batch_size) <= 16


def test_the_slower_of_computing_and_reading_is_the_bound() -> None:
    work = Work(operations=100, bytes=30)
    assert work.seconds(10, 2) == 15
    assert work.bound_by(10, 2) == "bytes"
    assert work.seconds(5, 2) == 20
    assert work.bound_by(5, 2) == "operations"
