"""The residual stream after each layer, and the logits that the head makes of any of them (the logit lens).

    streams = hidden_states(params, tokens, config)       # [layer + 1, batch, time, d_model]
    logits = logits_of(params, streams, config)           # every layer read as if it were the last

They run the same blocks and head as `forward`. Both have gradients.
"""

import mlx.core as mx

from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.ends import embed, head
from dbrx_fn.model.params import check_params
from dbrx_fn.model.positions import positions_of
from dbrx_fn.model.shapes import time_bucket
from dbrx_fn.model.transformer import check_tokens
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked


@checked
def hidden_states(params: Params, tokens: mx.array, config: Config) -> mx.array:
    """The residual stream before the first layer and after each layer, for whole sequences.

    Args:
        params: the tree.
        tokens: integer `[batch time]`. An id outside of the vocabulary makes its row NaN.
        config: the model's.

    Returns:
        `[layer + 1 batch time d_model]` in `config.dtype`: the tokens' embeddings, then each layer's output. The last
        one, too, is before the final norm, which `logits_of` applies. (In transformers the last of `hidden_states` is
        after that norm.)

    Raises:
        InputError: if tokens aren't of this shape and type.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_tokens(tokens)
    check_params(params, config)
    batch, time = tokens.shape
    padded = time_bucket(time, 0)
    positions = positions_of(padded, (time,) * batch, None, config.layer)
    tokens = mx.pad(tokens, [(0, 0), (0, padded - time)])
    x = embed(params["transformer"]["wte"], tokens, None, config=config.layer)
    streams = [x]
    for layer_params in params["transformer"]["blocks"]:
        x, _, _ = block(layer_params, x, None, positions, config=config.layer)
        streams.append(x)
    return mx.stack(streams)[:, :, :time]


@checked
def logits_of(params: Params, streams: mx.array, config: Config) -> mx.array:
    """Applies the final norm and the head to any layer's residual stream.

    Args:
        params: the tree.
        streams: `[… time d_model]` of a float dtype, such as the result of `hidden_states` or a part of it.
        config: the model's.

    Returns:
        Logits of the next token, `[… time vocab]`. For the last layer's stream they equal those of `forward`.

    Raises:
        InputError: if streams aren't of this shape and type.
        CheckpointError: if the tree's last norm and head don't fit the config.
    """
    wide = streams.ndim >= 2 and streams.shape[-1] == config.d_model
    if not wide or not mx.issubdtype(streams.dtype, mx.floating):
        raise InputError(
            f"streams is {streams.dtype} {list(streams.shape)} where floats [… time {config.d_model}] are expected."
        )
    rows = streams.reshape(-1, *streams.shape[-2:])
    logits = head(params["transformer"]["norm_f"], params["lm_head"], rows, config=config.layer)
    return logits.reshape(*streams.shape[:-1], config.vocab_size)
