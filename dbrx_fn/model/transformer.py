"""DBRX from tokens to logits: `forward` with a cache, `score` for whole sequences with their routing.

Both run the same blocks. The host checks the arguments, cuts long inputs into chunks and pads each chunk to one of few
lengths. The device computes the embedding, one compiled `block` per layer, and the head. `docs/architecture.md`
describes the whole.
"""

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import mlx.core as mx
from jaxtyping import UInt32

from dbrx_fn.errors import CacheError, CheckpointError, InputError
from dbrx_fn.model.cache import Cache, LayerCache, extended
from dbrx_fn.model.config import Config, LayerConfig
from dbrx_fn.model.decode_step import DecodeStep
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.ends import embed, head
from dbrx_fn.model.layers.norm_attn_norm import Stream
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.params import check_params
from dbrx_fn.model.positions import positions_of
from dbrx_fn.model.recompute import recomputed
from dbrx_fn.model.shapes import CHUNK_SIZE, chunk_widths, time_bucket
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.memory import check_buffer, make_room, release_unused


@overload
def forward(
    params: Params,
    tokens: mx.array,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    last_only: bool = False,
    chunk_size: int = CHUNK_SIZE,
    whole_cache: bool = False,
    with_experts: Literal[False] = False,
) -> tuple[mx.array, Cache]: ...


@overload
def forward(
    params: Params,
    tokens: mx.array,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    last_only: bool = False,
    chunk_size: int = CHUNK_SIZE,
    whole_cache: bool = False,
    with_experts: Literal[True],
) -> tuple[mx.array, Cache, mx.array]: ...


@checked
def forward(
    params: Params,
    tokens: mx.array,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    last_only: bool = False,
    chunk_size: int = CHUNK_SIZE,
    whole_cache: bool = False,
    with_experts: bool = False,
) -> tuple[mx.array, Cache] | tuple[mx.array, Cache, mx.array]:
    """Logits of the next token after each of `tokens`, which continue the sequences in `cache`.

    Tokens may be given in one call, in several, or one at a time; the logits agree up to rounding. Nothing waits for
    the device, but for what `runtime.memory.make_room` does where memory is full.

    Args:
        params: the tree, as `load` or `init_params` makes it.
        tokens: integer `[batch time]`. An id outside of the vocabulary raises no error, since finding it would wait for
            the device. It makes its row's logits NaN, in its chunk and in all later ones.
        cache: the tokens so far, and the model's config. A cache of capacity 0 is empty and stays empty.
        lengths: how many of each row's tokens are real, counted from the left. All, if not given. The rest is padding:
            its ids may be anything, and its logits mean nothing. A row of length 0 is left unchanged.
        last_only: only compute the logits of each row's last real token. A row of length 0 gets meaningless ones.
        chunk_size: at most this many tokens of each row are computed at once, which bounds memory. A cache of capacity
            0 takes everything at once.
        whole_cache: attend over the whole capacity instead of a span that holds the longest row. A row's bits then
            don't depend on how long the other rows are (`docs/exactness.md`).
        with_experts: return the experts too that each layer chose for each row's last real token. Logits and cache are
            the same bits. `score` gives the routing of all tokens.

    Returns:
        logits: `[batch time vocab]`, or `[batch 1 vocab]` with `last_only`, in `config.dtype`.
        cache: the cache with the new tokens. The old one stays valid, but keeping it costs a copy.
        experts: only `with_experts`: uint32 `[layers batch top_k]`, in no particular order. A row of length 0 gets
            meaningless ones.

    Raises:
        InputError: if tokens, lengths or chunk_size have other shapes, types or ranges, or if the logits are
            larger than a Mac's largest buffer.
        CacheError: if a row's tokens don't fit the cache's capacity (`grow_cache` makes room), or if the cache was made
            for another batch size.
        CheckpointError: if the tree doesn't fit the cache's config.
    """
    real_lengths = _checked(params, tokens, cache, lengths, chunk_size)
    if (step := DecodeStep.of(params, tokens, cache, real_lengths)) is not None:
        make_room(*tokens.shape)
        done = step(real_lengths)
        return done if with_experts else done[:2]
    if not last_only:
        _check_logits(tokens, cache.config)
    config, held = cache.config.layer, cache if cache.capacity else None
    chunks = [max(real_lengths)] if held is None else chunk_widths(max(real_lengths), min(chunk_size, cache.capacity))
    pieces: list[mx.array] = []
    last, experts, start, tokens_held = None, None, 0, max(cache.lengths)
    for width in chunks:
        make_room(*tokens.shape)
        real = tuple(max(0, min(length - start, width)) for length in real_lengths)
        chunk = tokens[:, start : start + width]
        x, held, routing = run_layers(
            params, chunk, real, held, config=config, whole_cache=whole_cache, last_only=last_only
        )
        if with_experts:
            experts = _last_experts(routing, real, experts)
        if last_only:
            last = x if last is None or all(real) else mx.where(_are_there(real)[:, None, None], x, last)
        else:
            pieces.append(_logits(params, x, config)[:, :width])
        start += width
        if held is None:
            continue
        if len(chunks) > 1:
            # Evaluating each chunk frees the cache's old buffers. Inside a transformation such as mx.grad MLX raises
            # ValueError, and the transformation holds all buffers anyway.
            with contextlib.suppress(ValueError):
                mx.async_eval(last, experts, pieces, held.keys, held.values)
        release_unused(tokens_held, max(held.lengths))
        tokens_held = max(held.lengths)
    after = cache if held is None else held
    if last is not None:
        logits = _logits(params, last, config)
    else:
        padding = tokens.shape[1] - start
        logits = mx.concatenate(pieces, axis=1)
        logits = mx.pad(logits, [(0, 0), (0, padding), (0, 0)]) if padding else logits
    return (logits, after) if experts is None else (logits, after, experts)


