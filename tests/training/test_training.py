"""A step of training is its formulas, however it is cut up, and a run of them learns."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from dbrx_fn.errors import InputError
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.training.losses import loss
from dbrx_fn.training.step import Recipe, State, check_memory, gradients, init_state, train_step, update
from tests.support.trees import as_float64, relative_error

Measured = Callable[[str, float], float]
Leaves = dict[str, mx.array]

CONFIG = Config(
    d_model=12,
    n_heads=2,
    n_layers=2,
    vocab_size=23,
    attn=AttnConfig(clip_qkv=2.0),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=4, moe_top_k=2, moe_loss_weight=0.5, moe_jitter_eps=0.2),
    initializer_range=0.3,
    dtype="float32",
)
WITHOUT_JITTER = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_jitter_eps=None))
CROSS_ENTROPY_ONLY = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_jitter_eps=None, moe_loss_weight=0.0))

FIRST_MOMENT = Recipe(steps=10, warmup=0, betas=(0.0, 0.95), clip_norm=None)
"""AdamW's first moment after a step is that step's gradient."""


def start(recipe: Recipe, seed: int = 0, config: Config = CONFIG) -> State:
    return init_state(init_params(config, mx.random.key(seed)), recipe, mx.random.key(seed))


def batch(seed: int = 0) -> tuple[mx.array, mx.array]:
    """Four rows of nine tokens. The targets are unevenly spread: all, half, one, none."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((4, 9), np.bool_)
    mask[0], mask[1, ::2], mask[2, 5] = True, True, True
    return mx.array(rng.integers(CONFIG.vocab_size, size=(4, 9)).astype(np.int32)), mx.array(mask)


def by_path(tree: Any) -> Leaves:
    return dict(tree_flatten(tree))


def gradient_of(state: State) -> Leaves:
    """Of the step that `state` comes from, which was one of `FIRST_MOMENT`."""
    moments = {path: leaf for part in state["optimizer"].values() for path, leaf in by_path(part).items()}
    return {path: moments[f"{path}.m"] for path in by_path(state["params"])}


