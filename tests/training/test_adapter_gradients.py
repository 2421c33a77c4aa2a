"""Gradients of adapters are those of the formula, whatever the format of the weights beside them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.adapters import adapted, is_adapter
from dbrx_fn.model.params import KINDS, nest
from dbrx_fn.model.partition import joined, partition
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import as_if, backend, on_cpu
from dbrx_fn.training.losses import loss
from dbrx_fn.training.step import Recipe, init_state, train_step
from tests.support import oracle
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error, tensors_of

Measured = Callable[[str, float], float]

RAW: dict[str, Any] = {**QUANTIZABLE, "ffn_config": {**QUANTIZABLE["ffn_config"], "moe_loss_weight": 0.5}}
CASE = case_of(RAW, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
RNG = np.random.default_rng(1)
TOKENS = mx.array(RNG.integers(RAW["vocab_size"], size=(4, 12)).astype(np.int32))
MASK = mx.array(RNG.random((4, 12)) < 2 / 3)

AFFINE = [Format(bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FORMATS = [*AFFINE, Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]
BACKENDS = sorted({backend(), "metal", "cuda"} if on_cpu() else {backend()})
STEP = 1e-4


def leaves(params: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def gradients_of(params: Params, *, recompute: bool = False) -> dict[str, mx.array]:
    trained, frozen = partition(params, CONFIG, is_adapter)

    def objective(trained: Params) -> mx.array:
        return loss(joined(trained, frozen, CONFIG), TOKENS, MASK, CONFIG, recompute=recompute)[0]

    return leaves(mx.grad(objective)(trained))


def exact_loss(params: Params, moved: dict[str, NDArray[np.float64]]) -> oracle.Loss:
    """The oracle's loss, in float64, of the matrices that adapters make; `moved` replaces some of their leaves."""
    whole = {path: as_float64(leaf) for path, leaf in leaves(params).items()} | moved
    for path in adapted(params):
        base = path.removesuffix("weight")
        a, b, scale = (whole.pop(base + name) for name in ("lora_a", "lora_b", "lora_scale"))
        whole[path] = whole[path] + scale * b @ a
    tensors = {path.removesuffix(".weight") if ".experts." in path else path: leaf for path, leaf in whole.items()}
    for name in [name for name in tensors if ".experts." in name]:
        stacked = tensors[name].swapaxes(1, 2) if name.endswith("w2") else tensors[name]
        tensors[name] = stacked.reshape(-1, stacked.shape[-1])
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    return oracle.loss(RAW, tensors, list(np.array(TOKENS)), list(np.array(MASK)))


SHAPES = {name: tensor.shape for name, tensor in tensors_of(PARAMS).items()}
ADAPTED = with_random_adapters(PARAMS, CONFIG, KINDS)


@pytest.fixture(scope="module", params=BACKENDS)
def grads(request: pytest.FixtureRequest) -> dict[str, mx.array]:
    """By path, as each back end arranges the computation."""
    with as_if(backend=request.param):
        return gradients_of(ADAPTED)


@pytest.mark.parametrize("path", [path for path in leaves(ADAPTED) if is_adapter(path) and "blocks.1" not in path])
def test_gradients_equal_finite_differences_of_the_oracle(
    path: str, grads: dict[str, mx.array], measured: Measured
) -> None:
    """Along random directions of length 1; the largest error, as a part of the largest derivative."""
    rng = np.random.default_rng(2)
    actual, expected = [], []
    at = as_float64(leaves(ADAPTED)[path])
    for _ in range(2):
        # Directions near the gradient's, so that derivatives are large and differences exact.
        direction = rng.standard_normal(at.shape) / np.sqrt(at.size)
        direction += as_float64(grads[path]) / np.linalg.norm(as_float64(grads[path]))
        direction /= np.linalg.norm(direction)
        moved = [exact_loss(ADAPTED, {path: at + step * direction}) for step in (STEP, -STEP)]
        # A step across a tie of experts would be no derivative.
        np.testing.assert_array_equal(moved[0].top_experts, moved[1].top_experts)
        ahead, behind = (one.total(0.5, 0.0) for one in moved)
        expected.append((ahead - behind) / (2 * STEP))
        actual.append(float((as_float64(grads[path]) * direction).sum()))
    assert measured("adapters' gradients to finite differences", relative_error(np.array(actual), expected)) <= 1e-5


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.mode}-{f.bits}-{f.group_size}")
def test_gradients_beside_quantized_weights_are_those_beside_dense_ones(form: Format, measured: Measured) -> None:
    quantized = quantize(PARAMS, CONFIG, Quantization(form, form, form, form, form))
    params = with_random_adapters(quantized, CONFIG, KINDS)
    expected = gradients_of(dequantize(params, CONFIG))
    # Other back ends use the quantized products of MLX for more rows.
    for arranged, recompute in ((backend(), False), (backend(), True), ("metal" if on_cpu() else backend(), False)):
        with as_if(backend=arranged):
            found = gradients_of(params, recompute=recompute)
        assert found.keys() == expected.keys()
        error = max(relative_error(found[path], as_float64(expected[path])) for path in expected)
        assert measured("adapters' gradients beside quantized weights to dense ones", error) <= 1e-5


