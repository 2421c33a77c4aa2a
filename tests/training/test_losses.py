"""The loss is its formula, its gradient is the formula's, and what it scores is what `forward` computes."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dbrx_fn.errors import InputError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.runtime.device import as_if, backend, on_cpu
from dbrx_fn.training.losses import (
    LossParts,
    bits_per_byte,
    busiest_expert,
    chosen_experts,
    loss,
    loss_parts,
)
from dbrx_fn.training.step import Recipe, gradients
from dbrx_fn.training.target_nats import token_nats
from tests.support import checkpoints, oracle
from tests.support.trees import Case, as_float64, case_of, relative_error, tree

Measured = Callable[[str, float], float]
Array = NDArray[Any]

EXPERTS, TOP_K = 4, 2
Z_LOSS_WEIGHT = 0.1
RAW: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 12,
    "n_heads": 3,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 23,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 1, "rope_theta": 10000},
    "ffn_config": {
        "ffn_hidden_size": 7,
        "moe_num_experts": EXPERTS,
        "moe_top_k": TOP_K,
        "moe_normalize_expert_weights": 1,
        "moe_loss_weight": 0.5,
    },
}
"""Its weights of the routers' losses are large, so that no error in them hides behind cross-entropy."""


def model(dtype: Dtype = "float32") -> Case:
    return case_of(RAW, np.random.default_rng(0), dtype)


def random_batch(seed: int, batch: int, time: int) -> tuple[mx.array, mx.array]:
    """Tokens, and a mask of two thirds of them."""
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(RAW["vocab_size"], size=(batch, time)), rng.random((batch, time)) < 2 / 3
    return mx.array(tokens.astype(np.int32)), mx.array(mask)


LENGTHS = [9, 6]


def rows_of(tokens: mx.array, lengths: list[int]) -> list[Array]:
    return [np.array(row)[:length] for row, length in zip(tokens, lengths, strict=True)]


def test_the_loss_is_the_oracles(measured: Measured) -> None:
    case = model()
    tokens, mask = random_batch(0, 2, 9)
    value, parts = loss(case.params, tokens, mask, case.config, lengths=mx.array(LENGTHS), z_loss_weight=Z_LOSS_WEIGHT)
    expected = oracle.loss(RAW, case.tensors, rows_of(tokens, LENGTHS), rows_of(mask, LENGTHS))
    for name in ("cross_entropy", "load_balance", "router_z"):
        assert measured(f"{name} to the oracle", relative_error(getattr(parts, name), getattr(expected, name))) <= 1e-6
    assert relative_error(value, expected.total(0.5, Z_LOSS_WEIGHT)) <= 1e-6
    shares = [np.bincount(layer.ravel(), minlength=EXPERTS) / layer.size for layer in expected.top_experts]
    assert relative_error(parts.expert_share, shares) <= 1e-6
    assert busiest_expert(parts.expert_share) == pytest.approx(np.max(shares) * EXPERTS)


@pytest.fixture(scope="module", params=sorted({backend(), "metal", "cuda"} if on_cpu() else {backend()}))
def grads(request: pytest.FixtureRequest) -> dict[str, mx.array]:
    """Of the batch above, by path, as each back end arranges it."""
    case = model()
    tokens, mask = random_batch(0, 2, 9)

    def objective(params: Any) -> mx.array:
        value, _ = loss(params, tokens, mask, case.config, lengths=mx.array(LENGTHS), z_loss_weight=Z_LOSS_WEIGHT)
        return value

    with as_if(backend=request.param):
        return dict(tree_flatten(mx.grad(objective)(case.params)))


NAMES = list(checkpoints.random_tensors(RAW, np.random.default_rng(0)))
DIRECTIONS = 4
STEP = 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences_of_the_oracle(
    name: str, grads: dict[str, mx.array], measured: Measured
) -> None:
    """Along random directions of length 1; the largest error, as a part of the largest derivative.

    Central differences in float64 with this step leave some 1e-8.
    """
    case = model()
    tokens, mask = random_batch(0, 2, 9)
    rng = np.random.default_rng(1)
    actual, expected = [], []
    for _ in range(DIRECTIONS):
        direction = rng.standard_normal(case.tensors[name].shape)
        direction /= np.linalg.norm(direction)
        moved = [
            oracle.loss(
                RAW,
                {**case.tensors, name: case.tensors[name] + step * direction},
                rows_of(tokens, LENGTHS),
                rows_of(mask, LENGTHS),
            )
            for step in (STEP, -STEP)
        ]
        # A step across a tie of experts would be no derivative.
        np.testing.assert_array_equal(moved[0].top_experts, moved[1].top_experts)
        ahead, behind = (one.total(0.5, Z_LOSS_WEIGHT) for one in moved)
        expected.append((ahead - behind) / (2 * STEP))
        along = dict(tree_flatten(tree(case.config, {**case.tensors, name: direction})))
        path = name if name in along else name + ".weight"
        actual.append(float((as_float64(grads[path]) * as_float64(along[path])).sum()))
    assert measured("gradients to finite differences", relative_error(np.array(actual), expected)) <= 1e-5