@checked
def score(
    params: Params,
    tokens: mx.array,
    config: Config,
    *,
    jitter_key: UInt32[mx.array, "2"] | None = None,
    recompute: bool = False,
) -> tuple[mx.array, Routing]:
    """Logits of the next token after each of `tokens`, and each layer's routing. Training uses both.

    The logits equal those of `forward` with a cache of capacity 0.

    Args:
        params: the tree.
        tokens: integer `[batch time]`. An id outside of the vocabulary makes its row's logits NaN.
        config: the model's.
        jitter_key: an `mx.random.key` for the routers' `moe_jitter_eps`. No jitter, if not given.
        recompute: gradient checkpointing: keep only each block's input and compute the rest again in the backward pass.
            It takes about a third more time, and the memory of one block's activations instead of all.

    Returns:
        logits: `[batch time vocab]`.
        routing: `logits` float32 `[layer batch time expert]` and `top_experts` uint32 `[layer batch time top_k]`.

    Raises:
        InputError: if tokens have another shape or type, or if the logits are larger than a Mac's largest buffer.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_tokens(tokens)
    _check_logits(tokens, config)
    x, routing = run_sequences(params, tokens, config, jitter_key=jitter_key, recompute=recompute)
    return _logits(params, x, config.layer)[:, : tokens.shape[1]], routing


def run_sequences(
    params: Params,
    tokens: mx.array,
    config: Config,
    *,
    jitter_key: mx.array | None = None,
    recompute: bool = False,
    frozen: Params | None = None,
) -> tuple[mx.array, Routing]:
    """`score` without the head.

    Arguments and errors are those of `score`, whatever the size of the logits. With `recompute`, the tree's leaves that
    are in `frozen` too get no gradients.

    Returns:
        The residual stream after the last block, `[batch time d_model]` with the time axis padded to a bucket, and the
        routing, without padding.
    """
    _check_outline(params, config)
    check_tokens(tokens)
    batch, time = tokens.shape
    x, _, routing = run_layers(
        params, tokens, (time,) * batch, None, jitter_key, config=config.layer, recompute=recompute, frozen=frozen
    )
    layers = (mx.stack(list(parts)).reshape(len(parts), batch, x.shape[1], -1) for parts in zip(*routing, strict=True))
    return x, Routing(*(layer[:, :, :time] for layer in layers))


def run_layers(
    params: Params,
    tokens: mx.array,
    lengths: tuple[int, ...],
    cache: Cache | None,
    jitter_key: mx.array | None = None,
    *,
    config: LayerConfig,
    recompute: bool = False,
    whole_cache: bool = False,
    last_only: bool = False,
    frozen: Params | None = None,
) -> tuple[Stream, Cache | None, list[Routing]]:
    """Embeds tokens and runs them through every block.

    Args:
        params: the tree.
        tokens: integer `[batch time]`.
        lengths: how many of each row's tokens are real.
        cache: the tokens so far; `None` without a cache.
        jitter_key: for the routers' jitter. No jitter, if not given.
        config: sizes and constants.
        recompute: gradient checkpointing, as in `score`.
        whole_cache: attend over the whole capacity, as in `forward`.
        last_only: only compute each row's last real token in the last block.
        frozen: with `recompute`, the leaves that get no gradients.

    Returns:
        The residual stream after the last block, its time axis padded to a bucket, or `[batch 1 d_model]` with
        `last_only`; the cache with the new tokens; each block's routing.
    """
    transformer, blocks = params["transformer"], params["transformer"]["blocks"]
    given = tokens.shape[1]
    time = time_bucket(given, 0 if cache is None else cache.capacity)
    tokens = mx.pad(tokens, [(0, 0), (0, time - given)])
    positions = positions_of(time, lengths, cache, config, whole_cache=whole_cache)
    jitter_keys = [None] * len(blocks) if jitter_key is None else list(mx.random.split(jitter_key, len(blocks)))
    layer_caches = [None] * len(blocks) if cache is None else list(zip(cache.keys, cache.values, strict=True))
    after: list[LayerCache] = []
    routing: list[Routing] = []
    real = mx.array(lengths, mx.int32) if min(lengths) < given else None
    x = embed(transformer["wte"], tokens, real, config=config)
    constant = cast(Any, frozen or {}).get("transformer", {}).get("blocks", [{}] * len(blocks))
    # Later tokens read the last block's keys and values, but not what it makes of the tokens before them.
    last = mx.array([max(0, length - 1) for length in lengths], mx.int32) if last_only and time > 1 else None
    wanted = [*[None] * (len(blocks) - 1), last]
    for layer_params, layer_cache, key, of_layer, token in zip(
        blocks, layer_caches, jitter_keys, constant, wanted, strict=True
    ):
        if recompute:
            x, said = recomputed(layer_params, x, positions, key, config, of_layer)
        else:
            x, layer_cache, said = block(layer_params, x, layer_cache, positions, key, token, config=config)
        if layer_cache is not None:
            after.append(layer_cache)
        routing.append(said)
    return x, None if cache is None else extended(cache, lengths, after), routing


def _last_experts(routing: Sequence[Routing], lengths: tuple[int, ...], before: mx.array | None) -> mx.array:
    """Each row's experts at its last real token. A row without one in this chunk keeps those of `before`."""
    last = mx.array([max(0, length - 1) for length in lengths], mx.int32)[:, None, None]
    top = [said.top_experts.reshape(len(lengths), -1, said.top_experts.shape[-1]) for said in routing]
    # Of some layers only that token is there.
    picked = [each if each.shape[1] == 1 else mx.take_along_axis(each, last, axis=1) for each in top]
    experts = mx.stack(picked)[:, :, 0]
    return experts if before is None else mx.where(_are_there(lengths)[None, :, None], experts, before)