def largest_error(actual: Leaves, expected: Leaves) -> float:
    assert actual.keys() == expected.keys()
    return max(relative_error(actual[path], as_float64(expected[path])) for path in expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_add_up_to_their_batch(micro_batches: int, masked: bool, measured: Measured) -> None:
    """With cross-entropy alone, since the load-balancing loss of a whole isn't that of its parts."""
    tokens, mask = batch()
    cut = replace(FIRST_MOMENT, micro_batches=micro_batches)
    made = [
        train_step(start(recipe), tokens, mask if masked else None, config=CROSS_ENTROPY_ONLY, recipe=recipe)
        for recipe in (cut, FIRST_MOMENT)
    ]
    (in_parts, of_parts), (whole, of_whole) = made
    assert measured("micro-batches to their batch", largest_error(gradient_of(in_parts), gradient_of(whole))) <= 1e-5
    assert relative_error(of_parts.loss, as_float64(of_whole.loss)) <= 1e-6
    assert relative_error(of_parts.parts.router_z, as_float64(of_whole.parts.router_z)) <= 1e-6
    assert relative_error(of_parts.parts.expert_share, as_float64(of_whole.parts.expert_share)) <= 1e-6
    assert relative_error(of_parts.gradient_norm, as_float64(of_whole.gradient_norm)) <= 1e-5


def test_what_is_about_routing_is_the_mean_of_micro_batches() -> None:
    tokens, mask = batch()
    recipe = replace(FIRST_MOMENT, micro_batches=2, z_loss_weight=0.1)
    state = start(recipe)
    _, measured = train_step(state, tokens, mask, config=WITHOUT_JITTER, recipe=recipe)
    alone = [loss(state["params"], tokens[rows], mask[rows], WITHOUT_JITTER)[1] for rows in (slice(2), slice(2, 4))]
    for name in ("load_balance", "router_z", "expert_share", "expert_probability"):
        expected = np.mean([as_float64(getattr(parts, name)) for parts in alone], axis=0)
        assert relative_error(getattr(measured.parts, name), expected) <= 1e-6
    parts = measured.parts
    total = float(parts.cross_entropy) + 0.5 * float(parts.load_balance) + 0.1 * float(parts.router_z)
    assert float(measured.loss) == pytest.approx(total, rel=1e-6)


def test_a_step_takes_the_gradient_of_the_loss() -> None:
    tokens, mask = batch()
    recipe = replace(FIRST_MOMENT, z_loss_weight=0.1)
    state = start(recipe)

    def objective(params: Params) -> mx.array:
        return loss(params, tokens, mask, WITHOUT_JITTER, z_loss_weight=0.1)[0]

    value, grads = mx.value_and_grad(objective)(state["params"])
    after, measured = train_step(state, tokens, mask, config=WITHOUT_JITTER, recipe=recipe)
    expected = by_path(grads)
    assert largest_error(gradient_of(after), expected) <= 1e-6
    assert relative_error(measured.loss, as_float64(value)) <= 1e-6
    norm = math.sqrt(sum(float((as_float64(leaf) ** 2).sum()) for leaf in expected.values()))
    assert relative_error(measured.gradient_norm, norm) <= 1e-6


def test_recomputing_changes_no_gradient(measured: Measured) -> None:
    """With jitter, which has to be drawn again as it was."""
    tokens, mask = batch()
    made = [
        gradients(start(recipe)["params"], tokens, mask, mx.array(1.0), mx.random.key(3), config=CONFIG, recipe=recipe)
        for recipe in (FIRST_MOMENT, replace(FIRST_MOMENT, recompute=True))
    ]
    kept, again = (by_path(one.tree) for one in made)
    assert measured("gradients with recompute to those without", largest_error(again, kept)) <= 1e-6
    np.testing.assert_array_equal(np.array(made[0].loss), np.array(made[1].loss))


def random_like(params: Params, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    tree: Params = tree_map(lambda leaf: mx.array(rng.standard_normal(leaf.shape).astype(np.float32)), params)
    return tree


def global_norm(leaves: Leaves) -> float:
    return math.sqrt(sum(float((as_float64(leaf) ** 2).sum()) for leaf in leaves.values()))


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
def test_updates_are_adamws(clip_norm: float | None, measured: Measured) -> None:
    """Three of them, in float64 by hand: clipped by the global norm, bias corrected, decayed beside the gradient."""
    recipe = Recipe(
        steps=10, warmup=0, schedule="constant", learning_rate=0.1, weight_decay=0.5, eps=1e-3, clip_norm=clip_norm
    )
    state = start(recipe)
    params, optimizer = state["params"], state["optimizer"]
    expected = {path: as_float64(leaf) for path, leaf in by_path(params).items()}
    m = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    for step in range(1, 4):
        grads = random_like(params, step)
        norm = global_norm(by_path(grads))
        scale = min(1.0, (clip_norm or math.inf) / norm)
        params, optimizer, seen, rate = update(params, optimizer, grads, config=CONFIG, recipe=recipe)
        assert relative_error(seen, norm) <= 1e-6
        assert float(rate) == pytest.approx(0.1)
        for path, leaf in by_path(grads).items():
            gradient = as_float64(leaf) * scale
            m[path] = 0.9 * m[path] + 0.1 * gradient
            v[path] = 0.95 * v[path] + 0.05 * gradient**2
            towards = m[path] / (1 - 0.9**step) / (np.sqrt(v[path] / (1 - 0.95**step)) + 1e-3)
            decay = 0.0 if leaf.ndim == 1 else 0.5
            expected[path] = expected[path] - 0.1 * (towards + decay * expected[path])
    actual = by_path(params)
    error = max(relative_error(actual[path], expected[path]) for path in expected)
    assert measured("AdamW to its formula", error) <= 5e-6


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of the update that `step` others came before."""
    state = start(recipe)
    for part in state["optimizer"].values():
        part["step"] = mx.array(step, mx.uint64)
    nothing = tree_map(mx.zeros_like, state["params"])
    *_, rate = update(state["params"], state["optimizer"], nothing, config=CONFIG, recipe=recipe)
    return float(rate)


RISE = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 0.8}


@pytest.mark.parametrize(
    ("schedule", "fall"),
    [
        ("constant", {7: 0.8, 10: 0.8}),
        ("linear", {5: 0.7, 7: 0.5, 9: 0.3, 10: 0.2, 15: 0.2}),
        ("cosine", {6: 0.65, 7: 0.5, 8: 0.35, 10: 0.2, 15: 0.2}),
    ],
)
def test_the_rate_rises_to_its_highest_and_falls_to_its_final_share(schedule: Any, fall: dict[int, float]) -> None:
    """The last of 11 steps is 10; half the way between 0.8 and 0.2 is step 7."""
    recipe = Recipe(steps=11, warmup=4, learning_rate=0.8, final_share=0.25, schedule=schedule)
    for step, rate in (RISE | fall).items():
        assert rate_at(step, recipe) == pytest.approx(rate, rel=1e-5), step


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_any_warmup_fits(warmup: int) -> None:
    recipe = Recipe(steps=5, warmup=warmup, learning_rate=0.8, final_share=0.25, schedule="linear")
    rates = [rate_at(step, recipe) for step in range(5)]
    assert rates[max(0, warmup - 1)] == pytest.approx(0.8) == max(rates)
    assert rates[0] == pytest.approx(0.8 / max(1, warmup))
    assert rates[4] == pytest.approx(0.8 if warmup == 5 else 0.2)


def outline(state: State) -> dict[str, Any]:
    return {path: (leaf.shape, leaf.dtype) for path, leaf in by_path(state).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_the_states_form_and_float32(dtype: Any) -> None:
    tokens, mask = batch()
    recipe = replace(FIRST_MOMENT, dtype=dtype)
    drawn = init_params(replace(CONFIG, dtype="bfloat16"), mx.random.key(0))
    state = init_state(drawn, recipe, mx.random.key(0))
    before = outline(state)
    after, measured = train_step(state, tokens, mask, config=CONFIG, recipe=recipe)
    assert outline(after) == before
    assert list(by_path(after)) == list(by_path(state))
    assert {leaf.dtype for leaf in by_path(after["params"]).values()} == {mx.float32}
    assert {leaf.dtype for leaf in by_path(gradient_of(after)).values()} == {mx.float32}
    assert {leaf.dtype for leaf in by_path(measured).values()} == {mx.float32}
    # The masters take what bfloat16 can't hold.
    moved = by_path(after["params"])["lm_head.weight"]
    assert not np.array_equal(as_float64(moved), as_float64(moved.astype(mx.bfloat16)))


def test_bfloat16_computes_in_bfloat16() -> None:
    tokens, mask = batch()
    losses = {}
    for dtype in ("float32", "bfloat16"):
        recipe = replace(FIRST_MOMENT, dtype=dtype)
        state = start(recipe)
        _, measured = train_step(state, tokens, mask, config=WITHOUT_JITTER, recipe=recipe)
        losses[dtype] = float(measured.parts.cross_entropy)
        cast = tree_map(lambda leaf: leaf.astype(getattr(mx, dtype)), state["params"])  # noqa: B023
        _, parts = loss(cast, tokens, mask, replace(WITHOUT_JITTER, dtype=dtype))
        assert losses[dtype] == pytest.approx(float(parts.cross_entropy), rel=1e-6)
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_a_step_leaves_the_state_that_it_was_given() -> None:
    tokens, mask = batch()
    state = start(FIRST_MOMENT)
    before = {path: np.array(leaf) for path, leaf in by_path(state).items()}
    train_step(state, tokens, mask, config=CONFIG, recipe=FIRST_MOMENT)
    for path, leaf in by_path(state).items():
        np.testing.assert_array_equal(np.array(leaf), before[path])


def test_jitter_is_drawn_anew_each_step_and_from_the_states_key() -> None:
    tokens, mask = batch()
    recipe = replace(FIRST_MOMENT, learning_rate=0.0)

    def losses(config: Config, key: int) -> list[float]:
        state = start(recipe) | {"key": mx.random.key(key)}
        made = []
        for _ in range(2):
            state, measured = train_step(state, tokens, mask, config=config, recipe=recipe)
            made.append(float(measured.loss))
        return made

    first, second = losses(CONFIG, 0)
    assert first != second
    assert losses(CONFIG, 0) == [first, second]
    assert losses(CONFIG, 1)[0] not in (first, second)
    still = losses(WITHOUT_JITTER, 0)
    assert still[0] == still[1]


def test_each_micro_batch_draws_its_own_jitter() -> None:
    """Two that are alike would have the same shares of 16 choices, and so would both together."""
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_jitter_eps=0.9))
    recipe = replace(FIRST_MOMENT, micro_batches=2)
    tokens, _ = batch()
    _, measured = train_step(start(recipe), mx.repeat(tokens[:1], 2, axis=0), None, config=config, recipe=recipe)
    sixteenths = 16 * as_float64(measured.parts.expert_share)
    assert np.abs(sixteenths - sixteenths.round()).max() > 0.4


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_all_is_traced_in_the_first_step(micro_batches: int, recompute: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever keys, masks and data later ones have. The loss's weight makes a config that nothing is traced for."""
    weight = 2001.0 + 2 * micro_batches + recompute
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_loss_weight=weight))
    recipe = replace(FIRST_MOMENT, micro_batches=micro_batches, recompute=recompute)
    state = start(recipe)
    traces = []
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        for step in range(5):
            tokens, mask = batch(step)
            state, measured = train_step(state, tokens, mask, config=config, recipe=recipe)
            mx.eval(state, measured)
            records = [record for record in caplog.records if record.name == "dbrx_fn.compile"]
            traces.append(Counter(record.getMessage().split()[-1] for record in records))
            caplog.clear()
    assert traces[0]["gradients"] == traces[0]["update"] == 1
    # A trace within a trace is one for each layer, and one more where its values are computed again.
    assert 1 <= traces[0]["block"] <= CONFIG.n_layers * (2 if recompute else 1)
    assert traces[0]["add"] <= micro_batches - 1
    assert not any(traces[1:])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("learning_rate", -1.0, "0 or a positive number"),
        ("learning_rate", math.nan, "a number"),
        ("learning_rate", math.inf, "a number"),
        ("warmup", -1, "from 0 to the number of steps, 10"),
        ("warmup", 11, "from 0 to the number of steps, 10"),
        ("schedule", "exponential", "'cosine', 'linear' or 'constant'"),
        ("final_share", 1.5, "from 0 to 1"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("betas", (0.9,), "two numbers from 0 to below 1"),
        ("eps", 0.0, "a positive number"),
        ("weight_decay", -0.1, "0 or a positive number"),
        ("clip_norm", 0.0, "a positive number or None"),
        ("micro_batches", 0, "at least 1"),
        ("dtype", "float16", "one of float32, bfloat16"),
        ("z_loss_weight", -1.0, "0 or a positive number"),
    ],
)
def test_recipes_that_can_not_work_are_refused(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"^{field} is .* where it must be {expected}"):
        replace(FIRST_MOMENT, **{field: value})


