"""One step of training as a function of values: state and batch to the next state and what was measured.

    state = init_state(params, recipe, mx.random.key(0))
    state, measured = train_step(state, tokens, mask, config=config, recipe=recipe)

The state is a tree of arrays: float32 master weights, the optimizer's moments, the key that jitter is drawn from. The
recipe is static. Few functions are compiled, each traced once for a whole run: `gradients` of one micro-batch, `add` of
two, `update`. The first runs the same `score` that inference does; there is no other path.

Optimizer and schedules are `mlx.optimizers`'. Its AdamW is an object that holds a state; here it is made anew inside
the trace, given the state, and asked for the next, so nothing outlives the step.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx
from jaxtyping import Bool, Float32, Integer, UInt32
from mlx import optimizers
from mlx.utils import tree_flatten, tree_map

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.argument_checks import check_key, check_tree
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import nest, param_count
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import check_fields, checked
from dbrx_fn.runtime.compile import compiled
from dbrx_fn.runtime.device import memory_size
from dbrx_fn.training.losses import LossParts, check_batch, loss

State = dict[str, Any]
Schedule = Literal["cosine", "linear", "constant"]


_MOST_STEPS = 2**31
"""MLX's schedules count in 32 bits."""


@dataclass(frozen=True)
class Recipe:
    """How to train: everything about a run that isn't the model, the data or an array.

    `steps`: updates in the whole run, which the schedule is stretched over.
    `learning_rate`: at its highest, after `warmup` steps of linear rise.
    `warmup`: `None` for a twentieth of the steps, at most 100.
    `schedule`: how it falls from there to `final_share` of it at the last step.
    `betas`, `eps`, `weight_decay`: AdamW's (https://arxiv.org/abs/1711.05101), with bias correction. Norms' weights
        don't decay.
    `clip_norm`: gradients are scaled so that their global norm is at most this; `None` leaves them.
    `micro_batches`: how many a batch is cut into, one after the other, so that less memory is needed.
    `dtype`: what the forward and backward pass compute in; master weights and optimizer are float32 whatever it is.
    `recompute`: keep only each block's input for the backward pass, and compute the rest again.
    `z_loss_weight`: of the routers' z-loss.

    Raises:
        InputError: naming the field, if it can't work.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int | None = None
    schedule: Schedule = "cosine"
    final_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    micro_batches: int = 1
    dtype: Dtype = "float32"
    recompute: bool = False
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise InputError(f"{name} is {shown(getattr(self, name))} where it must be {expected}.")

        for name in ("steps", "micro_batches"):
            require(1 <= getattr(self, name) < _MOST_STEPS, name, "at least 1, a whole number")
        fits = self.warmup is None or 0 <= self.warmup <= self.steps
        require(fits, "warmup", f"from 0 to the number of steps, {self.steps}, a whole number, or None")
        for name in ("learning_rate", "weight_decay", "z_loss_weight"):
            require(getattr(self, name) >= 0, name, "0 or a positive number")
        require(0 <= self.final_share <= 1, "final_share", "from 0 to 1")
        numbers = all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas)
        require(numbers and len(self.betas) == 2, "betas", "two numbers from 0 to below 1, in a tuple")
        require(self.eps > 0, "eps", "a positive number")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a positive number or None")
        types = ("float32", "bfloat16")
        require(self.dtype in types, "dtype", f"one of {', '.join(types)}: gradients of float16 leave its range")

    @property
    def warmup_steps(self) -> int:
        """For how many steps the learning rate rises."""
        return min(100, self.steps // 20) if self.warmup is None else self.warmup


class Measured(NamedTuple):
    """What a step measured, before its update; lazy float32 arrays.

    `loss`: what was differentiated.
    `parts`: what that was made of; means over the micro-batches, in `cross_entropy` weighted by their targets.
    `gradient_norm`: global, before clipping.
    `learning_rate`: of this step's update.
    """

    loss: mx.array
    parts: LossParts
    gradient_norm: mx.array
    learning_rate: mx.array


class Gradients(NamedTuple):
    """Of a batch or of a part of it: a tree as the parameters, float32; the loss; its parts."""

    tree: Params
    loss: mx.array
    parts: LossParts


@checked
def init_state(params: Params, recipe: Recipe, key: mx.array) -> State:
    """The state before the first step: `params` (any float dtype, becoming float32), `optimizer`, `key`.

    Args:
        params: the tree, dense.
        recipe: how to train.
        key: an `mx.random.key`, which jitter is drawn from.

    Raises:
        InputError: if one of them is something else, or the tree is quantized.
    """
    check_tree(params)
    check_key("key", key)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    packed = [path for path, leaf in leaves.items() if not mx.issubdtype(leaf.dtype, mx.floating)]
    if packed:
        raise InputError(f"{packed[0]} is quantized, and integers have no gradient: call dbrx_fn.dequantize first.")
    masters = tree_map(lambda array: mx.contiguous(array.astype(mx.float32)), params)
    optimizer = {}
    for name, part in _by_decay(masters).items():
        adamw = _adamw(name, recipe)
        adamw.init(part)
        optimizer[name] = adamw.state
    return {"params": masters, "optimizer": optimizer, "key": key}


def check_memory(config: Config) -> None:
    """Makes sure that the machine holds a model's weights, their gradients and AdamW's two moments, all float32.

    Raises:
        InputError: if it doesn't.
    """
    needed = 16 * param_count(config)
    if needed > memory_size():
        raise InputError(
            f"The model's {param_count(config):,} parameters need {needed / 2**30:.1f} GiB to be trained and this"
            f" machine has {memory_size() / 2**30:.1f} GiB: take a smaller model, or a larger machine."
        )


@checked
def train_step(
    state: State, tokens: mx.array, mask: mx.array | None, *, config: Config, recipe: Recipe
) -> tuple[State, Measured]:
    """One update. Nothing waits for the device.

    Args:
        state: from `init_state`, or from the step before; drop it for the one returned, and its memory is reused.
        tokens: int32 `[batch time]`; all of them are predicted, but for the first of each row.
        mask: bool `[batch time]`, which of them count; all, if `None`.
        config: the model's; `moe_loss_weight` and `moe_jitter_eps` count, `dtype` doesn't (the recipe's does).
        recipe: how to train.

    Returns:
        The state after it, and what was measured.

    Raises:
        InputError: if an argument isn't what it is said to be here, or the recipe's micro-batches don't divide the
            batch.
        CheckpointError: if the state's parameters don't fit the config.
    """
    if state.keys() != {"params", "optimizer", "key"}:
        raise InputError("state is no state of training: give what init_state made, or the step before returned.")
    check_batch(tokens, mask)
    count = recipe.micro_batches
    if tokens.shape[0] % count:
        raise InputError(f"The batch has {tokens.shape[0]} rows, which {count} micro-batches don't divide evenly.")
    config = replace(config, dtype=recipe.dtype)
    next_key, *keys = mx.random.split(state["key"], count + 1)
    # Each micro-batch counts by its targets, so that cutting a batch changes nothing.
    targets = None if mask is None else mx.maximum(mask[:, 1:].sum(), 1)
    total: Gradients | None = None
    for part, key, part_mask in zip(
        mx.split(tokens, count), keys, [None] * count if mask is None else mx.split(mask, count), strict=True
    ):
        share = mx.array(1 / count) if part_mask is None or targets is None else part_mask[:, 1:].sum() / targets
        made = gradients(state["params"], part, part_mask, share, key, config=config, recipe=recipe)
        total = made if total is None else add(total, made)
    assert total is not None
    params, optimizer, norm, rate = update(
        state["params"], state["optimizer"], total.tree, config=config, recipe=recipe
    )
    return {"params": params, "optimizer": optimizer, "key": next_key}, Measured(total.loss, total.parts, norm, rate)


@compiled
def gradients(
    params: Params,
    tokens: Integer[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"] | None,
    share: Float32[mx.array, ""],
    key: UInt32[mx.array, "2"],
    *,
    config: Config,
    recipe: Recipe,
) -> Gradients:
    """What one micro-batch adds to the batch's gradients, loss and its parts.

    Args:
        params: float32 masters.
        tokens: of this micro-batch.
        mask: which of them are targets.
        share: of all the batch's targets, those in this micro-batch.
        key: for jitter.
        config: the model's, in the dtype to compute in.
        recipe: how to train.
    """
    dtype = getattr(mx, config.dtype)

    def objective(masters: Params) -> tuple[mx.array, LossParts]:
        cast = tree_map(lambda array: array.astype(dtype), masters)
        _, parts = loss(cast, tokens, mask, config, jitter_key=key, recompute=recipe.recompute)
        # The mean over targets of the whole batch, and the mean over micro-batches of what is about routing.
        cross_entropy = parts.cross_entropy * share
        parts = LossParts(cross_entropy, *(part / recipe.micro_batches for part in parts[1:]))
        routing = config.ffn.moe_loss_weight * parts.load_balance + recipe.z_loss_weight * parts.router_z
        return cross_entropy + routing, parts

    (value, parts), grads = mx.value_and_grad(objective)(params)
    return Gradients(grads, value, parts)


@compiled
def add(one: Gradients, other: Gradients) -> Gradients:
    """Two micro-batches' sum."""
    total: Gradients = tree_map(mx.add, one, other)
    return total


@compiled
def update(
    params: Params, optimizer: State, grads: Params, *, config: Config, recipe: Recipe
) -> tuple[Params, State, Float32[mx.array, ""], Float32[mx.array, ""]]:
    """Clips, and takes AdamW's step: the next parameters and optimizer state, the gradients' norm, the rate."""
    limit = float("inf") if recipe.clip_norm is None else recipe.clip_norm
    grads, norm = optimizers.clip_grad_norm(grads, limit)
    leaves: dict[str, mx.array] = {}
    after: State = {}
    split_params, split_grads = _by_decay(params), _by_decay(grads)
    for name in split_params:
        adamw = _adamw(name, recipe)
        # Its dicts are written to, which mustn't be those of the caller.
        adamw.state = tree_map(lambda array: array, optimizer[name])
        leaves |= adamw.apply_gradients(split_grads[name], split_params[name])
        after[name] = adamw.state
    rate: mx.array = after["matrices"]["learning_rate"]
    return nest(leaves, config), after, norm, rate


def learning_rate(recipe: Recipe, done: int) -> float:
    """The learning rate of the update after `done` of them."""
    return float(_learning_rate(recipe)(mx.array(done)))


def _by_decay(params: Params) -> dict[str, dict[str, mx.array]]:
    """The tree's leaves by path: matrices, whose weights decay, and norms, whose don't."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    return {
        "matrices": {path: array for path, array in leaves.items() if array.ndim > 1},
        "norms": {path: array for path, array in leaves.items() if array.ndim == 1},
    }


def _adamw(name: str, recipe: Recipe) -> optimizers.AdamW:
    return optimizers.AdamW(
        _learning_rate(recipe),
        betas=list(recipe.betas),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay if name == "matrices" else 0.0,
        bias_correction=True,
    )


def _learning_rate(recipe: Recipe) -> Any:
    """The rate as a function of the steps done before."""
    highest, lowest = recipe.learning_rate, recipe.learning_rate * recipe.final_share
    falling = max(1, recipe.steps - recipe.warmup_steps - 1)
    after = {
        "cosine": optimizers.cosine_decay(highest, falling, lowest),
        "linear": optimizers.linear_schedule(highest, lowest, falling),
        "constant": lambda step: mx.array(highest),
    }[recipe.schedule]
    if not recipe.warmup_steps:
        return after
    rise = optimizers.linear_schedule(highest / recipe.warmup_steps, highest, max(1, recipe.warmup_steps - 1))
    return optimizers.join_schedules([rise, after], [recipe.warmup_steps])
