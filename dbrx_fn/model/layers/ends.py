"""The model's two ends: tokens to the residual stream, and the residual stream to logits."""

import mlx.core as mx
from jaxtyping import Float, Int32, Integer

from dbrx_fn.model.config import NORM_EPS, LayerConfig
from dbrx_fn.model.layers.embedding import embedding
from dbrx_fn.model.layers.norm_attn_norm import Stream
from dbrx_fn.model.params import compiled_under
from dbrx_fn.model.tree import NormParams
from dbrx_fn.ops.collectives import all_gather_last, sum_gradients
from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.norm import layer_norm


@compiled_under("transformer.wte")
def embed(
    wte: Linear,
    tokens: Integer[mx.array, "batch time"],
    lengths: Int32[mx.array, " batch"] | None,
    *,
    config: LayerConfig,
) -> Stream:
    """Rows of `wte` `[vocab d_model]`. Padding behind a row's first `lengths` tokens is read as token 0."""
    if lengths is not None:
        tokens = mx.where(mx.arange(tokens.shape[1], dtype=mx.int32) < lengths[:, None], tokens, 0)
    return embedding(wte, tokens, config=config)


@compiled_under("transformer.norm_f", "lm_head")
def head(
    norm_f: NormParams, lm_head: Linear, x: Stream, *, config: LayerConfig
) -> Float[mx.array, "batch time {config.vocab_size}"]:
    """The final norm and the projection to the vocabulary. DBRX doesn't tie its matrix to the embedding."""
    normed = sum_gradients(layer_norm(norm_f["weight"], x, eps=NORM_EPS), config.shard.size)
    return all_gather_last(linear(lm_head, normed), config.shard.size)