def parts_of(router_logits: Array, top_experts: Array, lengths: list[int] | None = None) -> LossParts:
    """Of routers' logits `[layer batch time expert]`; the vocabulary's are all alike."""
    batch, time = router_logits.shape[1:3]
    return loss_parts(
        mx.zeros((batch, time)),
        mx.array(router_logits.astype(np.float32)),
        mx.array(top_experts.astype(np.uint32)),
        None,
        None if lengths is None else mx.array(lengths, mx.int32),
    )


def test_load_balance_is_1_where_the_choices_are_even() -> None:
    """Whatever the probabilities are; and where those are even, whatever the choices are."""
    rng = np.random.default_rng(0)
    even = np.broadcast_to(np.array([[0, 1], [2, 3]] * 3), (2, 1, 6, TOP_K))
    parts = parts_of(rng.standard_normal((2, 1, 6, EXPERTS)), even)
    assert float(parts.load_balance) == pytest.approx(1, abs=1e-6)
    assert busiest_expert(parts.expert_share) == pytest.approx(1, abs=1e-6)
    parts = parts_of(np.zeros((2, 1, 6, EXPERTS)), np.zeros((2, 1, 6, 1)) + np.array([0, 1]))
    assert float(parts.load_balance) == pytest.approx(1, abs=1e-6)
    assert busiest_expert(parts.expert_share) == pytest.approx(EXPERTS / TOP_K)


@pytest.mark.parametrize("chosen", [([0, 1], [0, 1]), ([0, 1], [2, 3])], ids=["alike", "opposite"])
def test_load_balance_is_the_experts_to_a_choice_where_all_tokens_go_one_way(chosen: tuple[list[int], ...]) -> None:
    """Also where two layers are unbalanced in opposite ways, since it is the mean over layers."""
    top_experts = np.broadcast_to(np.array(chosen)[:, None, None], (2, 1, 6, TOP_K))
    router_logits = np.full((2, 1, 6, EXPERTS), -50.0)
    np.put_along_axis(router_logits, top_experts, 50.0, axis=-1)
    assert float(parts_of(router_logits, top_experts).load_balance) == pytest.approx(EXPERTS / TOP_K, abs=1e-6)


def test_router_z_by_hand() -> None:
    """Four logits of ln(a / 4) have a log-sum-exp of ln(a)."""
    router_logits = np.zeros((2, 1, 2, EXPERTS))
    router_logits[0, 0] = np.log(np.array([[8.0], [2.0]]) / 4)
    router_logits[1, 0] = np.log(np.array([[1.0], [20.0]]) / 4)
    expected = np.mean(np.log([8.0, 2.0, 1.0, 20.0]) ** 2)
    assert float(parts_of(router_logits, np.zeros((2, 1, 2, TOP_K))).router_z) == pytest.approx(expected, rel=1e-6)


def test_busiest_expert_by_hand() -> None:
    assert busiest_expert([[0.25, 0.25, 0.25, 0.25], [0.1, 0.5, 0.2, 0.2]]) == pytest.approx(2)
    assert busiest_expert(mx.array([[1.0, 0.0, 0.0]])) == 3


def test_chosen_experts_by_hand() -> None:
    assert chosen_experts(mx.array([[2, 0]], mx.uint32), 3).tolist() == [[[False, False, True], [True, False, False]]]


def test_bits_per_byte() -> None:
    """Tokens that are bytes, any of which is as likely, take 8 bits each; of two bytes, half as much."""
    assert bits_per_byte(math.log(256), tokens=10, text_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=10, text_bytes=20) == pytest.approx(4)


