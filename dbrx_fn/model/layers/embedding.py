"""Token embeddings: rows of a matrix, dense or quantized."""

from typing import cast

import mlx.core as mx
from jaxtyping import Float, Integer

from dbrx_fn.model.config import LayerConfig
from dbrx_fn.ops.collectives import all_sum
from dbrx_fn.ops.formats import Linear, format_of, is_adapted, scaled
from dbrx_fn.runtime.bounded import within
from dbrx_fn.runtime.compile import typed


@typed
def embedding(
    params: Linear, tokens: Integer[mx.array, "batch time"], *, config: LayerConfig
) -> Float[mx.array, "batch time {config.d_model}"]:
    """The matrix's row for each token, in `config.dtype`. Only these rows of a quantized matrix are dequantized.

    An id outside of the vocabulary makes its entire row of the batch NaN, since attention mixes a row's tokens.

    Args:
        params: `weight` `[vocab d_model]`, or its quantized form, perhaps with an adapter (`dbrx_fn.ops.formats`).
        tokens: ids.
        config: the vocabulary's size, the width and the dtype.
    """
    ids, known = within(tokens, config.vocab_size)
    if tokens.shape[1] > 1:
        known = known.all(axis=1, keepdims=True)
    return mx.where(known[..., None], _shared(params, ids, config), mx.nan)


def _shared(params: Linear, ids: mx.array, config: LayerConfig) -> mx.array:
    """The rows of the whole vocabulary. Each process has its part of them, and zeros for the others."""
    if config.shard.is_whole:
        return _adapted(params, ids, config)
    rows = config.sizes["vocab"]
    own, known = within(ids.astype(mx.int32) - config.shard.rank * rows, rows)
    return all_sum(mx.where(known[..., None], _adapted(params, own, config), 0), config.shard.size)


def _adapted(params: Linear, ids: mx.array, config: LayerConfig) -> mx.array:
    """The rows with what the adapter adds."""
    rows = _embedded(params, ids, config)
    if not is_adapted(params):
        return rows
    return rows + scaled(_rows(params["lora_b"], ids), params["lora_scale"]) @ params["lora_a"]


def _embedded(params: Linear, ids: mx.array, config: LayerConfig) -> mx.array:
    if "scales" not in params:
        return _rows(params["weight"], ids)
    scales, biases = params["scales"], params.get("biases")
    quantization = format_of(params, config.d_model)
    return mx.dequantize(
        params["weight"][ids],
        scales[ids],
        None if biases is None else biases[ids],
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=getattr(mx, config.dtype),
    )


def _rows(weight: mx.array, tokens: mx.array) -> mx.array:
    """Rows of a matrix, with gradients summed in float32."""
    return weight[tokens] if weight.dtype == mx.float32 else cast(mx.array, _short_rows(weight, tokens))


@mx.custom_function
def _short_rows(weight: mx.array, tokens: mx.array) -> mx.array:
    """Rows of a matrix in short floats. A bfloat16 sum stops growing at 256 times its terms."""
    return weight[tokens]


@_short_rows.vjp
def _short_rows_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    weight, tokens = primals
    total = mx.zeros(weight.shape, mx.float32).at[tokens].add(cotangent.astype(mx.float32))
    return total.astype(weight.dtype), mx.zeros_like(tokens)