def test_only_adapters_are_trained(measured: Measured) -> None:
    """Only they have moments. A step moves them as a step of `loss` does, and all else stays."""
    form = Format(4, 64)
    quantized = quantize(PARAMS, CONFIG, Quantization(form, form, form, form))
    params = with_random_adapters(quantized, CONFIG, ("attention", "experts"))
    trained, frozen = partition(params, CONFIG, is_adapter)
    recipe = Recipe(steps=10, warmup=0, betas=(0.0, 0.95), clip_norm=None)
    state = init_state(trained, recipe, mx.random.key(0))
    after, _ = train_step(state, TOKENS, MASK, config=CONFIG, recipe=recipe, frozen=frozen)
    assert leaves(after["params"]).keys() == set(filter(is_adapter, leaves(params)))
    moments = {path for part in after["optimizer"].values() for path in leaves(part)}
    counters = {"step", "learning_rate"}
    assert moments - counters == {f"{path}.{name}" for path in leaves(trained) for name in "mv"}
    expected = gradients_of(params)
    found = leaves(after["optimizer"])
    for path, gradient in expected.items():
        first_moment = found[f"matrices.{path}.m"]
        assert measured("a step's gradients", relative_error(first_moment, as_float64(gradient))) <= 1e-6
    moved = {path for path, leaf in leaves(after["params"]).items() if not mx.array_equal(leaf, leaves(params)[path])}
    assert moved == set(leaves(trained))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_and_recomputing_leave_a_step_as_it_is(dtype: Any) -> None:
    config = replace(CONFIG, dtype=dtype)
    form = Format(4, 64)
    plain: Any = quantize(PARAMS, CONFIG, Quantization(form, form, form, form))
    floats = getattr(mx, dtype)
    cast = {path: leaf if leaf.dtype == mx.uint32 else leaf.astype(floats) for path, leaf in leaves(plain).items()}
    params = with_random_adapters(nest(cast, config), config, KINDS)
    trained, frozen = partition(params, config, is_adapter)
    made = []
    for changes in ({}, {"recompute": True}, {"micro_batches": 2}):
        recipe = Recipe(steps=10, warmup=0, dtype=dtype, betas=(0.0, 0.95), clip_norm=None, **changes)
        no_routing_loss = replace(config, ffn=replace(config.ffn, moe_loss_weight=0.0))
        state = init_state(trained, recipe, mx.random.key(0))
        after, measured = train_step(state, TOKENS, MASK, config=no_routing_loss, recipe=recipe, frozen=frozen)
        made.append((measured.loss.item(), leaves(after["optimizer"]["matrices"])))
    bar = 1e-5 if dtype == "float32" else 0.03
    for value, moments in made[1:]:
        assert value == pytest.approx(made[0][0], rel=bar)
        for path, moment in made[0][1].items():
            if path.endswith(".m"):
                assert relative_error(moments[path], as_float64(moment)) <= bar


def test_part_of_a_tree_needs_the_rest() -> None:
    params = with_random_adapters(PARAMS, CONFIG, ("head",))
    trained, _ = partition(params, CONFIG, is_adapter)
    recipe = Recipe(steps=10)
    state = init_state(trained, recipe, mx.random.key(0))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing"):
        train_step(state, TOKENS, MASK, config=CONFIG, recipe=recipe)
    form = Format(4, 64)
    with pytest.raises(InputError, match=r"transformer.wte.weight is quantized, .*or train adapters"):
        init_state(quantize(PARAMS, CONFIG, Quantization(form, form, form, form)), recipe, mx.random.key(0))
