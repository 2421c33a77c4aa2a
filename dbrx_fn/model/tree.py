"""The parameter tree's types: plain nested dicts under the checkpoint's own names.

`dbrx_fn.model.params` gives each leaf's axes and sizes.
"""

from typing import TypedDict

import mlx.core as mx

from dbrx_fn.ops.experts import ExpertsParams
from dbrx_fn.ops.formats import Linear


class NormParams(TypedDict):
    """A LayerNorm's `weight` `[d_model]`."""

    weight: mx.array


class AttnParams(TypedDict):
    """`Wqkv` `[qkv d_model]` (rows: query heads, key heads, value heads) and `out_proj` `[d_model heads]`."""

    Wqkv: Linear
    out_proj: Linear


class NormAttnNormParams(TypedDict):
    """The attention half of a block, with both norms."""

    norm_1: NormParams
    attn: AttnParams
    norm_2: NormParams


class RouterParams(TypedDict):
    """`layer` `[expert d_model]`."""

    layer: Linear


class MLPParams(TypedDict):
    """The experts, under the checkpoint's name for them."""

    mlp: ExpertsParams


class FFNParams(TypedDict):
    """The expert half of a block."""

    router: RouterParams
    experts: MLPParams


class BlockParams(TypedDict):
    """One layer's parameters."""

    norm_attn_norm: NormAttnNormParams
    ffn: FFNParams


class TransformerParams(TypedDict):
    """Everything but the head: `wte` `[vocab d_model]`, the layers, the final norm."""

    wte: Linear
    blocks: list[BlockParams]
    norm_f: NormParams


class Params(TypedDict):
    """The whole tree. `lm_head` is `[vocab d_model]`."""

    transformer: TransformerParams
    lm_head: Linear
