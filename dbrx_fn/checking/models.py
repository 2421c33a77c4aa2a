"""The models to check, and their inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checking.draws import leaves, whole_numbers
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import nest
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format, Mode
from dbrx_fn.training.step import Recipe


@dataclass(frozen=True)
class Model:
    """A random model, with rows of tokens as its input.

    `seed`: seed of weights and tokens, for which no choice of experts is close, so rounding can't change a choice.
    `form`: the format of all matrices except the routers'; `None` for a dense model.
    `lengths`: the rows' lengths.
    """

    name: str
    config: Config
    seed: int
    form: Format | None = None
    lengths: tuple[int, ...] = (16, 5, 11)

    @cached_property
    def formats(self) -> Mapping[str, Format]:
        """The formats of its quantized matrices, by their paths."""
        if self.form is None:
            return {}
        return wanted_formats(self.config, Quantization(self.form, self.form, self.form, self.form))

    @cached_property
    def rows(self) -> tuple[NDArray[np.int64], ...]:
        """The tokens of each row."""
        return tuple(
            whole_numbers((self.seed, 1000 + row), self.config.vocab_size, length)
            for row, length in enumerate(self.lengths)
        )

    def params(self, dtype: Dtype) -> tuple[Params, Config]:
        """Its tree and config in a dtype."""
        return _params(self, dtype), replace(self.config, dtype=dtype)


@cache
def _params(model: Model, dtype: Dtype) -> Params:
    arrays = {}
    for path, leaf in leaves(model.config, model.formats, model.seed).items():
        array = mx.array(leaf)
        arrays[path] = array.astype(getattr(mx, dtype)) if leaf.dtype == np.float32 else array
    return nest(arrays, replace(model.config, dtype=dtype))


def _config(
    d_model: int, heads: int, kv_heads: int, layers: int, vocab: int, clip: float | None, theta: float, ffn: FFNConfig
) -> Config:
    return Config(
        d_model=d_model,
        n_heads=heads,
        n_layers=layers,
        max_seq_len=256,
        vocab_size=vocab,
        attn=AttnConfig(clip, kv_heads, theta),
        ffn=ffn,
        dtype="float32",
    )


SHAPES = (
    Model("odd sizes", _config(40, 5, 1, 2, 61, 2.0, 1e4, FFNConfig(24, 4, 2)), 1),
    Model("one expert of three", _config(48, 4, 2, 1, 47, 2.0, 5e5, FFNConfig(33, 3, 1, None)), 1),
    Model("all experts", _config(96, 6, 6, 3, 97, None, 1e4, FFNConfig(50, 2, 2, 2.0)), 0),
    Model("sizes with kernels", _config(256, 4, 2, 2, 128, 2.0, 5e5, FFNConfig(128, 6, 2)), 64),
)
"""Dense models for all dtypes."""
DBRX_EXPERTS = Model("DBRX's experts", _config(128, 8, 2, 2, 80, 2.0, 5e5, FFNConfig(56, 16, 4)), 32)
"""A dense model for float32 only, since of 16 experts two are always close."""

_QUANTIZED = _config(256, 4, 2, 2, 128, 2.0, 5e5, FFNConfig(128, 4, 2))
_SEEDS: tuple[tuple[Mode, int, dict[int, int]], ...] = (
    ("affine", 64, {4: 0, 8: 2}),
    ("mxfp4", 32, {4: 2}),
    ("mxfp8", 32, {8: 1}),
    ("nvfp4", 16, {4: 3}),
    ("affine", 64, {6: 5, 3: 1, 5: 3, 2: 1}),
    ("affine", 32, {4: 0, 8: 0, 6: 0, 3: 0, 5: 0, 2: 4}),
    ("affine", 128, {4: 1, 8: 0, 6: 3, 3: 4, 5: 0, 2: 7}),
)
"""For each mode and group size, the model's seeds by bits. The most common formats come first."""
QUANTIZED = tuple(
    Model(f"{mode}, {bits} bits, groups of {size}", _QUANTIZED, seed, Format(bits, size, mode), (12, 5))
    for mode, size, seeds in _SEEDS
    for bits, seed in seeds.items()
)
"""One model in each format."""
TRAINED = Model("trained", _config(8, 2, 1, 2, 11, 2.0, 1e4, FFNConfig(6, 3, 2, moe_loss_weight=0.5)), 0, None, (7, 7))
MASK = tuple(
    tuple(bool(bit) for bit in whole_numbers((TRAINED.seed, 2000 + row), 4, length))
    for row, length in enumerate(TRAINED.lengths)
)
"""The targets among its tokens, about three in four."""
RECIPE = Recipe(steps=10, learning_rate=0.1, warmup=0, eps=0.01, weight_decay=0.1, clip_norm=0.5, z_loss_weight=0.1)
"""The training recipe. With this large `eps`, the sign of a tiny gradient hardly moves a weight."""