def test_the_routers_losses_reach_the_router_and_the_choice_has_no_gradient() -> None:
    """With the share a constant, d load_balance / d logits is that of the probabilities alone."""
    rng = np.random.default_rng(0)
    router_logits = rng.standard_normal((1, 1, 6, EXPERTS))
    top_experts = np.argsort(-router_logits)[..., :TOP_K]

    def load_balance(said: mx.array) -> mx.array:
        chosen = mx.array(top_experts.astype(np.uint32))
        return loss_parts(mx.zeros((1, 6)), said, chosen, None, None).load_balance

    actual = mx.grad(load_balance)(mx.array(router_logits.astype(np.float32)))
    probabilities = np.exp(router_logits) / np.exp(router_logits).sum(-1, keepdims=True)
    share = np.bincount(top_experts.ravel(), minlength=EXPERTS) / top_experts.size
    mean = (probabilities * share).sum(-1, keepdims=True)
    assert relative_error(actual, EXPERTS * probabilities * (share - mean) / 6) <= 1e-6


def close(one: Any, other: Any, tolerance: float = 1e-6) -> bool:
    return relative_error(one, other) <= tolerance


@settings(max_examples=25)
@given(st.lists(st.integers(2, 9), min_size=3, max_size=3), st.integers(0, 99))
def test_a_batch_is_its_rows_however_they_are_padded(lengths: list[int], seed: int) -> None:
    """Cross-entropy weighs them by their targets, all about routing by the tokens that were read."""
    case = model()
    tokens, mask = random_batch(seed, 3, 9)
    _, together = loss(case.params, tokens, mask, case.config, lengths=mx.array(lengths, mx.int32))
    alone = [
        loss(case.params, tokens[n : n + 1, :length], mask[n : n + 1, :length], case.config)[1]
        for n, length in enumerate(lengths)
    ]

    def mean(name: str, weights: Any) -> NDArray[np.float64]:
        values = np.stack([as_float64(getattr(parts, name)) for parts in alone])
        total: NDArray[np.float64] = np.tensordot(weights, values, 1) / max(np.sum(weights), 1)
        return total

    targets = [int(np.array(mask)[n, 1:length].sum()) for n, length in enumerate(lengths)]
    read = [length - 1 for length in lengths]
    assert abs(float(together.cross_entropy) - mean("cross_entropy", targets)) <= 1e-5
    assert close(together.router_z, mean("router_z", read), 1e-5)
    share, probability = mean("expert_share", read), mean("expert_probability", read)
    assert close(together.expert_share, share, 1e-5)
    assert close(together.expert_probability, probability, 1e-5)
    assert close(together.load_balance, EXPERTS * (share * probability).sum(-1).mean(), 1e-5)


def test_what_padding_holds_changes_nothing() -> None:
    case = model()
    tokens, mask = random_batch(0, 2, 9)
    other, other_mask = random_batch(1, 2, 9)
    real = mx.arange(9) < mx.array(LENGTHS)[:, None]
    lengths = mx.array(LENGTHS, mx.int32)
    _, parts = loss(case.params, tokens, mask, case.config, lengths=lengths)
    repadded, remasked = mx.where(real, tokens, other), mx.where(real, mask, other_mask)
    assert not np.array_equal(np.array(repadded), np.array(tokens))
    _, same = loss(case.params, repadded, remasked, case.config, lengths=lengths)
    for one, another in zip(parts, same, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(another))


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=18, max_size=18))
def test_a_mask_says_what_is_predicted_and_nothing_else(masked: list[bool]) -> None:
    case = model()
    tokens, _ = random_batch(0, 2, 9)
    mask = np.array(masked).reshape(2, 9)
    _, parts = loss(case.params, tokens, mx.array(mask), case.config)
    _, unmasked = loss(case.params, tokens, None, case.config)
    logits, _ = forward(case.params, tokens[:, :-1], init_cache(case.config, 2, 0))
    chosen = as_float64(token_nats(logits, tokens[:, 1:]))[mask[:, 1:]]
    assert float(parts.cross_entropy) == pytest.approx(chosen.mean() if chosen.size else 0.0, rel=1e-6)
    for one, another in zip(parts[1:], unmasked[1:], strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(another))


def test_a_batch_without_targets_is_no_division_by_zero() -> None:
    case = model()
    tokens, _ = random_batch(0, 2, 9)

    def cross_entropy(params: Any) -> mx.array:
        return loss(params, tokens, mx.zeros((2, 9), mx.bool_), case.config)[1].cross_entropy

    value, grads = mx.value_and_grad(cross_entropy)(case.params)
    assert float(value) == 0
    assert not any(np.array(grad).any() for grad in dict(tree_flatten(grads)).values())


