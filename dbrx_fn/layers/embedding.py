"""Tokens to activations: rows of a matrix, dense or quantized."""

from typing import cast

import mlx.core as mx
from jaxtyping import Float, Int32

from dbrx_fn.compile import typed
from dbrx_fn.config import Config
from dbrx_fn.params import format_of


@typed
def embedding(
    params: dict[str, mx.array], tokens: Int32[mx.array, "batch time"], *, config: Config
) -> Float[mx.array, "batch time {config.d_model}"]:
    """The row of each token, in `config.dtype`; of a quantized matrix only those rows are turned back into floats.

    Args:
        params: `weight` `[vocab d_model]`, or quantized from that (`dbrx_fn.params`).
        tokens: ids below the vocabulary's size.
        config: the width, and the dtype.
    """
    if "scales" not in params:
        weight = params["weight"]
        return weight[tokens] if weight.dtype == mx.float32 else cast(mx.array, _rows(weight, tokens))
    parts = {name: leaf[tokens] for name, leaf in params.items()}
    quantization = format_of(params, config.d_model)
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=getattr(mx, config.dtype),
    )


@mx.custom_function
def _rows(weight: mx.array, tokens: mx.array) -> mx.array:
    """Rows of a matrix whose gradients are added up in float32: in bfloat16 a sum stays at 256 times its terms."""
    return weight[tokens]


@_rows.vjp
def _rows_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    weight, tokens = primals
    total = mx.zeros(weight.shape, mx.float32).at[tokens].add(cotangent.astype(mx.float32))
    return total.astype(weight.dtype), mx.zeros_like(tokens)