@pytest.mark.parametrize(
    ("tokens", "mask", "sentence"),
    [
        (mx.zeros((3, 5), mx.int32), None, "3 rows, which 2 micro-batches don't divide evenly"),
        ([[1, 2]], None, "tokens is a list"),
        (mx.zeros((2, 5)), None, r"tokens is float32 \[2, 5\]"),
        (mx.array(3), None, r"tokens is int32 \[\]"),
        (mx.zeros((2, 5), mx.int32), mx.ones(5, mx.bool_), r"mask is bool \[5\]"),
        (mx.zeros((2, 5), mx.int32), mx.ones((2, 5)), r"mask is float32 \[2, 5\]"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tokens: Any, mask: Any, sentence: str) -> None:
    recipe = replace(FIRST_MOMENT, micro_batches=2)
    with pytest.raises(InputError, match=sentence):
        train_step(start(recipe), tokens, mask, config=CONFIG, recipe=recipe)


@pytest.mark.parametrize("name", ["steps", "warmup", "micro_batches"])
@pytest.mark.parametrize("value", [2.5, True, "2"])
def test_numbers_of_a_recipe_that_must_be_whole(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is {value!r} where it must be a whole number"):
        replace(FIRST_MOMENT, **{name: value})


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
@pytest.mark.parametrize("value", ["x", [1], {}, math.nan, 10**400, mx.array(1.0), object()])
def test_recipes_of_the_wrong_types_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{field} is .* where it must be .*\.$"):
        replace(FIRST_MOMENT, **{field: value})


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (19, 0), (50, 2), (1999, 99), (2000, 100), (10**6, 100)])
def test_a_recipe_needs_its_steps_only(steps: int, warmup: int) -> None:
    recipe = Recipe(steps)
    assert (recipe.warmup, recipe.warmup_steps) == (None, warmup)
    given = replace(recipe, warmup=warmup)
    state = start(recipe)
    tokens, mask = batch()
    rates = [train_step(state, tokens, mask, config=CONFIG, recipe=one)[1].learning_rate for one in (recipe, given)]
    assert float(rates[0]) == float(rates[1]) > 0


TREE = init_params(CONFIG, mx.random.key(0))
KEY = mx.random.key(0)
TOKENS = mx.array([[1, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((TREE, FIRST_MOMENT, 0), "^key is 0 where it must be an mx.array"),
        ((TREE, FIRST_MOMENT, mx.zeros(2)), r"^key is float32 \[2\] where a key is expected"),
        ((TREE, None, KEY), "^recipe is None where it must be a Recipe"),
        ((FIRST_MOMENT, TREE, KEY), "^params is a Recipe where it must be a dict"),
        ((CONFIG, FIRST_MOMENT, KEY), "^params is a Config where it must be a dict"),
        (({}, FIRST_MOMENT, KEY), "^params is empty where"),
        (({"a": [1]}, FIRST_MOMENT, KEY), "^params is a tree that holds a value of type int where"),
    ],
)
def test_a_state_of_what_can_not_be_one(arguments: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=rf"{sentence}.*\.$"):
        init_state(*arguments)


def test_a_quantized_tree_can_not_be_trained() -> None:
    config = replace(CONFIG, d_model=32)
    head = Quantization(experts=None, attention=None, embedding=None, head=Format(4, 32))
    packed = quantize(init_params(config, KEY), config, head)
    with pytest.raises(InputError, match=r"^lm_head.weight is quantized, .*: dequantize it, or train adapters\.$"):
        init_state(packed, FIRST_MOMENT, KEY)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state": TREE}, "^state is not a training state"),
        ({"state": None}, "^state is None where it must be a dict"),
        ({"config": TREE}, "^config is a dict where it must be a Config"),
        ({"config": FIRST_MOMENT}, "^config is a Recipe where it must be a Config"),
        ({"recipe": CONFIG}, "^recipe is a Config where it must be a Recipe"),
    ],
)
def test_a_step_of_other_things(changes: dict[str, Any], sentence: str) -> None:
    given = {"state": start(FIRST_MOMENT), "config": CONFIG, "recipe": FIRST_MOMENT, **changes}
    with pytest.raises(InputError, match=rf"{sentence}.*\.$"):
        train_step(given["state"], TOKENS, None, config=given["config"], recipe=given["recipe"])


