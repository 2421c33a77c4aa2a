"""DBRX from tokens to logits: `forward`, and `score` for whole sequences together with what the routers said.

Both run the same blocks. On the host: check the arguments, cut long inputs into chunks, pad each chunk to one of few
lengths. On the device: embed, one compiled `block` a layer, and the head. See `docs/architecture.md` for the whole.
"""

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32, Integer, UInt32

from dbrx_fn.errors import CacheError, CheckpointError, InputError
from dbrx_fn.model.cache import Cache, Window, init_cache, window
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.embedding import embedding
from dbrx_fn.model.layers.norm_attn_norm import Stream
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.params import check_params, check_part
from dbrx_fn.model.shapes import attended
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.norm import layer_norm
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.compile import compiled


@checked
def forward(
    params: Params,
    tokens: mx.array,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    last_only: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[mx.array, Cache]:
    """Logits of the next token after each of `tokens`, which continue from what `cache` holds.

    One call, several, or one token at a time give the same logits. Nothing waits for the device.

    Args:
        params: the tree, as `load` or `init_params` makes it.
        tokens: integer `[batch time]`. Nobody waits for them to be looked at: where a row holds an id outside of the
            vocabulary, the logits of the chunk are NaN in that row, and so are all that continue from it.
        cache: what came before, and the model's config. One of capacity 0 stands for nothing, and stays so.
        lengths: how many of each row's tokens are real, counted from the left; the rest is padding, whose logits mean
            nothing and whose ids may be any. All of them, if not given. 0 leaves a row as it is.
        last_only: only compute the logits of each row's last real token; a row without any gets some that mean nothing.
        chunk_size: at most this many tokens of each row are worked on at once, to bound memory. With a cache of
            capacity 0 everything goes at once.

    Returns:
        logits: `[batch time vocab]`, or `[batch 1 vocab]` with `last_only`, in `config.dtype`.
        cache: holds the new tokens too. The old one stays valid, but to keep it costs a copy.

    Raises:
        InputError: if tokens, lengths or chunk_size aren't of these shapes, types and ranges.
        CacheError: if a row's tokens don't fit the cache's capacity (`grow_cache` makes room), or it was made for
            another batch size.
        CheckpointError: if the tree doesn't fit the cache's config.
    """
    lengths = _checked_lengths(tokens, cache, lengths)
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size} where it must be at least 1.")
    config, capacity = cache.config, cache.capacity
    _check_outline(params, config)
    time = tokens.shape[1]
    chunks = chunk_widths(max(lengths), min(chunk_size, capacity)) if capacity else [max(lengths)]
    pieces: list[mx.array] = []
    last = None
    start = 0
    for width in chunks:
        real = tuple(max(0, min(length - start, width)) for length in lengths)
        x, cache = _run_chunk(params, tokens[:, start : start + width], real, cache)
        if last_only:
            last = pick_last(x, mx.array(real, mx.int32), last)
        else:
            pieces.append(_head(params, x, config)[:, :width])
        start += width
        if len(chunks) > 1:
            # Chunk by chunk, or the cache's old buffers would all be alive at once. Within a transformation of the
            # caller's, such as mx.grad, nothing can be evaluated, and it has to hold them all anyway.
            with contextlib.suppress(ValueError):
                mx.async_eval(last, pieces, cache.keys, cache.values)
    if last is not None:
        return _head(params, last, config), cache
    logits = mx.concatenate(pieces, axis=1)
    if logits.shape[1] < time:
        logits = mx.pad(logits, [(0, 0), (0, time - logits.shape[1]), (0, 0)])
    return logits, cache


@checked
def score(
    params: Params,
    tokens: mx.array,
    config: Config,
    *,
    jitter_key: UInt32[mx.array, "2"] | None = None,
    recompute: bool = False,
) -> tuple[mx.array, Routing]:
    """Logits of the next token after each of `tokens`, and what each layer's router said: training reads both.

    The logits are those of `forward` with a cache of capacity 0.

    Args:
        params: the tree.
        tokens: integer `[batch time]`. An id outside of the vocabulary makes its row's logits NaN.
        config: the model's.
        jitter_key: an `mx.random.key` for the routers' `moe_jitter_eps`; no jitter, if not given.
        recompute: under a gradient, keep only each block's input and compute the rest again: about a third more time,
            for the memory of one block instead of all.

    Returns:
        logits: `[batch time vocab]`.
        routing: `logits` float32 `[layer batch time expert]` and `top_experts` uint32 `[layer batch time top_k]`.

    Raises:
        InputError: if tokens aren't of this shape and type.
        CheckpointError: if the tree doesn't fit the config.
    """
    cache = init_cache(config, tokens.shape[0] if tokens.ndim and tokens.shape[0] else 1, 0)
    lengths = _checked_lengths(tokens, cache, None)
    _check_outline(params, config)
    batch, time = tokens.shape
    x, _, _, routing = _run_blocks(params, tokens, lengths, cache, jitter_key, recompute)
    layers = (mx.stack(list(parts)).reshape(len(parts), batch, x.shape[1], -1) for parts in zip(*routing, strict=True))
    return _head(params, x, config)[:, :time], Routing(*(layer[:, :, :time] for layer in layers))


def _run_chunk(params: Params, tokens: mx.array, lengths: tuple[int, ...], cache: Cache) -> tuple[mx.array, Cache]:
    x, keys, values, _ = _run_blocks(params, tokens, lengths, cache)
    if cache.capacity == 0:
        return x, cache
    after = tuple(held + new for held, new in zip(cache.lengths, lengths, strict=True))
    return x, replace(cache, lengths=after, keys=tuple(keys), values=tuple(values))


