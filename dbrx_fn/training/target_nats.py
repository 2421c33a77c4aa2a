"""Each target's nats from the residual stream, a chunk of tokens at a time.

The logits of many tokens are the largest activations of all: `[tokens vocab]`, in float32 too, and once more in the
backward pass. So the head and its cross-entropy run on so few tokens at once that a chunk's logits are small, and the
backward pass computes them again. A batch that fits in one chunk is computed as a whole, and nothing twice.
"""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
from jaxtyping import Float, Float32, Integer
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.ends import head
from dbrx_fn.model.params import quantized_leaves
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.bounded import within

CHUNK_BYTES = 2**28
"""The most bytes of a chunk's logits in float32."""

Leaves = dict[str, mx.array]


def chunk_tokens(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """The number of tokens whose logits make a chunk."""
    return max(1, chunk_bytes // (4 * vocab_size))


def target_nats(
    params: Params,
    x: Float[mx.array, "batch time_or_more d_model"],
    targets: Integer[mx.array, "batch time"],
    *,
    config: LayerConfig,
    frozen: Params | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float32[mx.array, "batch time"]:
    """The negative natural logarithm of each target's probability, as `token_nats` of the logits.

    Args:
        params: the tree, or the part of it that is trained.
        x: the residual stream after the last block, perhaps with padding behind each row.
        targets: ids.
        config: sizes and dtype.
        frozen: the tree's other leaves.
        chunk_bytes: the most bytes of a chunk's logits in float32.
    """
    # Only these leaves get gradients in a chunk's backward pass. The others' would be computed for nothing.
    leaves, others = _head(params), {} if frozen is None else _head(frozen)
    constant = {path: leaves.pop(path) for path in quantized_leaves(leaves)} | others
    size = chunk_tokens(config.vocab_size, chunk_bytes)
    if targets.size <= size:
        return _nats({**constant, **leaves}, x, targets, config)
    chunks = [slice(start, start + size) for start in range(0, targets.size, size)]

    def of_chunk(leaves: Leaves, x: mx.array, targets: mx.array) -> mx.array:
        return _nats({**constant, **leaves}, x[None], targets[None], config)[0]

    @mx.custom_function
    def chunked(leaves: Leaves, x: mx.array, targets: mx.array) -> mx.array:
        return mx.concatenate([of_chunk(leaves, x[chunk], targets[chunk]) for chunk in chunks])

    @chunked.vjp
    def _vjp(
        primals: tuple[Leaves, mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[Leaves, mx.array, mx.array]:
        leaves, x, targets = primals
        totals: Leaves = {path: mx.zeros(leaf.shape, mx.float32) for path, leaf in leaves.items()}
        streams: list[mx.array] = []
        for chunk in chunks:

            def weighed(leaves: Leaves, x: mx.array, chunk: slice = chunk) -> mx.array:
                return (of_chunk(leaves, x, targets[chunk]) * cotangent[chunk]).sum()

            # Each chunk waits for the one before, or the logits of all chunks could be there at once.
            before = [*streams[-1:], *totals.values()]
            given = mx.depends(x[chunk], before) if streams else x[chunk]
            of_leaves, of_stream = mx.grad(weighed, argnums=(0, 1))(leaves, given)
            totals = {path: total + of_leaves[path].astype(mx.float32) for path, total in totals.items()}
            streams.append(of_stream)
        sums = {path: total.astype(leaves[path].dtype) for path, total in totals.items()}
        return sums, mx.concatenate(streams), mx.zeros_like(targets)

    nats = cast(mx.array, chunked(leaves, x[:, : targets.shape[1]].reshape(-1, x.shape[-1]), targets.reshape(-1)))
    return nats.reshape(targets.shape)


def token_nats(
    logits: Float[mx.array, "batch time vocab"], targets: Integer[mx.array, "batch time"]
) -> Float32[mx.array, "batch time"]:
    """The negative natural logarithm of each target's probability, in float32 for every dtype of logits.

    It is NaN for a target outside of the vocabulary.
    """
    ids, known = within(targets, logits.shape[-1])
    nats: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), ids)
    return mx.where(known, nats, mx.nan)


def _nats(leaves: Mapping[str, mx.array], x: mx.array, targets: mx.array, config: LayerConfig) -> mx.array:
    """`target_nats` of some tokens, computed as a whole."""
    # MLX traces again if a dict's order changes.
    parts: Any = tree_unflatten([(path, leaves[path]) for path in sorted(leaves)])
    logits = head(parts["norm_f"], parts["lm_head"], x, config=config)
    return token_nats(logits[:, : targets.shape[1]], targets)


def _head(params: Params) -> Leaves:
    """The leaves of the final norm and the head, by their paths. A part of a tree may have none."""
    norm = cast(Any, params).get("transformer", {}).get("norm_f", {})
    return dict(tree_flatten({"norm_f": norm, "lm_head": cast(Any, params).get("lm_head", {})}))