@pytest.mark.parametrize(
    ("arguments", "more", "sentence"),
    [
        ((CONFIG, TOKENS, None, TREE), {}, "^params is a Config where it must be a dict"),
        ((TREE, TOKENS, None, TREE), {}, "^config is a dict where it must be a Config"),
        ((TREE, None, TOKENS, CONFIG), {}, "^tokens is None where it must be an mx.array"),
        ((TREE, TOKENS, None, CONFIG), {"jitter_key": 3}, "^jitter_key is 3 where it must be an mx.array or None"),
        ((TREE, TOKENS, None, CONFIG), {"z_loss_weight": "x"}, "^z_loss_weight is 'x' where it must be a number"),
    ],
)
def test_a_loss_of_other_things(arguments: Any, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=rf"{sentence}.*\.$"):
        loss(*arguments, **more)


def test_a_model_that_does_not_fit_the_machine() -> None:
    check_memory(CONFIG)
    with pytest.raises(InputError, match=r"need [\d.]+ GiB for training, .*: take a smaller model"):
        check_memory(replace(CONFIG, n_layers=999, d_model=2**18))


SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this and this gives life to thee.
"""

SMALL = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    vocab_size=256,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.01),
    dtype="float32",
)
RUN = Recipe(steps=50, learning_rate=2e-2, warmup=5, z_loss_weight=1e-3)
TEXT = SONNET.encode()[:288]


def train(seed: int, steps: int) -> list[float]:
    """Cross-entropy of each step, nats a byte; each batch is all of the text, in six rows."""
    tokens = mx.array(np.frombuffer(TEXT, np.uint8).reshape(6, 48).astype(np.int32))
    state = start(RUN, seed, SMALL)
    history = []
    for _ in range(steps):
        state, measured = train_step(state, tokens, None, config=SMALL, recipe=RUN)
        history.append(float(measured.parts.cross_entropy))
    return history


def test_a_run_learns_its_text(measured: Measured) -> None:
    """From what knowing nothing costs to well below what the frequencies of bytes alone would (3.0 nats)."""
    history = train(0, RUN.steps)
    assert history[0] == pytest.approx(math.log(256), rel=0.02)
    shares = [count / len(TEXT) for count in Counter(TEXT).values()]
    assert measured("nats a byte after 50 steps", history[-1]) < 0.4 * -sum(share * math.log(share) for share in shares)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="GPUs add gradients of rows up in any order")
def test_a_run_is_its_seeds() -> None:
    assert train(0, 4) == train(0, 4)
    assert train(0, 4) != train(1, 4)
