"""Models, prompts and single tokens behind them, for the CPU's kernel that reads one token of each row."""

import functools
from typing import Any

import mlx.core as mx
import numpy as np

from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.decode_step import DecodeStep
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import as_if
from tests.support.trees import Case, case_of

FORMATS = [None, *(Format(bits, group) for bits in (4, 8) for group in (32, 64, 128)), Format(4, 32, "mxfp4")]
LENGTHS = (300, 3, 120, 255, 256)
"""Below, at and above the bounds of the kernel's chunks of positions."""
SHORT = (20, 3, 9)
VOCAB = 90
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), max(LENGTHS) + 8))


def raw_config(**changes: Any) -> dict[str, Any]:
    """A config in which these fields have other values."""
    raw: dict[str, Any] = {
        "model_type": "dbrx",
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "vocab_size": VOCAB,
    }
    attn: Any = {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 5e5}
    ffn: dict[str, Any] = {
        "ffn_hidden_size": 128,
        "moe_num_experts": 8,
        "moe_top_k": 3,
        "moe_normalize_expert_weights": 1.0,
    }
    ffn["ffn_act_fn"] = {"name": "silu"}
    attn |= {name: changes.pop(name) for name in list(changes) if name in attn}
    ffn |= {name: changes.pop(name) for name in list(changes) if name in ffn}
    made: dict[str, Any] = raw | changes | {"attn_config": attn, "ffn_config": ffn}
    return made


@functools.cache
def case() -> Case:
    """The model of most tests."""
    return case_of(raw_config(), np.random.default_rng(1))


def in_format(made: Case, form: Format | None) -> Params:
    """The tree, all matrices in this format."""
    return made.params if form is None else quantize(made.params, made.config, Quantization(*[form] * 4))


def tokens_at(offsets: tuple[int, ...], step: int = 0) -> mx.array:
    """A token of each row, behind these lengths and `step` more."""
    return mx.array([[int(TOKENS[row, length + step])] for row, length in enumerate(offsets)], mx.int32)


def prompted(params: Params, config: Config, lengths: tuple[int, ...], capacity: int = 384) -> Cache:
    """A cache of stock operations."""
    cache = init_cache(config, len(lengths), capacity)
    with as_if(kernels=False):
        prompts = mx.array(TOKENS[: len(lengths), : max(lengths)])
        _, cache = forward(params, prompts, cache, lengths=lengths, last_only=True)
    mx.eval(cache.keys, cache.values)
    return cache


def takes(params: Params, tokens: mx.array, cache: Cache) -> bool:
    """Whether the kernel takes this step."""
    return DecodeStep.of(params, tokens, cache, (1,) * len(tokens)) is not None