def _run_blocks(
    params: Params,
    tokens: mx.array,
    lengths: tuple[int, ...],
    cache: Cache,
    jitter_key: mx.array | None = None,
    recompute: bool = False,
) -> tuple[mx.array, list[mx.array], list[mx.array], list[Routing]]:
    """Pads `tokens` to their bucket and runs them through every block; returns what each made, padding and all."""
    config, capacity = cache.config.layer, cache.capacity
    given = tokens.shape[1]
    time = time_bucket(given, capacity)
    tokens = mx.pad(tokens, [(0, 0), (0, time - given)])
    real = mx.array(lengths, mx.int32)
    place = window(
        mx.array(cache.lengths, mx.int32),
        real,
        time=time,
        capacity=capacity,
        attended=attended(time, max(cache.lengths) + time, capacity),
        wraps=max(cache.lengths) + time > capacity,
        config=config,
    )
    n_layers = cache.config.n_layers
    jitter_keys = [None] * n_layers if jitter_key is None else list(mx.random.split(jitter_key, n_layers))
    transformer = params["transformer"]
    keys, values = list(cache.keys), list(cache.values)
    routing: list[Routing] = []
    x = embed(transformer["wte"], tokens, real if min(lengths) < given else None, config=config)
    for n, (parameters, key) in enumerate(zip(transformer["blocks"], jitter_keys, strict=True)):
        layer = _block_at(place, key, config)
        if recompute:
            layer = mx.checkpoint(layer)
        x, keys[n], values[n], said = layer(parameters, x, keys[n], values[n])
        routing.append(said)
    return x, keys, values, routing


def _block_at(
    place: Window, jitter_key: mx.array | None, config: Config
) -> Callable[..., tuple[mx.array, mx.array, mx.array, Routing]]:
    """The block as a function of what has a gradient; `mx.checkpoint` asks for that of all that it is given."""

    def run(parameters: Params, x: mx.array, keys: mx.array, values: mx.array) -> Any:
        return block(parameters, x, keys, values, place, jitter_key, config=config)

    return run


@compiled
def embed(
    wte: dict[Any, Any],
    tokens: Integer[mx.array, "batch time"],
    lengths: Int32[mx.array, " batch"] | None,
    *,
    config: Config,
) -> Stream:
    """Rows of `wte` `[vocab d_model]`. What lies behind a row's first `lengths` tokens is taken for token 0."""
    check_part(wte, config=config, under="transformer.wte")
    if lengths is not None:
        tokens = mx.where(mx.arange(tokens.shape[1], dtype=mx.int32) < lengths[:, None], tokens, 0)
    return embedding(wte, tokens, config=config)


@compiled
def pick_last(
    x: Stream, lengths: Int32[mx.array, " batch"], before: Float[mx.array, "batch 1 d_model"] | None
) -> Float[mx.array, "batch 1 d_model"]:
    """Each row's activations at its last real token, or those from `before` if it has none in this chunk."""
    last = mx.take_along_axis(x, mx.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return last if before is None else mx.where(lengths[:, None, None] > 0, last, before)


@compiled
def head(
    norm_f: dict[Any, Any], lm_head: dict[Any, Any], x: Stream, *, config: Config
) -> Float[mx.array, "batch time {config.vocab_size}"]:
    """The final norm and the vocabulary's projection, which has a matrix of its own in DBRX."""
    check_part(norm_f, config=config, under="transformer.norm_f")
    check_part(lm_head, config=config, under="lm_head")
    return linear(lm_head, layer_norm(norm_f, x))


def _head(params: Params, x: mx.array, config: Config) -> mx.array:
    return head(params["transformer"]["norm_f"], params["lm_head"], x, config=config.layer)


def _check_outline(params: Params, config: Config) -> None:
    """Checks that all the parts are there; each is looked into where it is traced, which costs nothing per token."""
    try:
        transformer = params["transformer"]
        parts = [transformer["wte"], *transformer["blocks"], transformer["norm_f"], params["lm_head"]]
    except (KeyError, IndexError, TypeError, ValueError):
        parts = []
    if len(parts) != config.n_layers + 3 or set(map(type, parts)) != {dict}:
        check_params(params, config)
        raise CheckpointError("transformer.blocks isn't a list of dicts, one for each layer: nest it as load does.")


def _checked_lengths(tokens: mx.array, cache: Cache, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """One real length a row; raises where tokens, lengths and cache don't go together."""
    if tokens.ndim != 2 or tokens.size == 0 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(
            f"tokens is {tokens.dtype} {list(tokens.shape)} where integers [batch time] with at least one of each are"
            " expected."
        )
    batch, time = tokens.shape
    if batch != cache.batch_size:
        raise CacheError(
            f"tokens has {batch} rows and the cache {cache.batch_size}: make one with init_cache(config, {batch}, …)."
        )
    try:
        real = (time,) * batch if lengths is None else tuple(map(operator.index, lengths))
    except TypeError:
        real = ()
    if len(real) != batch or not all(0 <= length <= time for length in real) or not any(real):
        raise InputError(
            f"lengths is {lengths} where {batch} whole numbers from 0 to {time}, not all 0, are expected: how"
            " many of each row's tokens are real."
        )
    if cache.capacity:
        for row, (held, new) in enumerate(zip(cache.lengths, real, strict=True)):
            if held < 0:
                raise CacheError(f"Row {row} of the cache holds {held} tokens: make one with init_cache.")
            if held + new > cache.capacity:
                raise CacheError(
                    f"Row {row} of the cache holds {held} of {cache.capacity} positions and {new} more don't fit: make"
                    f" room with grow_cache(cache, {held + new}) first."
                )
    return real
