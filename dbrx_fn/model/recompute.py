"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): activations are computed again for their gradients.

Unlike `mx.checkpoint`, it computes a block's gradients together. Otherwise those of weights could wait for the first
block's, and keep all blocks' activations until then.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.norm_attn_norm import Stream
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.params import quantized_leaves
from dbrx_fn.model.positions import Positions
from dbrx_fn.model.tree import BlockParams


def recomputed(
    params: BlockParams,
    x: mx.array,
    positions: Positions,
    jitter_key: mx.array | None,
    config: LayerConfig,
    frozen: object,
) -> tuple[Stream, Routing]:
    """`block` without a cache, whose activations are computed again for its gradients.

    Args:
        params: one layer's parameters.
        x: the residual stream.
        positions: the tokens' positions.
        jitter_key: for the router's jitter. No jitter, if not given.
        config: sizes and constants.
        frozen: those of its leaves that get no gradients, nested alike. Leaves of quantized matrices get none either.
    """
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    constant = quantized_leaves(leaves) | dict(tree_flatten(frozen)).keys()
    trained = [path for path in leaves if path not in constant]

    def run(weights: Sequence[mx.array], x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        given = dict(zip(trained, weights, strict=True))
        whole: BlockParams = tree_unflatten([(path, given.get(path, leaf)) for path, leaf in leaves.items()])
        x, _, routing = block(whole, x, None, positions, jitter_key, config=config)
        return x, routing.logits, routing.top_experts

    @mx.custom_function
    def layer(weights: Sequence[mx.array], x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return run(weights, x)

    @layer.vjp
    def _vjp(
        primals: tuple[Sequence[mx.array], mx.array],
        cotangents: tuple[mx.array, mx.array, mx.array],
        outputs: tuple[mx.array, mx.array, mx.array],
    ) -> tuple[list[mx.array], mx.array]:
        weights, x = primals
        # No choice of experts has a gradient. The block runs again when its gradient is known, and not before.
        known = list(cotangents[:2])
        again = [*weights, mx.depends(x, known)]
        _, grads = mx.vjp(lambda *given: list(run(given[:-1], given[-1])[:2]), again, known)
        *of_weights, of_x = grads
        return of_weights, mx.depends(of_x, of_weights) if of_weights else of_x

    x, logits, top_experts = cast(Any, layer)([leaves[path] for path in trained], x)
    return x, Routing(logits, top_experts)
