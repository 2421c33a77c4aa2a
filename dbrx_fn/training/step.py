"""One training step as a pure function: state and batch to the next state and measurements.

    state = init_state(params, recipe, mx.random.key(0))
    state, measured = train_step(state, tokens, mask, config=config, recipe=recipe)

The state is a tree of arrays: float32 master weights, the optimizer's moments, and the key for jitter. The recipe is
static. Three functions are compiled, and each is traced once per run: `gradients` of a micro-batch, `add`, which sums
two of these, and `update`. `gradients` runs the same `score` as inference.

To train a part of a tree, such as its adapters, `dbrx_fn.model.partition` cuts the tree in two. The state is made of
one part, and each step is given the other, which has neither gradients nor moments:

    trained, frozen = partition(params, config, is_adapter)
    state = init_state(trained, recipe, mx.random.key(0))
    state, measured = train_step(state, tokens, mask, config=config, recipe=recipe, frozen=frozen)

The optimizer and schedules are those of `mlx.optimizers`. Its AdamW is an object with a state. Each step makes a new
one inside the trace, gives it the state, and takes the next state from it, so no object outlives the step.
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
from dbrx_fn.model.params import nest, param_count, param_spec
from dbrx_fn.model.shard import WHOLE, Shard
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.collectives import all_sum, all_sum_many
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
    """A training run's settings, apart from the model and the data.

    `steps`: updates in the whole run. The schedule spans them.
    `learning_rate`: the highest rate, reached after `warmup` steps of linear rise.
    `warmup`: number of steps. `None` means a twentieth of `steps`, at most 100.
    `schedule`: how the rate then falls, to `final_share` of the highest at the last step.
    `betas`, `eps`, `weight_decay`: AdamW's (https://arxiv.org/abs/1711.05101), with bias correction. Norms' weights
        don't decay.
    `clip_norm`: gradients are scaled so that their global norm is at most this. `None` means no clipping.
    `micro_batches`: number of parts of a batch, computed one after the other to save memory.
    `dtype`: of the forward and backward pass. Master weights and optimizer are always float32.
    `recompute`: gradient checkpointing: keep only each block's input for the backward pass, and compute the rest again.
    `z_loss_weight`: weight of the routers' z-loss.

    Raises:
        InputError: if a field has an impossible value. It names the field.
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
        """Number of steps in which the learning rate rises."""
        return min(100, self.steps // 20) if self.warmup is None else self.warmup


class Measured(NamedTuple):
    """A step's measurements before its update, as lazy float32 arrays.

    `loss`: the loss that was differentiated.
    `parts`: its parts, as means over the micro-batches. `cross_entropy` is weighted by their numbers of targets.
    `gradient_norm`: the global norm before clipping.
    `learning_rate`: the rate of this step's update.
    """

    loss: mx.array
    parts: LossParts
    gradient_norm: mx.array
    learning_rate: mx.array


class Gradients(NamedTuple):
    """Gradients of a batch or a micro-batch: a float32 tree like the parameters', the loss, and its parts."""

    tree: Params
    loss: mx.array
    parts: LossParts


@checked
def init_state(params: Params, recipe: Recipe, key: mx.array) -> State:
    """The state before the first step, a dict of `params` (in float32), `optimizer` and `key`.

    Args:
        params: the leaves to train, of any float dtype: a dense tree, or a part of a tree.
        recipe: how to train.
        key: an `mx.random.key` for jitter.

    Raises:
        InputError: if an argument has another type, or the tree is quantized.
    """
    check_tree(params)
    check_key("key", key)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    packed = [path for path, leaf in leaves.items() if not mx.issubdtype(leaf.dtype, mx.floating)]
    if packed:
        raise InputError(f"{packed[0]} is quantized, and integers have no gradient: dequantize it, or train adapters.")
    masters = tree_map(lambda array: mx.contiguous(array.astype(mx.float32)), params)
    optimizer = {}
    for name, part in _by_decay(masters).items():
        adamw = _adamw(name, recipe)
        adamw.init(part)
        optimizer[name] = adamw.state
    return {"params": masters, "optimizer": optimizer, "key": key}


def check_memory(config: Config) -> None:
    """Checks that the machine has memory for the weights, their gradients and AdamW's two moments, all in float32.

    Raises:
        InputError: if it hasn't.
    """
    needed = 16 * param_count(config)
    if needed > memory_size():
        raise InputError(
            f"The model's {param_count(config):,} parameters need {needed / 2**30:.1f} GiB for training, and this"
            f" machine has {memory_size() / 2**30:.1f} GiB: take a smaller model, or a larger machine."
        )


@checked
def train_step(
    state: State,
    tokens: mx.array,
    mask: mx.array | None,
    *,
    config: Config,
    recipe: Recipe,
    frozen: Params | None = None,
    replica: Shard = WHOLE,
) -> tuple[State, Measured]:
    """One update. Nothing waits for the device.

    Args:
        state: from `init_state`, or from the step before. Its memory is reused if it is dropped for the new one.
        tokens: int32 `[batch time]`. All are predicted, except the first of each row.
        mask: bool `[batch time]`, true for targets. All, if `None`.
        config: the model's, with `moe_loss_weight` and `moe_jitter_eps`. Its `dtype` is ignored for the recipe's.
        recipe: how to train.
        frozen: the tree's other leaves, if the state has only a part. Its floats are of the recipe's dtype.
        replica: this process's place, if several train the same model and each computes its part of the micro-batches.
            All give the same batch, and get the same state.

    Returns:
        The next state, and this step's measurements.

    Raises:
        InputError: if an argument has another type or shape, or the recipe's micro-batches don't divide the batch.
        CheckpointError: if the parameters don't fit the config.
    """
    if state.keys() != {"params", "optimizer", "key"}:
        raise InputError("state is not a training state: give the result of init_state, or of the step before.")
    check_batch(tokens, mask)
    count = recipe.micro_batches
    if tokens.shape[0] % count:
        raise InputError(f"The batch has {tokens.shape[0]} rows, which {count} micro-batches don't divide evenly.")
    check_replicas(recipe, replica.size)
    config = replace(config, dtype=recipe.dtype)
    next_key, *keys = mx.random.split(state["key"], count + 1)
    # Each micro-batch is weighted by its number of targets, so cutting a batch doesn't change its gradient.
    targets = None if mask is None else mx.maximum(mask[:, 1:].sum(), 1)
    total: Gradients | None = None
    parts = zip(mx.split(tokens, count), keys, [None] * count if mask is None else mx.split(mask, count), strict=True)
    own = count // replica.size
    for part, key, part_mask in list(parts)[replica.rank * own : (replica.rank + 1) * own]:
        share = mx.array(1 / count) if part_mask is None or targets is None else part_mask[:, 1:].sum() / targets
        made = gradients(state["params"], part, part_mask, share, key, frozen, config=config, recipe=recipe)
        total = made if total is None else add(total, made)
    assert total is not None
    total = _summed(total, replica.size)
    params, optimizer, norm, rate = update(
        state["params"], state["optimizer"], total.tree, config=config, recipe=recipe
    )
    return {"params": params, "optimizer": optimizer, "key": next_key}, Measured(total.loss, total.parts, norm, rate)


def check_replicas(recipe: Recipe, processes: int) -> None:
    """Raises `InputError` if so many processes can't share the micro-batches evenly."""
    if recipe.micro_batches % processes:
        more = -(-recipe.micro_batches // processes) * processes
        raise InputError(
            f"micro_batches is {recipe.micro_batches} and {processes} processes share them, each its own: take a"
            f" multiple of {processes}, such as --micro-batches {more}."
        )


def _summed(own: Gradients, processes: int) -> Gradients:
    """The sum of all processes' gradients, losses and parts."""
    leaves: dict[str, mx.array] = dict(tree_flatten(own))
    sums = iter(all_sum_many(list(leaves.values()), processes))
    total: Gradients = tree_map(lambda _: next(sums), own)
    return total


@compiled
def gradients(
    params: Params,
    tokens: Integer[mx.array, "batch time"],
    mask: Bool[mx.array, "batch time"] | None,
    share: Float32[mx.array, ""],
    key: UInt32[mx.array, "2"],
    frozen: Params | None = None,
    *,
    config: Config,
    recipe: Recipe,
) -> Gradients:
    """One micro-batch's share of the batch's gradients, loss and parts.

    Args:
        params: float32 master weights.
        tokens: this micro-batch's.
        mask: which tokens are targets.
        share: the fraction of the batch's targets that are in this micro-batch.
        key: for jitter.
        frozen: the tree's other leaves, if `params` is only a part.
        config: the model's, with the dtype to compute in.
        recipe: how to train.
    """
    dtype = getattr(mx, config.dtype)

    def objective(masters: Params) -> tuple[mx.array, LossParts]:
        cast = tree_map(lambda array: array.astype(dtype), masters)
        _, parts = loss(cast, tokens, mask, config, jitter_key=key, recompute=recipe.recompute, frozen=frozen)
        # Cross-entropy is a mean over the batch's targets. The routing losses are means over micro-batches.
        cross_entropy = parts.cross_entropy * share
        parts = LossParts(cross_entropy, *(part / recipe.micro_batches for part in parts[1:]))
        routing = config.ffn.moe_loss_weight * parts.load_balance + recipe.z_loss_weight * parts.router_z
        return cross_entropy + routing, parts

    (value, parts), grads = mx.value_and_grad(objective)(params)
    return Gradients(grads, value, parts)


@compiled
def add(one: Gradients, other: Gradients) -> Gradients:
    """The sum of two micro-batches' gradients, losses and parts."""
    total: Gradients = tree_map(mx.add, one, other)
    return total


@compiled
def update(
    params: Params, optimizer: State, grads: Params, *, config: Config, recipe: Recipe
) -> tuple[Params, State, Float32[mx.array, ""], Float32[mx.array, ""]]:
    """Clips the gradients and applies AdamW. Returns the next parameters and optimizer state, the norm, the rate."""
    limit = float("inf") if recipe.clip_norm is None else recipe.clip_norm
    if config.shard.is_whole:
        grads, norm = optimizers.clip_grad_norm(grads, limit)
    else:
        norm = _norm_of_parts(grads, config)
        factor = mx.minimum(limit / (norm + 1e-6), 1.0)
        grads = tree_map(lambda grad: grad * factor, grads)
    leaves: dict[str, mx.array] = {}
    after: State = {}
    split_params, split_grads = _by_decay(params), _by_decay(grads)
    for name in split_params:
        adamw = _adamw(name, recipe)
        # AdamW writes to its state's dicts, so they are copies of the caller's.
        adamw.state = tree_map(lambda array: array, optimizer[name])
        leaves |= adamw.apply_gradients(split_grads[name], split_params[name])
        after[name] = adamw.state
    rate: mx.array = after["matrices"]["learning_rate"]
    return nest(leaves, config), after, norm, rate


def _norm_of_parts(grads: Params, config: Config) -> Float32[mx.array, ""]:
    """The norm of all processes' gradients. What every process holds counts once."""
    spec, leaves = param_spec(config), dict[str, mx.array](tree_flatten(grads))
    own, common = mx.array(0.0), mx.array(0.0)
    for path, leaf in leaves.items():
        squares = leaf.square().sum()
        if spec[path].cut is None:
            common = common + squares
        else:
            own = own + squares
    return mx.sqrt(all_sum(own, config.shard.size) + common)


def learning_rate(recipe: Recipe, done: int) -> float:
    """The learning rate of the update that follows `done` updates."""
    return float(_learning_rate(recipe)(mx.array(done)))


def _by_decay(params: Params) -> dict[str, dict[str, mx.array]]:
    """The tree's leaves by path: matrices, which decay, and norms, which don't."""
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
    """The learning rate as a function of the number of steps done."""
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
