"""The parameter tree, described once: path, shape, and what each axis is.

`param_spec` is that description. Drawing fresh parameters, checking a tree and loading a checkpoint all read it, so a
tensor can't be one thing to one of them and another to the next. The tree itself is nested dicts (and one list, of
blocks) of `mx.array`s under the Hugging Face checkpoint's own names, with an expert axis where that checkpoint stacks
experts along rows:

    params["transformer"]["blocks"][3]["norm_attn_norm"]["attn"]["Wqkv"]["weight"]     [qkv d_model]
    params["transformer"]["blocks"][3]["ffn"]["experts"]["mlp"]["w1"]["weight"]        [expert ffn_hidden d_model]
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from dbrx_fn.config import Config
from dbrx_fn.errors import CheckpointError

Params = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One array of the tree: the names of its axes and their sizes."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def is_expert(self) -> bool:
        """Whether this is one matrix for each expert."""
        return self.axes[0] == "expert" and len(self.axes) == 3

    @property
    def is_norm(self) -> bool:
        """Whether this is a LayerNorm's weight, which starts at one; all others are matrices, drawn at random."""
        return len(self.axes) == 1


_EMBEDDING = {"transformer.wte.weight": "vocab d_model"}
_BLOCK = {
    "norm_attn_norm.norm_1.weight": "d_model",
    "norm_attn_norm.attn.Wqkv.weight": "qkv d_model",
    "norm_attn_norm.attn.out_proj.weight": "d_model heads",
    "norm_attn_norm.norm_2.weight": "d_model",
    "ffn.router.layer.weight": "expert d_model",
    "ffn.experts.mlp.w1.weight": "expert ffn_hidden d_model",
    "ffn.experts.mlp.v1.weight": "expert ffn_hidden d_model",
    "ffn.experts.mlp.w2.weight": "expert d_model ffn_hidden",
}
_HEAD = {"transformer.norm_f.weight": "d_model", "lm_head.weight": "vocab d_model"}


@functools.cache
def param_spec(config: Config) -> Mapping[str, Leaf]:
    """Every leaf of the tree for `config`, by its dotted path, in the tree's canonical order."""
    sizes = {
        "vocab": config.vocab_size,
        "d_model": config.d_model,
        "qkv": config.qkv_dim,
        "heads": config.n_heads * config.head_dim,
        "expert": config.ffn.moe_num_experts,
        "ffn_hidden": config.ffn.ffn_hidden_size,
    }
    blocks = {f"transformer.blocks.{n}.{name}": axes for n in range(config.n_layers) for name, axes in _BLOCK.items()}
    leaves = _EMBEDDING | blocks | _HEAD
    return {
        path: Leaf(tuple(axes.split()), tuple(sizes[axis] for axis in axes.split())) for path, axes in leaves.items()
    }


def param_count(config: Config, *, active: bool = False) -> int:
    """Number of parameters; with `active`, of those that one token passes through (its `moe_top_k` experts)."""
    total = 0
    for leaf in param_spec(config).values():
        size = math.prod(leaf.shape)
        if active and leaf.is_expert:
            size = size // config.ffn.moe_num_experts * config.ffn.moe_top_k
        total += size
    return total


def init_params(config: Config, key: mx.array) -> Params:
    """Draws a fresh tree: norm weights one, matrices normal with standard deviation `initializer_range`.

    Lazy, as everything in MLX: nothing is allocated before it is used.

    Args:
        config: sizes and dtype.
        key: an `mx.random.key`; the same key draws the same tree.
    """
    spec = param_spec(config)
    dtype = getattr(mx, config.dtype)
    keys = mx.random.split(key, len(spec))

    def draw(leaf: Leaf, leaf_key: mx.array) -> mx.array:
        if leaf.is_norm:
            return mx.ones(leaf.shape, dtype)
        return mx.random.normal(leaf.shape, dtype, scale=config.initializer_range, key=leaf_key)

    return nest({path: draw(leaf, keys[i]) for i, (path, leaf) in enumerate(spec.items())}, config)


def nest(arrays: Mapping[str, mx.array], config: Config) -> Params:
    """Arrays by dotted path, as the tree, in canonical order (`mx.compile` retraces when a dict's order changes)."""
    tree: Params = tree_unflatten([(path, arrays[path]) for path in param_spec(config)])
    return tree


def check_params(params: Params, config: Config, *, under: str = "") -> None:
    """Compares a tree with the spec.

    Args:
        params: the tree, or the part of it below a path.
        config: the model's.
        under: that path, such as `transformer.blocks.0`.

    Raises:
        CheckpointError: naming every leaf that is missing, unexpected, misshapen or of another dtype than
            `config.dtype`, with found and expected shapes.
    """
    prefix = f"{under}." if under else ""
    spec = {path: leaf for path, leaf in param_spec(config).items() if path.startswith(prefix)}
    found = {prefix + path: array for path, array in dict(tree_flatten(params)).items()}
    problems = [f"{path} is missing" for path in spec.keys() - found.keys()]
    problems += [f"{path} is unexpected" for path in found.keys() - spec.keys()]
    for path in spec.keys() & found.keys():
        leaf, shape, dtype = spec[path], list(found[path].shape), str(found[path].dtype).removeprefix("mlx.core.")
        if shape != list(leaf.shape):
            problems.append(f"{path} is {shape} where {list(leaf.shape)} ({' '.join(leaf.axes)}) is expected")
        if dtype != config.dtype:
            problems.append(f"{path} is {dtype} where {config.dtype} is expected")
    if problems:
        raise CheckpointError(f"The parameters don't fit the config: {listed(problems)}.")


def listed(problems: list[str], most: int = 40) -> str:
    """Problems as one phrase, sorted, the rest counted when there are many."""
    shown = sorted(problems)[:most]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