def bits(array: mx.array) -> Array:
    return np.array(array.view(mx.uint16 if array.dtype == mx.bfloat16 else mx.uint32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("time", [1, 8, 11, 16, 17])
def test_training_scores_what_inference_computes(time: int, dtype: Dtype) -> None:
    """Bit for bit; 8 and 16 tokens fill what they are padded to, and the others don't."""
    case = model(dtype)
    tokens, _ = random_batch(0, 2, time)
    logits, routing = score(case.params, tokens, case.config)
    expected, _ = forward(case.params, tokens, init_cache(case.config, 2, 0))
    np.testing.assert_array_equal(bits(logits), bits(expected))
    assert logits.dtype == expected.dtype == getattr(mx, dtype)
    assert routing.logits.shape == (2, 2, time, EXPERTS)
    assert routing.logits.dtype == mx.float32
    assert routing.top_experts.shape == (2, 2, time, TOP_K)
    likeliest = np.sort(np.argsort(-np.array(routing.logits))[..., :TOP_K])
    np.testing.assert_array_equal(np.sort(np.array(routing.top_experts)), likeliest)


def expected_nats(case: Case, tokens: mx.array) -> mx.array:
    """`[batch time-1]`, from `forward`."""
    logits, _ = forward(case.params, tokens[:, :-1], init_cache(case.config, tokens.shape[0], 0))
    return token_nats(logits, tokens[:, 1:])


def single_targets() -> list[tuple[int, int]]:
    return [(row, t) for row in range(2) for t in range(1, 9)]


def only(row: int, t: int) -> mx.array:
    return mx.array(np.arange(18).reshape(2, 9) == 9 * row + t)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_tokens_cross_entropy_is_that_of_forward(dtype: Dtype) -> None:
    case = model(dtype)
    tokens, _ = random_batch(0, 2, 9)
    nats = np.array(expected_nats(case, tokens))
    for row, t in single_targets():
        _, parts = loss(case.params, tokens, only(row, t), case.config)
        assert np.array(parts.cross_entropy) == nats[row, t - 1]
    _, parts = loss(case.params, tokens, None, case.config)
    assert np.array(parts.cross_entropy) == np.array(expected_nats(case, tokens).sum() / nats.size)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="fused kernels round by what they are fused with")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_each_tokens_cross_entropy_under_a_gradient_is_that_of_forward(dtype: Dtype, recompute: bool) -> None:
    case = model(dtype)
    masters = model().params if dtype == "float32" else tree(model().config, case.tensors)
    tokens, _ = random_batch(0, 2, 9)
    nats = np.array(expected_nats(case, tokens))
    recipe = Recipe(steps=1, warmup=0, dtype=dtype, recompute=recompute)
    for row, t in single_targets():
        made = gradients(
            masters, tokens, only(row, t), mx.array(1.0), mx.random.key(0), config=case.config, recipe=recipe
        )
        assert np.array(made.parts.cross_entropy) == nats[row, t - 1]


TOKENS = mx.zeros((2, 5), mx.int32)
MASK = mx.ones((2, 5), mx.bool_)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"tokens is a list where it must be an mx\.array", {"tokens": [[1, 2]]}),
    (r"tokens is int32 \[5\]", {"tokens": mx.zeros(5, mx.int32)}),
    (r"tokens is int32 \[2, 1\]", {"tokens": mx.zeros((2, 1), mx.int32)}),
    (r"tokens is int32 \[0, 5\]", {"tokens": mx.zeros((0, 5), mx.int32)}),
    (r"tokens is float32 \[2, 5\]", {"tokens": mx.zeros((2, 5))}),
    (r"mask is a list where it must be an mx\.array or None", {"mask": [[True]]}),
    (r"mask is bool \[2, 4\] where bool \[2, 5\]", {"mask": mx.ones((2, 4), mx.bool_)}),
    (r"mask is bool \[5\]", {"mask": mx.ones(5, mx.bool_)}),
    (r"mask is int32 \[2, 5\]", {"mask": mx.ones((2, 5), mx.int32)}),
    (r"lengths is a list where it must be an mx\.array or None", {"lengths": [5, 5]}),
    (r"lengths is int32 \[3\]", {"lengths": mx.zeros(3, mx.int32)}),
    (r"lengths is float32 \[2\]", {"lengths": mx.zeros(2)}),
]


@pytest.mark.parametrize(("sentence", "wrong"), REFUSED, ids=[sentence for sentence, _ in REFUSED])
def test_what_does_not_fit_is_refused(sentence: str, wrong: dict[str, Any]) -> None:
    case = model()
    call: dict[str, Any] = {"tokens": TOKENS, "mask": MASK, "lengths": mx.array([5, 3], mx.int32)} | wrong
    with pytest.raises(InputError, match=sentence):
        loss(case.params, call["tokens"], call["mask"], case.config, lengths=call["lengths"])
