"""The memory that training will take, found by training the first layers.

Activations depend on the machine: which operations are fused, how experts are cut into segments, what is dequantized
for a product. Counting all that would repeat it. So the plan measures steps of the same model with two layers and with
four. The difference is what two layers add. With recomputing that is little, and counted: a block's input, its routing,
its state and its gradients. The update may take more than the gradients: it has the state, all gradients, and the next
values of some leaves. Compiled, it has so few operations that MLX starts all of them before the first is done, so it
has the next state as a whole.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import compiles
from dbrx_fn.training.step import Recipe, init_state, train_step

_IN_FLIGHT = 12
"""The number of largest leaves whose next values the update has beside the state and all gradients."""
_SHALLOW, _DEEP = 2, 4
"""The numbers of layers of the measured models."""
_STEPS = 2
"""Steps that are measured. The time decides when buffers are free, so one step can take less than the next."""


class MemoryPlan(NamedTuple):
    """Bytes.

    `frozen`: of the parameters that aren't trained.
    `state`: of the trained ones in float32, and of the optimizer's two moments.
    `step`: what a step adds at its peak: activations, gradients, and the next state.
    """

    frozen: int
    state: int
    step: int

    @property
    def peak(self) -> int:
        """The most memory at once."""
        return self.frozen + self.state + self.step


def plan_memory(
    trained: Params,
    frozen: Params | None,
    *,
    config: Config,
    recipe: Recipe,
    batch_size: int,
    sequence_length: int,
) -> MemoryPlan:
    """Measures what training will take. It runs steps of at most two and of at most four layers.

    Args:
        trained: the parameters to train.
        frozen: the others, in the recipe's dtype, if there are any.
        config: the model's.
        recipe: how to train.
        batch_size: number of sequences of a step.
        sequence_length: tokens of each, one less than are given to `train_step`.
    """
    if frozen is not None:
        mx.eval(frozen)
    # Random tokens go to the experts about as evenly as a text's do.
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch_size, sequence_length + 1))
    batch = mx.array(tokens.astype(np.int32))
    mask = mx.ones(batch.shape, mx.bool_)
    deep = min(config.n_layers, _DEEP)
    peak = _peak(trained, frozen, deep, batch, mask, config, recipe)
    more = config.n_layers - deep
    if recipe.recompute:
        peak += more * _kept_by_layer(trained, config, recipe, batch_size * sequence_length)
    elif more:
        shallow = _peak(trained, frozen, _SHALLOW, batch, mask, config, recipe)
        peak += more * (peak - shallow) // (_DEEP - _SHALLOW)
    sizes = [leaf.size for leaf in _leaves(trained)]
    state = 3 * 4 * sum(sizes)
    if more:
        following = state if compiles() else _IN_FLIGHT * 4 * max(sizes)
        peak = max(peak, state + 4 * sum(sizes) + following)
    return MemoryPlan(0 if frozen is None else sum(leaf.nbytes for leaf in _leaves(frozen)), state, peak - state)


def _kept_by_layer(trained: Params, config: Config, recipe: Recipe, tokens: int) -> int:
    """Bytes that another block adds to a step that recomputes activations."""
    itemsize: int = getattr(mx, recipe.dtype).size
    routing = 4 * (config.ffn.moe_num_experts + config.ffn.moe_top_k)
    kept = tokens // recipe.micro_batches * (config.d_model * itemsize + routing)
    more, fewer = (sum(leaf.size for leaf in _leaves(_first_layers(trained, depth))) for depth in (2, 1))
    return kept + 4 * 4 * (more - fewer)


def _peak(
    trained: Params,
    frozen: Params | None,
    depth: int,
    batch: mx.array,
    mask: mx.array,
    config: Config,
    recipe: Recipe,
) -> int:
    """The most bytes that a step of the first layers takes, beside the frozen parameters."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    # Fresh numbers: the given ones may still lie in files, or be taken into the state that training begins with.
    fresh = cast(Params, _zeros(_first_layers(trained, depth)))
    state = init_state(fresh, recipe, mx.random.key(0))
    del fresh
    mx.eval(state)
    mx.reset_peak_memory()
    for _ in range(_STEPS):
        state, measured = train_step(
            state,
            batch,
            mask,
            config=replace(config, n_layers=depth),
            recipe=recipe,
            frozen=None if frozen is None else _first_layers(frozen, depth),
        )
        mx.eval(state, measured)
    mx.synchronize()
    return mx.get_peak_memory() - before


def _first_layers(params: Params, depth: int) -> Params:
    """The tree, or part of a tree, of a model with fewer layers."""
    tree: Any = dict(params)
    if "blocks" in tree.get("transformer", {}):
        tree["transformer"] = {**tree["transformer"], "blocks": tree["transformer"]["blocks"][:depth]}
    return cast(Params, tree)


def _zeros(tree: Any) -> Any:
    if isinstance(tree, mx.array):
        return mx.zeros(tree.shape, tree.dtype)
    if isinstance(tree, dict):
        return {name: _zeros(part) for name, part in tree.items()}
    return [_zeros(part) for part in tree]


def _leaves(tree: Params) -> list[mx.array]:
    leaves: dict[str, mx.array] = dict(tree_flatten(tree))
    return list(leaves.values())
