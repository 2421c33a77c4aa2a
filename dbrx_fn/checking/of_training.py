"""Checks of training: the loss, its gradients, and the weights after a step of AdamW."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.comparison import GRADIENT_LIMIT, LIMITS, Comparison, compare
from dbrx_fn.checking.models import MASK, RECIPE, TRAINED
from dbrx_fn.checking.reference import expected
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.tree import Params
from dbrx_fn.training.losses import loss
from dbrx_fn.training.step import init_state, train_step


def check_training(group: str, *, in_one: bool = False, **choices: Any) -> Iterator[Check]:
    """Checks of one batch, with and without recomputation.

    Args:
        group: the report's rows, before what is compared.
        in_one: whether they are one row.
        **choices: of `Check`, as for `as_if`.
    """

    def row(what: str) -> str:
        return group if in_one else f"{group}, {what}"

    name = f"a batch of {len(TRAINED.lengths)} times {TRAINED.lengths[0]} tokens (seed {TRAINED.seed})"
    choices["family"] = "training"
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        yield Check(row("loss"), f"{name}, loss, {dtype}", LIMITS[dtype], partial(_loss, dtype), **choices)
    for recompute in (False, True):
        case = f"{name}, gradients{', recomputed' if recompute else ''}"
        yield Check(row("gradients"), case, GRADIENT_LIMIT, partial(_gradients, recompute), **choices)
    yield Check(row("a step of AdamW"), f"{name}, a step", GRADIENT_LIMIT, _step, **choices)


def _loss(dtype: Dtype) -> Comparison:
    params, config = TRAINED.params(dtype)
    value, _ = loss(params, _tokens(), mx.array(MASK), config, z_loss_weight=RECIPE.z_loss_weight)
    return compare(value[None], expected("trained/loss"))


def _gradients(recompute: bool) -> Comparison:
    params, config = TRAINED.params("float32")

    def objective(params: Params) -> mx.array:
        return loss(params, _tokens(), mx.array(MASK), config, z_loss_weight=RECIPE.z_loss_weight, recompute=recompute)[
            0
        ]

    return _largest("trained/gradient", mx.grad(objective)(params))


def _step() -> Comparison:
    params, config = TRAINED.params("float32")
    state, _ = train_step(
        init_state(params, RECIPE, mx.random.key(0)), _tokens(), mx.array(MASK), config=config, recipe=RECIPE
    )
    return _largest("trained/after", state["params"])


def _tokens() -> mx.array:
    return mx.array(np.array(TRAINED.rows), mx.int32)


def _largest(name: str, tree: Params) -> Comparison:
    """The comparison of the worst leaf."""
    found: dict[str, mx.array] = dict(tree_flatten(tree))
    compared = [compare(leaf, expected(f"{name}/{path}")) for path, leaf in found.items()]
    return max(compared, key=lambda one: np.inf if np.isnan(one.error) else one.error)
