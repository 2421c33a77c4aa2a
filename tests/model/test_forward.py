"""`forward` computes DBRX: the same logits as the float64 oracle, however the tokens are handed to it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import ArrayLike, NDArray

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import DBRX, Config, Dtype, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.shapes import chunk_widths, time_bucket
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import as_if
from tests.support.trees import Case, as_float64, random_case, relative_error

Measured = Callable[[str, float], float]

SEEDS = range(24)
BAR = 5e-6
CAPACITY = 43
LONGEST = 40

Ints = NDArray[np.int64]
NO_PARAMS = cast(Params, {})


@functools.cache
def sequence(seed: int) -> tuple[Case, Ints, NDArray[np.float64]]:
    """A model, 1 to 40 tokens (the first seed's are 40, the second's 1), and the logits that they must have."""
    case, rng = random_case(seed)
    time = {0: LONGEST, 1: 1}.get(seed, int(rng.integers(1, LONGEST + 1)))
    tokens = rng.integers(case.config.vocab_size, size=time)
    return case, tokens, case.expected(tokens)


def batch_of(*rows: ArrayLike) -> mx.array:
    return mx.array(np.array(rows), mx.int32)


def test_the_seeds_cover_what_a_config_can_say() -> None:
    configs = [sequence(seed)[0].config for seed in SEEDS]
    assert {config.attn.clip_qkv for config in configs} == {0.5, 2.0, None}
    assert {config.ffn.moe_normalize_expert_weights for config in configs} == {1.0, 2.0, None}
    assert any(config.n_heads % 2 for config in configs)
    assert any(config.attn.kv_n_heads == 1 < config.n_heads for config in configs)
    assert any(1 < config.attn.kv_n_heads < config.n_heads for config in configs)
    assert any(config.attn.kv_n_heads == config.n_heads > 1 for config in configs)
    assert max(config.ffn.moe_num_experts for config in configs) == 16
    assert any(config.ffn.moe_top_k == 1 < config.ffn.moe_num_experts for config in configs)
    assert any(1 < config.ffn.moe_top_k == config.ffn.moe_num_experts for config in configs)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_sequence_without_a_cache(seed: int, measured: Measured) -> None:
    case, tokens, expected = sequence(seed)
    logits, cache = forward(case.params, batch_of(tokens), init_cache(case.config, 1, 0))
    assert logits.dtype == mx.float32
    assert measured("float32 to the oracle, whole, no cache", relative_error(logits[0], expected)) <= BAR
    assert cache.capacity == 0
    assert cache.lengths == (0,)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_sequence_into_a_cache(seed: int, measured: Measured) -> None:
    case, tokens, expected = sequence(seed)
    logits, cache = forward(case.params, batch_of(tokens), init_cache(case.config, 1, CAPACITY))
    assert measured("float32 to the oracle, whole", relative_error(logits[0], expected)) <= BAR
    assert cache.lengths == (len(tokens),)


@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_into_a_cache(seed: int, measured: Measured) -> None:
    case, tokens, expected = sequence(seed)
    empty = init_cache(case.config, 1, CAPACITY)
    logits, cache = forward(case.params, batch_of(tokens), empty, chunk_size=7)
    assert logits.shape == (1, *expected.shape)
    assert measured("float32 to the oracle, chunks", relative_error(logits[0], expected)) <= BAR
    assert cache.lengths == (len(tokens),)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_token_at_a_time(seed: int, measured: Measured) -> None:
    case, tokens, expected = sequence(seed)
    cache = init_cache(case.config, 1, CAPACITY)
    steps = []
    for token in tokens:
        logits, cache = forward(case.params, batch_of([token]), cache)
        steps.append(logits[0, 0])
    assert measured("float32 to the oracle, token by token", relative_error(mx.stack(steps), expected)) <= BAR


@pytest.mark.parametrize("capacity", [150, 200])
@pytest.mark.parametrize("seed", [0, 4])
def test_prompts_that_are_cut_to_waste_less_padding(seed: int, capacity: int) -> None:
    case, _, _ = sequence(seed)
    tokens = np.random.default_rng(seed).integers(case.config.vocab_size, size=150)
    logits, cache = forward(case.params, batch_of(tokens), init_cache(case.config, 1, capacity))
    assert relative_error(logits[0], case.expected(tokens)) <= BAR
    assert cache.lengths == (150,)


@dataclass(frozen=True)
class Conversation:
    """What four rows get in three calls: tokens `[batch time]` and lengths of each call, and each row's tokens in all.

    Row 0 fills the cache in the second call, to the last position. Row 1 gets nothing in the first call, row 2 nothing
    in the second. So rows stand at different positions, and in the second and third call row 0 has no room for its
    padding. The first call is wider than the cache. Token 0 is the padding.
    """

    calls: tuple[tuple[mx.array, tuple[int, ...]], ...]
    rows: tuple[Ints, ...]


RAGGED_CAPACITY = 27


def conversation(vocab_size: int, rng: np.random.Generator) -> Conversation:
    a, b, c, d, e = rng.integers(1, 13, size=5).tolist()
    first, second, third = (a, 0, b, c), (RAGGED_CAPACITY - a, d, 0, e), (0, 1, 3, 2)
    rows = tuple(rng.integers(vocab_size, size=sum(lengths)) for lengths in zip(first, second, third, strict=True))
    calls = []
    starts = [0, 0, 0, 0]
    for lengths, width in ((first, RAGGED_CAPACITY + 2), (second, max(second) + 2), (third, 5)):
        tokens = np.zeros((4, width), np.int64)
        for row, length in enumerate(lengths):
            tokens[row, :length] = rows[row][starts[row] : starts[row] + length]
            starts[row] += length
        calls.append((batch_of(*tokens), lengths))
    return Conversation(tuple(calls), rows)


def run_ragged(case: Case, talk: Conversation, **options: Any) -> tuple[list[NDArray[np.float64]], list[mx.array]]:
    """Logits of each row's real tokens over all calls, and each call's logits as they came."""
    cache = init_cache(case.config, 4, RAGGED_CAPACITY)
    per_call: list[mx.array] = []
    for tokens, lengths in talk.calls:
        logits, cache = forward(case.params, tokens, cache, lengths=lengths, **options)
        per_call.append(logits)
    assert cache.lengths == tuple(len(row) for row in talk.rows)
    rows = [
        np.concatenate(
            [as_float64(logits[row, : lengths[row]]) for logits, (_, lengths) in zip(per_call, talk.calls, strict=True)]
        )
        for row in range(4)
    ]
    return rows, per_call


@pytest.mark.parametrize("seed", SEEDS)
def test_ragged_batches(seed: int, measured: Measured) -> None:
    case, _, _ = sequence(seed)
    talk = conversation(case.config.vocab_size, np.random.default_rng(seed))
    rows, per_call = run_ragged(case, talk)
    for row, held in zip(rows, talk.rows, strict=True):
        assert measured("float32 to the oracle, ragged batch", relative_error(row, case.expected(held))) <= BAR
    for logits, (tokens, _) in zip(per_call, talk.calls, strict=True):
        assert logits.shape == (*tokens.shape, case.config.vocab_size)


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_ragged_batches_in_chunks(seed: int) -> None:
    case, _, _ = sequence(seed)
    talk = conversation(case.config.vocab_size, np.random.default_rng(seed))
    rows, _ = run_ragged(case, talk, chunk_size=5)
    for row, tokens in zip(rows, talk.rows, strict=True):
        assert relative_error(row, case.expected(tokens)) <= BAR


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_ragged_batches_without_a_cache(seed: int) -> None:
    case, tokens, expected = sequence(seed)
    short = case.expected(tokens[:1])
    padded = np.zeros((2, len(tokens) + 3), np.int64)
    padded[0, : len(tokens)], padded[1, 0] = tokens, tokens[0]
    empty = init_cache(case.config, 2, 0)
    logits, _ = forward(case.params, batch_of(*padded), empty, lengths=[len(tokens), 1])
    assert relative_error(logits[0, : len(tokens)], expected) <= BAR
    assert relative_error(logits[1, :1], short) <= BAR


@pytest.mark.parametrize("chunk_size", [5, 2048])
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_last_only_is_the_last_real_positions_logits(seed: int, chunk_size: int) -> None:
    case, _, _ = sequence(seed)
    talk = conversation(case.config.vocab_size, np.random.default_rng(seed))
    _, full = run_ragged(case, talk)
    cache = init_cache(case.config, 4, RAGGED_CAPACITY)
    for (tokens, lengths), expected in zip(talk.calls, full, strict=True):
        options: dict[str, Any] = {"lengths": lengths, "chunk_size": chunk_size}
        same_start = cache
        logits, cache = forward(case.params, tokens, cache, last_only=True, **options)
        _, whole = forward(case.params, tokens, same_start, **options)
        assert all(map(mx.array_equal, [*cache.keys, *cache.values], [*whole.keys, *whole.values]))
        assert logits.shape == (4, 1, case.config.vocab_size)
        for row, length in enumerate(lengths):
            if length:
                assert relative_error(logits[row, 0], as_float64(expected[row, length - 1])) <= 1e-6


def test_last_only_without_a_cache() -> None:
    case, tokens, expected = sequence(0)
    logits, _ = forward(case.params, batch_of(tokens), init_cache(case.config, 1, 0), last_only=True)
    assert relative_error(logits[0], expected[-1:]) <= BAR


def test_what_padding_holds_changes_nothing() -> None:
    case, tokens, _ = sequence(2)
    junk = np.random.default_rng(0).integers(case.config.vocab_size, size=13)
    for capacity in (0, CAPACITY, len(tokens)):
        results = []
        for padding in (np.zeros(13, np.int64), junk):
            padded = batch_of(np.concatenate([tokens, padding]))
            cache = init_cache(case.config, 1, capacity)
            logits, cache = forward(case.params, padded, cache, lengths=[len(tokens)])
            results.append(as_float64(logits[0, : len(tokens)]))
            if capacity == CAPACITY:
                results[-1] = np.concatenate(
                    [results[-1], as_float64(forward(case.params, batch_of([3]), cache)[0][0])]
                )
        assert relative_error(results[0], results[1]) <= 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case, tokens, expected = sequence(4)
    rng = np.random.default_rng(0)
    others = rng.integers(case.config.vocab_size, size=(2, len(tokens)))
    for batch in ((tokens, *others), (others[0], tokens, others[0])):
        logits, _ = forward(case.params, batch_of(*batch), init_cache(case.config, 3, CAPACITY))
        row = next(i for i, tokens_of_row in enumerate(batch) if tokens_of_row is tokens)
        assert relative_error(logits[row], expected) <= BAR


def contents(cache: Cache) -> list[NDArray[np.float64]]:
    return [as_float64(array).copy() for array in cache.keys + cache.values]


@pytest.mark.parametrize("new", [1, 5])
def test_the_old_cache_stays_as_it_was(new: int) -> None:
    case, tokens, expected = sequence(0)
    prompt = batch_of(tokens[:9])
    _, old = forward(case.params, prompt, init_cache(case.config, 1, CAPACITY))
    before, lengths = contents(old), old.lengths
    one_way = batch_of(tokens[9 : 9 + new])
    another_way = (one_way + 1) % case.config.vocab_size
    first, new_cache = forward(case.params, one_way, old)
    mx.eval(first, new_cache.keys, new_cache.values)
    forward(case.params, another_way, old)
    again, _ = forward(case.params, one_way, old)
    assert old.lengths == lengths == (9,)
    for array, expected_array in zip(contents(old), before, strict=True):
        np.testing.assert_array_equal(array, expected_array)
    assert relative_error(first[0], expected[9 : 9 + new]) <= BAR
    np.testing.assert_array_equal(np.array(first), np.array(again))


def test_parameters_and_tokens_stay_as_they_were() -> None:
    case, tokens, _ = sequence(0)

    def leaves() -> list[NDArray[np.float64]]:
        flat: Any = tree_flatten(case.params)
        return [as_float64(array) for _, array in flat]

    before = leaves()
    ids = batch_of(tokens)
    logits, _ = forward(case.params, ids, init_cache(case.config, 1, CAPACITY), lengths=[len(tokens) - 3])
    mx.eval(logits)
    for new, old in zip(leaves(), before, strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(np.array(ids), tokens[None])


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint32, mx.int64])
def test_tokens_of_any_integer_dtype(dtype: mx.Dtype) -> None:
    case, tokens, _ = sequence(3)
    small = tokens % 40
    logits, _ = forward(case.params, mx.array(small[None]).astype(dtype), init_cache(case.config, 1, 0))
    assert relative_error(logits[0], case.expected(small)) <= BAR


# Largest relative errors seen over these seeds: bfloat16 0.0083, float16 0.00092.
HALF_BARS: dict[Dtype, float] = {"bfloat16": 0.015, "float16": 0.0015}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", HALF_BARS)
def test_half_precision_is_near_the_oracle(dtype: Dtype, seed: int) -> None:
    """Every token goes to every expert here, since rounding changes close choices, and those change everything."""
    case, rng = random_case(seed, dtype, moe_num_experts=4, moe_top_k=4)
    tokens = rng.integers(case.config.vocab_size, size=20)
    expected = case.expected(tokens)

    logits, _ = forward(case.params, batch_of(tokens), init_cache(case.config, 1, 0))
    assert logits.dtype == getattr(mx, dtype)
    assert relative_error(logits[0], expected) <= HALF_BARS[dtype]

    cache = init_cache(case.config, 1, CAPACITY)
    steps = []
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 20)):
        logits, cache = forward(case.params, batch_of(tokens[start:stop]), cache)
        assert logits.dtype == getattr(mx, dtype)
        steps.append(logits[0])
    assert relative_error(mx.concatenate(steps), expected) <= HALF_BARS[dtype]
    assert {array.dtype for array in cache.keys + cache.values} == {getattr(mx, dtype)}


@pytest.mark.parametrize(
    ("time", "capacity", "bucket"),
    [
        (1, 0, 1),
        (2, 0, 8),
        (8, 0, 8),
        (9, 0, 16),
        (17, 0, 24),
        (1025, 0, 1152),
        (17, 32, 32),
        (17, 27, 27),
        (5, 6, 6),
        (1, 512, 1),
        (600, 1024, 1024),
    ],
)
def test_time_bucket(time: int, capacity: int, bucket: int) -> None:
    with as_if(backend="metal"):
        assert time_bucket(time, capacity) == bucket


@pytest.mark.parametrize(
    ("time", "capacity", "bucket"), [(1, 512, 1), (2, 512, 2), (7, 512, 7), (8, 512, 8), (9, 512, 16), (3, 0, 8)]
)
def test_few_tokens_are_not_padded_on_cuda(time: int, capacity: int, bucket: int) -> None:
    with as_if(backend="cuda"):
        assert time_bucket(time, capacity) == bucket


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="a GPU cuts from 512 tokens on")
@pytest.mark.parametrize(
    ("time", "chunk_size", "widths"),
    [
        (1, 2048, [1]),
        (64, 2048, [64]),
        (76, 2048, [64, 12]),
        (100, 2048, [100]),
        (1100, 2048, [1024, 64, 12]),
        (5000, 2048, [2048, 2048, 904]),
        (20, 7, [7, 7, 6]),
    ],
)
def test_chunk_widths(time: int, chunk_size: int, widths: list[int]) -> None:
    assert chunk_widths(time, chunk_size) == widths


def test_gradients_through_a_cache_in_chunks() -> None:
    """Within a transformation nothing may be evaluated, which longer inputs otherwise are, chunk by chunk."""
    params = init_params(SMALL, mx.random.key(0))
    tokens = mx.random.randint(0, SMALL.vocab_size, (1, 76), key=mx.random.key(1))

    def loss(params: Params, capacity: int) -> mx.array:
        return forward(params, tokens, init_cache(SMALL, 1, capacity))[0].square().mean()

    assert len(chunk_widths(76, 2048)) > 1 or mx.default_device().type != mx.cpu
    cached, uncached = (dict(tree_flatten(mx.grad(loss)(params, capacity))) for capacity in (80, 0))
    for path in cached:
        assert relative_error(cached[path], as_float64(uncached[path])) <= BAR


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (mx.zeros((2, 3)), "mlx.core.float32 [2, 3]"),
        (mx.zeros((2, 3), mx.bool_), "mlx.core.bool [2, 3]"),
        (mx.zeros((3,), mx.int32), "mlx.core.int32 [3]"),
        (mx.zeros((2, 3, 1), mx.int32), "mlx.core.int32 [2, 3, 1]"),
        (mx.zeros((2, 0), mx.int32), "mlx.core.int32 [2, 0]"),
        (mx.zeros((0, 3), mx.int32), "mlx.core.int32 [0, 3]"),
    ],
)
def test_tokens_that_are_no_tokens(tokens: mx.array, found: str) -> None:
    with pytest.raises(InputError) as error:
        forward(NO_PARAMS, tokens, init_cache(DBRX, 2, 8))
    assert f"tokens is {found} where" in str(error.value)


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [-1, 3], [3, 4], [0, 0], [], [2.5, 3]])
def test_lengths_that_do_not_fit_the_tokens(lengths: list[int]) -> None:
    with pytest.raises(InputError) as error:
        forward(NO_PARAMS, mx.zeros((2, 3), mx.int32), init_cache(DBRX, 2, 8), lengths=lengths)
    assert f"lengths is {lengths} where 2 whole numbers from 0 to 3" in str(error.value)


def test_tokens_that_are_no_array() -> None:
    with pytest.raises(InputError, match="tokens is a list where"):
        forward(NO_PARAMS, [[1, 2]], init_cache(DBRX, 1, 8))  # type: ignore[call-overload]


SMALL = Config(
    d_model=12,
    n_heads=2,
    n_layers=2,
    vocab_size=20,
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    dtype="float32",
)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (replace(SMALL, vocab_size=21), "transformer.wte.weight is [21, 12] where [20, 12] (vocab d_model)"),
        (replace(SMALL, n_layers=3), "transformer.blocks.2.norm_attn_norm.norm_1.weight is unexpected"),
        (replace(SMALL, n_layers=1), "transformer.blocks.1.norm_attn_norm.norm_1.weight is missing"),
        (replace(SMALL, ffn=replace(SMALL.ffn, moe_num_experts=4)), "ffn.router.layer.weight is [4, 12] where [3, 12]"),
        (replace(SMALL, ffn=replace(SMALL.ffn, ffn_hidden_size=9)), "mlp.w2.weight is [3, 12, 9] where [3, 12, 8]"),
        (replace(SMALL, dtype="float16"), "weight is float16 where float32 is expected"),
    ],
)
def test_parameters_of_another_model(other: Config, sentence: str) -> None:
    with pytest.raises(CheckpointError) as error:
        forward(init_params(other, mx.random.key(0)), batch_of([1, 2]), init_cache(SMALL, 1, 8))
    assert sentence in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "lm_head"])
def test_parameters_without_a_part(part: str) -> None:
    params: Any = init_params(SMALL, mx.random.key(0))
    del params[part]
    with pytest.raises(CheckpointError, match=rf"{part}[.\w]* is missing"):
        forward(params, batch_of([1, 2]), init_cache(SMALL, 1, 8))


@pytest.mark.parametrize("path", ["wte", "norm_f"])
def test_parameters_without_a_leaf(path: str) -> None:
    params: Any = init_params(SMALL, mx.random.key(0))
    params["transformer"][path] = {}
    with pytest.raises(CheckpointError, match=f"transformer.{path}.weight is missing"):
        forward(params, batch_of([1, 2]), init_cache(SMALL, 1, 8))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_of_nothing(chunk_size: int) -> None:
    with pytest.raises(InputError, match=f"chunk_size is {chunk_size} where it must be at least 1"):
        forward(NO_PARAMS, mx.zeros((2, 3), mx.int32), init_cache(DBRX, 2, 8), chunk_size=chunk_size)


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_of_the_last_tokens_are_those_of_score(seed: int) -> None:
    case, tokens, _ = sequence(seed)
    shorter = max(1, len(tokens) // 3)
    rows, lengths = batch_of(tokens, tokens), [len(tokens), shorter]
    routing = score(case.params, rows[:1], case.config)[1]
    wanted = mx.stack([routing.top_experts[:, 0, length - 1] for length in lengths], axis=1)
    for capacity, chunk_size, last_only in ((0, 64, True), (CAPACITY, 64, False), (CAPACITY, 7, True)):
        cache = init_cache(case.config, 2, capacity)
        logits, after, experts = forward(
            case.params, rows, cache, lengths=lengths, chunk_size=chunk_size, last_only=last_only, with_experts=True
        )
        plain, plain_after = forward(
            case.params, rows, cache, lengths=lengths, chunk_size=chunk_size, last_only=last_only
        )
        assert experts.shape == (case.config.n_layers, 2, case.config.ffn.moe_top_k)
        assert mx.array_equal(mx.sort(experts, axis=-1), mx.sort(wanted, axis=-1))
        assert mx.array_equal(logits, plain, equal_nan=True)
        assert after.lengths == plain_after.lengths
