"""Weights that are no numbers are found wherever they are, and nothing else is taken for one."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints import finite
from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.finite import is_finite, not_finite
from dbrx_fn.model.params import nest
from dbrx_fn.model.quantization import Quantization, quantize, tree_formats
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import MODES, Format, Mode
from tests.support import checkpoints, trees

SIZES: dict[Mode, tuple[int, int]] = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
RAW = checkpoints.QUANTIZABLE
CONFIG = config_from_dict(RAW)
ROUTER = "transformer.blocks.1.ffn.router.layer.weight"
W2 = "transformer.blocks.0.ffn.experts.mlp.w2"


def tree(mode: Mode | None = None) -> Params:
    params = trees.tree(CONFIG, checkpoints.random_tensors(RAW, np.random.default_rng(0)))
    return params if mode is None else quantize(params, CONFIG, Quantization(experts=Format(*SIZES[mode], mode)))


def found(params: Params) -> list[str]:
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    return not_finite(leaves.items(), tree_formats(params, CONFIG))


def spoilt(params: Params, path: str, index: int, value: float) -> Params:
    """The tree with one element of one leaf replaced."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    flat = leaves[path].flatten()
    flat[index] = value
    return nest(leaves | {path: flat.reshape(leaves[path].shape)}, CONFIG)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_sound_trees_have_none(mode: Mode | None) -> None:
    assert found(tree(mode)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_leaf_is_named(value: float) -> None:
    assert found(spoilt(tree(), ROUTER, 17, value)) == [ROUTER]
    both = spoilt(spoilt(tree("affine"), f"{W2}.scales", 0, value), f"{W2}.biases", -1, value)
    assert found(both) == [f"{W2}.scales", f"{W2}.biases"]


@pytest.mark.parametrize(
    ("mode", "leaf", "value", "is_found"),
    [
        ("mxfp4", "scales", 0xFF, True),
        ("mxfp4", "scales", 0x7F, False),
        ("mxfp8", "scales", 0xFF, True),
        ("nvfp4", "scales", 0x7F, True),
        ("nvfp4", "scales", 0xFF, True),
        ("nvfp4", "scales", 0x7E, False),
        ("mxfp8", "weight", 0x007F0000, True),
        ("mxfp8", "weight", 0x7E0000FE, False),
        ("mxfp4", "weight", 0xFFFFFFFF, False),
        ("affine", "weight", 0xFFFFFFFF, False),
    ],
)
def test_bytes_of_quantized_leaves_that_stand_for_no_number(mode: Mode, leaf: str, value: int, is_found: bool) -> None:
    assert found(spoilt(tree(mode), f"{W2}.{leaf}", 5, value)) == ([f"{W2}.{leaf}"] if is_found else [])


@given(
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.integers(1, 9),
    st.data(),
)
def test_every_bit_pattern_at_every_place(
    dtype: checkpoints.FileDtype, shape: tuple[int, ...], at_once: int, data: st.DataObject
) -> None:
    """As MLX's own isfinite says, however the array is cut into pieces."""
    bits = mx.uint32 if dtype == "float32" else mx.uint16
    size = int(np.prod(shape))
    words = st.integers(0, 2 ** (8 * bits.size) - 1)
    words = words | words.map(lambda word: word | (0x7F800000 if bits.size == 4 else 0x7C00))
    drawn = data.draw(st.lists(words, min_size=size, max_size=size))
    array = mx.array(drawn, bits).view(getattr(mx, dtype)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finite, "_AT_ONCE", at_once)
        assert is_finite(array) == bool(mx.isfinite(array).all().item())
        assert is_finite(array.T) == is_finite(array)


def test_memory_is_one_leaf_and_a_piece() -> None:
    def leaves() -> Iterator[tuple[str, mx.array]]:
        for number in range(6):
            yield f"{number}.weight", mx.ones((4, 4096, 2048), mx.bfloat16)

    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert not_finite(leaves(), {}) == []
    leaf = 2 * 4 * 4096 * 2048
    assert mx.get_peak_memory() - before < leaf + 2 * 2**25 + 2**20