def _are_there(lengths: tuple[int, ...]) -> mx.array:
    """Whether rows have a token, bool `[batch]`."""
    return mx.array([length > 0 for length in lengths])


def _logits(params: Params, x: Stream, config: LayerConfig) -> mx.array:
    """Logits `[batch time vocab]` of the residual stream `[batch time d_model]`."""
    return head(params["transformer"]["norm_f"], params["lm_head"], x, config=config)


def _check_outline(params: Params, config: Config) -> None:
    """Checks that all parts are there. Each part's leaves are checked by its layer, once for each set of shapes."""
    try:
        transformer = params["transformer"]
        parts = [transformer["wte"], *transformer["blocks"], transformer["norm_f"], params["lm_head"]]
    except (KeyError, IndexError, TypeError, ValueError):
        parts = []
    if len(parts) != config.n_layers + 3 or set(map(type, parts)) != {dict}:
        check_params(params, config)
        raise CheckpointError("transformer.blocks isn't a list of dicts, one for each layer: nest it as load does.")


def _checked(
    params: Params, tokens: mx.array, cache: Cache, lengths: Sequence[int] | None, chunk_size: int
) -> tuple[int, ...]:
    """Each row's number of real tokens. Raises if `forward`'s arguments don't fit each other."""
    check_tokens(tokens)
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
    for row, (held, new) in enumerate(zip(cache.lengths, real, strict=True)):
        if held < 0:
            raise CacheError(f"Row {row} of the cache holds {held} tokens: make one with init_cache.")
        if cache.capacity and held + new > cache.capacity:
            raise CacheError(
                f"Row {row} of the cache holds {held} of {cache.capacity} positions and {new} more don't fit: make"
                f" room with grow_cache(cache, {held + new}) first."
            )
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size} where it must be at least 1.")
    _check_outline(params, cache.config)
    return real


def check_tokens(tokens: mx.array) -> None:
    """Raises `InputError` unless `tokens` are integers `[batch time]` with at least one row and one token."""
    if tokens.ndim != 2 or tokens.size == 0 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(
            f"tokens is {tokens.dtype} {list(tokens.shape)} where integers [batch time], at least one row and one"
            " token, are expected."
        )


def _check_logits(tokens: mx.array, config: Config) -> None:
    """Raises `InputError` if the logits of `[batch time]` tokens, the widest activations, don't fit one buffer."""
    if tokens.shape[1] > 1:
        nbytes = tokens.size * config.vocab_size * getattr(mx, config.dtype).size
        check_buffer(
            f"The logits of {list(tokens.shape)} tokens", nbytes, "take fewer or shorter rows at once", InputError
        )
