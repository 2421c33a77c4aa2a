"""Adapters (LoRA, https://arxiv.org/abs/2106.09685): two narrow matrices, to train instead of the one beside them.

    weight + lora_scale * lora_b @ lora_a        [outer inner] + [] * [outer rank] [rank inner]

They are leaves beside `weight`, for every format of it, and `dbrx_fn.ops.linear` adds what they say. Experts have one
pair each, stacked as their matrices are. `lora_b` begins at zero, so a fresh adapter changes nothing.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import UInt32
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import KINDS, Kind, Leaf, check_params, companions, kind_of, nest, param_spec
from dbrx_fn.model.quantization import tree_formats
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import ADAPTER_LEAVES, dequantize_matrix, quantize_matrix
from dbrx_fn.runtime.arguments import check_fields, checked

SCALES = 1e-30, 1e30
"""The smallest and the largest scale. Beyond them it would be zero or infinite in float32, or nearly so."""


@dataclass(frozen=True)
class Adapters:
    """Which matrices get adapters, and of which size.

    `rank`: columns of `lora_b`, and rows of `lora_a`.
    `alpha`: numerator of the scale. `None` means twice the rank.
    `targets`: the kinds of matrices. `attention`: Wqkv and out_proj. `experts`: w1, v1 and w2. `router`, `embedding`
        and `head`: one matrix each.
    `rank_stabilized`: divide `alpha` by the rank's root instead of the rank (https://arxiv.org/abs/2312.03732), so that
        a larger rank doesn't learn more slowly.

    Raises:
        InputError: if a field has an impossible value. It names the field.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[Kind, ...] = ("attention", "experts")
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        for target in self.targets if isinstance(self.targets, tuple) else ():
            if target not in KINDS:
                raise InputError(f"targets names {shown(target)} where {', '.join(KINDS)} are known.")
        check_fields(self)
        if self.rank < 1:
            raise InputError(f"rank is {self.rank} where it must be at least 1.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha} where it must be a positive number.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError(f"targets is {shown(self.targets)} where at least one, each once, is expected.")
        if not SCALES[0] <= self.scale <= SCALES[1]:
            raise InputError(
                f"alpha is {self.alpha}, which makes a scale of {self.scale:g} where one from {SCALES[0]:g} to"
                f" {SCALES[1]:g} is expected: take an alpha near the rank."
            )

    @property
    def scale(self) -> float:
        """The factor of the product: `alpha / rank`, or `alpha / sqrt(rank)`."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@checked
def add_adapters(params: Params, config: Config, adapters: Adapters, key: UInt32[mx.array, "2"]) -> Params:
    """A new tree with a fresh adapter beside each target. Its logits are those of the given tree.

    `lora_a` is uniform within ±1/sqrt(inner), as in mlx-lm and PEFT, and `lora_b` is zero.

    Args:
        params: the tree, dense or quantized.
        config: the model's.
        adapters: what to add.
        key: an `mx.random.key`; the same key draws the same adapters.

    Raises:
        InputError: if the rank is larger than a target's smaller side, or a target has an adapter already.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_params(params, config)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    matrices = targets_of(adapters, config)
    dtype = getattr(mx, config.dtype)
    for (path, leaf), leaf_key in zip(matrices.items(), mx.random.split(key, len(matrices)), strict=True):
        base = path.removesuffix("weight")
        if f"{base}lora_a" in leaves:
            raise InputError(f"{path} has an adapter already: merge it with fuse_adapters first, or leave that target.")
        parts = leaf.adapter(adapters.rank)
        bound = 1 / math.sqrt(leaf.shape[-1])
        leaves[f"{base}lora_a"] = mx.random.uniform(-bound, bound, parts["lora_a"].shape, dtype, leaf_key)
        leaves[f"{base}lora_b"] = mx.zeros(parts["lora_b"].shape, dtype)
        leaves[f"{base}lora_scale"] = mx.array(adapters.scale, mx.float32)
    return nest(leaves, config)


def targets_of(adapters: Adapters, config: Config) -> dict[str, Leaf]:
    """The matrices that get adapters, by the paths of their weights.

    Raises:
        InputError: if the rank is larger than a target's smaller side.
    """
    matrices = {path: leaf for path, leaf in param_spec(config).items() if kind_of(path) in adapters.targets}
    for path, leaf in matrices.items():
        most = min(leaf.shape[-2:])
        if adapters.rank > most:
            raise InputError(
                f"rank is {adapters.rank} where {path}, {list(leaf.shape)}, allows at most {most}: take a smaller rank,"
                " or leave that target."
            )
    return matrices


def is_adapter(path: str) -> bool:
    """Whether the leaf at this path is trained when adapters are: `lora_a` and `lora_b`. The scale is a constant."""
    return path.endswith((".lora_a", ".lora_b"))


def adapted(params: Params) -> list[str]:
    """The paths of the weights that have adapters."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    return [path.removesuffix("lora_a") + "weight" for path in leaves if path.endswith(".lora_a")]


def check_single(params: Params) -> None:
    """Raises `InputError` if several adapters are stacked beside a matrix (`dbrx_fn.model.stacked_adapters`)."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    several = [path for path, leaf in leaves.items() if path.endswith(".lora_scale") and leaf.ndim]
    if several:
        raise InputError(
            f"{several[0].removesuffix('.lora_scale')} has several adapters, where one at most is expected: take a tree"
            " with one of them."
        )


@checked
def fuse_adapters(params: Params, config: Config) -> Params:
    """A new tree whose matrices hold what their adapters added. Quantized ones are quantized again, in their format.

    The sum is made in float32 and rounded once, to `config.dtype` or to the format.

    Raises:
        CheckpointError: if the tree doesn't fit the config.
        InputError: if it has several adapters.
    """
    check_params(params, config)
    check_single(params)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    formats = tree_formats(params, config)
    for path in adapted(params):
        base = path.removesuffix("weight")
        lora_a, lora_b, scale = (leaves.pop(base + name).astype(mx.float32) for name in ADAPTER_LEAVES)
        own = [name for name in companions(path) if name in leaves]
        form = formats.get(path)
        dense = leaves[path] if form is None else dequantize_matrix([leaves[n] for n in own], form, mx.float32)
        fused = (dense.astype(mx.float32) + scale * lora_b @ lora_a).astype(getattr(mx, config.dtype))
        leaves |= zip(own, [fused] if form is None else quantize_matrix(fused, form), strict=True)
    return nest(leaves, config)
