"""What training takes is what was planned, and recomputing takes less."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.model.adapters import Adapters, add_adapters, is_adapter
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.partition import partition
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import as_if
from dbrx_fn.training.memory_plan import MemoryPlan, plan_memory
from dbrx_fn.training.step import Recipe, init_state, train_step

Measured = Callable[[str, float], float]

CONFIG = Config(
    d_model=128,
    n_heads=4,
    n_layers=8,
    vocab_size=1000,
    attn=AttnConfig(kv_n_heads=2, clip_qkv=8.0),
    ffn=FFNConfig(ffn_hidden_size=256, moe_num_experts=8, moe_top_k=2, moe_loss_weight=0.05),
    dtype="float32",
)
FORM = Format(4, 32)


def parts(*, adapted: bool) -> tuple[Params, Params | None]:
    params = init_params(CONFIG, mx.random.key(0))
    if not adapted:
        return params, None
    params = quantize(params, CONFIG, Quantization(FORM, FORM, FORM, FORM))
    return partition(add_adapters(params, CONFIG, Adapters(8), mx.random.key(1)), CONFIG, is_adapter)


def planned_and_taken(recipe: Recipe, sequence_length: int, *, adapted: bool) -> tuple[MemoryPlan, int]:
    """The plan, and the peak of three steps."""
    trained, frozen = parts(adapted=adapted)
    plan = plan_memory(trained, frozen, config=CONFIG, recipe=recipe, batch_size=4, sequence_length=sequence_length)
    state = init_state(trained, recipe, mx.random.key(0))
    del trained
    mx.eval(state)
    mx.synchronize()
    mx.clear_cache()
    leaves: dict[str, mx.array] = dict(tree_flatten([state, frozen or {}]))
    others = mx.get_active_memory() - sum(leaf.nbytes for leaf in leaves.values())
    del leaves
    mx.reset_peak_memory()
    rng = np.random.default_rng(1)
    for _ in range(3):
        tokens = mx.array(rng.integers(CONFIG.vocab_size, size=(4, sequence_length + 1)).astype(np.int32))
        mask = mx.ones(tokens.shape, mx.bool_)
        state, after = train_step(state, tokens, mask, config=CONFIG, recipe=recipe, frozen=frozen)
        mx.async_eval(state, after)
        mx.eval(after)
    return plan, mx.get_peak_memory() - others


def closest(recipe: Recipe, sequence_length: int, *, adapted: bool) -> tuple[MemoryPlan, float]:
    """The plan, and how far from it a run was, as a part of what the run took.

    So small a step takes more or less from run to run, since the time decides when buffers are free again. So the best
    of three runs counts.
    """
    for _ in range(3):
        plan, taken = planned_and_taken(recipe, sequence_length, adapted=adapted)
        error = abs(plan.peak / taken - 1)
        if error <= 0.05:
            break
    return plan, error


@pytest.mark.parametrize(
    ("sequence_length", "adapted", "options"),
    [
        (128, False, {}),
        (128, False, {"recompute": True}),
        (16, False, {}),
        (128, True, {}),
        (128, True, {"recompute": True}),
        (128, True, {"micro_batches": 2}),
    ],
)
def test_training_takes_what_was_planned(
    sequence_length: int, adapted: bool, options: dict[str, Any], measured: Measured
) -> None:
    plan, error = closest(Recipe(steps=9, **options), sequence_length, adapted=adapted)
    assert measured("planned memory to that taken", error) <= 0.05
    trained, frozen = parts(adapted=adapted)
    sizes: dict[str, mx.array] = dict(tree_flatten(trained))
    others: dict[str, mx.array] = dict(tree_flatten(frozen or {}))
    assert plan.state == 12 * sum(leaf.size for leaf in sizes.values())
    assert plan.frozen == sum(leaf.nbytes for leaf in others.values())


def test_compiled_training_takes_what_was_planned(measured: Measured) -> None:
    """Compiled, an update has so few operations that all leaves' next values are there at once."""
    with as_if(compiles=True):
        _, error = closest(Recipe(steps=9), 16, adapted=False)
    assert measured("planned memory to that taken", error) <= 0.05


def test_recomputing_keeps_no_activations_of_other_blocks() -> None:
    """Not those that the gradients of weights need, either."""
    kept, again = (planned_and_taken(Recipe(steps=9, recompute=r), 128, adapted=True)[0] for r in (False, True))
    assert again.step < kept.step / 2
