"""Random quantized weights: as large as dense ones, made of every number that a format has, each layer its own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.benchmarks.random_weights import random_params, random_words
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import check_params
from dbrx_fn.model.quantization import Quantization, dequantize, tree_formats, wanted_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.formats import Format, format_of_mode

CONFIG = Config(
    d_model=128,
    n_heads=4,
    n_layers=2,
    vocab_size=96,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=128, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)
FORMATS = [*(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)), *map(format_of_mode, ("mxfp4", "mxfp8", "nvfp4"))]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.mode}-{form.bits}")
def test_weights_are_finite_and_as_large_as_those_of_a_fresh_model(form: Format) -> None:
    formats = wanted_formats(CONFIG, Quantization(form, form, form, form, form))
    params = random_params(CONFIG, formats, mx.random.key(0))
    check_params(params, CONFIG)
    assert tree_formats(params, CONFIG) == formats
    leaves: dict[str, mx.array] = dict(tree_flatten(dequantize(params, CONFIG)))
    for path in formats:
        weights = np.array(leaves[path])
        assert np.isfinite(weights).all()
        assert 0.5 < weights.std() / CONFIG.initializer_range < 2, path
        assert abs(weights.mean()) < 0.1 * CONFIG.initializer_range
    one, other = (leaves[f"transformer.blocks.{n}.ffn.experts.mlp.w1.weight"] for n in (0, 1))
    assert not mx.array_equal(one, other)
    logits, _ = forward(params, mx.arange(32)[None], init_cache(CONFIG, 1, 0))
    assert mx.isfinite(logits).all()


@pytest.mark.parametrize("shape", [(1000, 33), (3, 333, 7)])
def test_every_bit_of_a_word_is_as_often_one_as_zero(shape: tuple[int, ...]) -> None:
    words = np.array(random_words(shape, mx.random.key(3)))
    assert words.shape == shape
    assert words.dtype == np.uint32
    for bit in range(32):
        assert 0.47 < (words >> bit & 1).mean() < 0.53


def test_what_is_not_to_be_quantized_is_dense() -> None:
    formats = wanted_formats(CONFIG, Quantization(embedding=None, head=None))
    params = random_params(CONFIG, formats, mx.random.key(0))
    check_params(params, CONFIG)
    assert list(params["lm_head"]) == ["weight"]
    assert params["transformer"]["blocks"][0]["ffn"]["router"]["layer"]["weight"].dtype == mx.float32
