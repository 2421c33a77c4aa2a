"""Random trees with quantized matrices, drawn as integers without making dense matrices first.

They take the time and memory of real weights. Their outputs are noise.
"""

import math
from collections.abc import Mapping

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Leaf, init_params, nest, param_spec
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format

# This mask clears the exponents' upper bit. Without it, 8-bit floats (e4m3) are at most 1.875 and never NaN.
_FINITE_E4M3 = 0xBFBFBFBF


def random_params(config: Config, formats: Mapping[str, Format], key: mx.array) -> Params:
    """Draws a lazy tree like `init_params`. The matrices in `formats` are quantized, with weights of the same size.

    Args:
        config: sizes and dtype.
        formats: formats of the quantized matrices, by their paths (`dbrx_fn.model.quantization.wanted_formats`).
        key: an `mx.random.key`.
    """
    spec = param_spec(config)
    dense_key, key = mx.random.split(key)
    leaves = dict(tree_flatten(init_params(config, dense_key)))
    for (path, form), leaf_key in zip(formats.items(), mx.random.split(key, max(1, len(formats))), strict=False):
        base = path.removesuffix("weight")
        drawn = _random_quantized(spec[path], form, config, leaf_key)
        leaves |= {base + name: array for name, array in drawn.items()}
    return nest(leaves, config)


def random_words(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Random uint32 of all 32 bits. (`mx.random.randint` goes through float32, which has 24 bits. Keys have all 32.)"""
    count = math.prod(shape)
    return mx.random.split(key, -(-count // 2)).reshape(-1)[:count].reshape(shape)


def _random_quantized(leaf: Leaf, form: Format, config: Config, key: mx.array) -> dict[str, mx.array]:
    """Stored numbers are drawn uniformly. Scales are drawn near the value that gives the usual standard deviation."""
    parts = leaf.quantized(form)
    word_key, scale_key = mx.random.split(key)
    words = random_words(parts["weight"].shape, word_key)
    shape = parts["scales"].shape
    wanted = config.initializer_range
    if form.mode == "affine":
        highest = 2**form.bits - 1
        usual = wanted / math.sqrt((4**form.bits - 1) / 12)
        scales = mx.random.uniform(0.5 * usual, 1.5 * usual, shape, key=scale_key).astype(getattr(mx, config.dtype))
        return {"weight": words, "scales": scales, "biases": scales * (-highest / 2)}
    if form.mode == "mxfp8":
        words = words & _FINITE_E4M3
    # The root mean square of the stored numbers: 4-bit floats (e2m1), or 8-bit floats up to 1.875.
    root = 0.8 if form.mode == "mxfp8" else 2.9
    scale = wanted / root
    if form.mode == "nvfp4":
        # Scales are e4m3 too. Its smallest numbers are multiples of 2^-9, up to 7 times that.
        middle = min(6, max(1, round(scale * 2**9)))
        lowest, highest = middle, middle + 1
    else:
        # Scales are powers of two.
        middle = 127 + round(math.log2(scale)) if scale > 0 else 0
        lowest, highest = max(0, middle - 1), middle + 1
    return {"weight": words, "scales": mx.random.randint(lowest, highest + 1, shape, mx.uint8, scale_key)}
