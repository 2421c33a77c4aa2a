"""Tokens to activations: rows of a matrix, dense or quantized."""

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
    rows = {name: leaf[tokens] for name, leaf in params.items()}
    if "scales" not in rows:
        return rows["weight"]
    quantization = format_of(params, config.d_model)
    return mx.dequantize(
        rows["weight"],
        rows["scales"],
        rows.get("biases"),
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=getattr(mx, config.dtype),
    )
