"""The parameter tree: each leaf's path, shape and axes, described once in `param_spec`.

Initialization, checks, loading and quantization all read that description, so they can't disagree. The tree is nested
dicts (and one list, of blocks) of `mx.array`s under the Hugging Face checkpoint's own names. Where that checkpoint
stacks experts along rows, the tree has an expert axis:

    params["transformer"]["blocks"][3]["norm_attn_norm"]["attn"]["Wqkv"]["weight"]     [qkv d_model]
    params["transformer"]["blocks"][3]["ffn"]["experts"]["mlp"]["w1"]["weight"]        [expert ffn_hidden d_model]

Each matrix may be quantized in MLX's formats (`mx.quantize`). Its dict then holds packed integers with their scales and
biases (`dbrx_fn.ops.formats`). Each matrix may have an adapter beside it (`dbrx_fn.model.adapters`).
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import mlx.core as mx
from jaxtyping import UInt32
from mlx.utils import tree_flatten, tree_unflatten

from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config, Dtype, LayerConfig
from dbrx_fn.model.shard import WHOLE, Cut, Shard, cut_of
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import ADAPTER_LEAVES, LEAVES, Described, Format, dtype_name, format_or_problem
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.compile import compiled, once

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Leaf:
    """One array of the tree: its axes' names and sizes, and its dtype. `None` stands for the config's dtype.

    `cut`: how several processes share it. `None` means that each holds all of it.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Literal["uint32", "uint8", "float32"] | None = None
    cut: Cut | None = None

    @property
    def is_expert(self) -> bool:
        """Whether this holds one matrix per expert."""
        return len(self.axes) == 3 and self.axes[0] == "expert"

    @property
    def is_norm(self) -> bool:
        """Whether this is a LayerNorm's weight, which is initialized to one. All other leaves are random matrices."""
        return len(self.axes) == 1

    def stored_as(self, dtype: str) -> mx.Dtype:
        """Its dtype in a tree whose floats are of `dtype`."""
        stored: mx.Dtype = getattr(mx, self.dtype or dtype)
        return stored

    def nbytes(self, dtype: str) -> int:
        """Its bytes in such a tree."""
        return math.prod(self.shape) * self.stored_as(dtype).size

    def quantized(self, quantization: Format) -> dict[str, "Leaf"]:
        """The leaves that replace this matrix when it is quantized, by their names."""
        inner = self.shape[-1]
        affine = quantization.mode == "affine"
        packed = (*self.shape[:-1], inner * quantization.bits // 32)
        groups = (*self.shape[:-1], inner // quantization.group_size)
        weight = Leaf((*self.axes[:-1], "packed"), packed, "uint32", self.cut)
        scales = Leaf((*self.axes[:-1], "group"), groups, None if affine else "uint8", self.cut)
        return {"weight": weight, "scales": scales} | ({"biases": scales} if affine else {})

    def adapter(self, rank: int) -> dict[str, "Leaf"]:
        """The leaves of an adapter for this matrix, by their names."""
        lengths, inner = self.shape[:-2], len(self.shape) - 1
        # A matrix that is cut along one axis cuts the adapter's side of that axis, at the same place.
        cut_a, cut_b = (self.cut if self.cut and self.cut.axis == axis else None for axis in (inner, inner - 1))
        lora_a = Leaf((*self.axes[:-2], "rank", self.axes[-1]), (*lengths, rank, self.shape[-1]), cut=cut_a)
        lora_b = Leaf((*self.axes[:-1], "rank"), (*self.shape[:-1], rank), cut=cut_b)
        return {"lora_a": lora_a, "lora_b": lora_b, "lora_scale": Leaf((), (), "float32")}


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


Kind = Literal["experts", "attention", "embedding", "head", "router"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MARKS: dict[str, Kind] = {
    ".experts.": "experts",
    ".attn.": "attention",
    ".wte.": "embedding",
    "lm_head.": "head",
    ".router.": "router",
}


def kind_of(path: str) -> Kind | None:
    """The kind of matrix that the leaf at this path belongs to. `None` for a norm's weight."""
    return next((kind for mark, kind in _MARKS.items() if mark in path), None)


@functools.cache
def param_spec(config: Config) -> Mapping[str, Leaf]:
    """Every leaf of this process's tree for `config`, by its dotted path, in the tree's canonical order."""
    blocks = {f"transformer.blocks.{n}.{name}": axes for n in range(config.n_layers) for name, axes in _BLOCK.items()}
    return _leaves(_EMBEDDING | blocks | _HEAD, config.layer)


def _leaves(axes_of: Mapping[str, str], layer: LayerConfig) -> dict[str, Leaf]:
    heads = layer.n_heads, layer.attn.kv_n_heads
    return {
        path: Leaf(
            tuple(axes.split()),
            tuple(layer.sizes[axis] for axis in axes.split()),
            cut=cut_of(axes.split(), heads),
        )
        for path, axes in axes_of.items()
    }


@functools.cache
def _part_spec(layer: LayerConfig, under: str) -> Mapping[str, Leaf]:
    """`param_spec` of the leaves below `under`, a path outside the blocks or in the first block."""
    blocks = {f"transformer.blocks.0.{name}": axes for name, axes in _BLOCK.items()}
    spec = _leaves(_EMBEDDING | blocks | _HEAD, layer)
    return {path: leaf for path, leaf in spec.items() if path.startswith(f"{under}.")}


@checked
def param_count(config: Config, *, active: bool = False) -> int:
    """Number of parameters. With `active`, experts count only as the `moe_top_k` that one token passes through."""
    total = 0
    for leaf in param_spec(config).values():
        size = math.prod(leaf.shape)
        if active and leaf.is_expert:
            size = size // config.ffn.moe_num_experts * config.ffn.moe_top_k
        total += size
    return total


@checked
def init_params(config: Config, key: UInt32[mx.array, "2"]) -> Params:
    """Draws a fresh tree: norm weights are one, matrices are normal with standard deviation `initializer_range`.

    The arrays are lazy, as MLX's are: nothing is allocated before it is used.

    Args:
        config: sizes and dtype.
        key: an `mx.random.key`; the same key draws the same tree, of which each process keeps its part.
    """
    spec = param_spec(replace(config, shard=WHOLE))
    dtype = getattr(mx, config.dtype)
    keys = mx.random.split(key, len(spec))

    def draw(leaf: Leaf, leaf_key: mx.array) -> mx.array:
        if leaf.is_norm:
            return mx.ones(leaf.shape, dtype)
        whole = mx.random.normal(leaf.shape, dtype, scale=config.initializer_range, key=leaf_key)
        return own_part(whole, leaf.cut, config.shard)

    return nest({path: draw(leaf, keys[i]) for i, (path, leaf) in enumerate(spec.items())}, config)


def own_part(whole: mx.array, cut: Cut | None, shard: Shard) -> mx.array:
    """A process's part of an array."""
    if cut is None or shard.is_whole:
        return whole
    parts = [whole[part] for part in cut.slices(whole.shape[cut.axis], shard)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=cut.axis)


def of_own_parts(parts: Sequence[mx.array], cut: Cut) -> mx.array:
    """The array that all processes' parts, in the order of their ranks, make up: the inverse of `own_part`."""
    unit = parts[0].shape[cut.axis] // sum(cut.sections)
    ends = list(itertools.accumulate(section * unit for section in cut.sections))
    sections = zip(*(mx.split(part, ends[:-1], axis=cut.axis) for part in parts), strict=True)
    return mx.concatenate([piece for section in sections for piece in section], axis=cut.axis)


def nest(arrays: Mapping[str, mx.array], config: Config) -> Params:
    """Makes the tree of arrays by dotted path. Equal arrays give equal trees, whatever they were made from.

    Keys have a fixed order, since `mx.compile` retraces when a dict's order changes: linears and norms in the spec's
    order, then a linear's leaves in theirs, then unknown names sorted. Each leaf is row-contiguous, since a product
    with a transposed matrix rounds differently. The copy to row-contiguous memory is lazy, is made only for leaves that
    need it, and frees the view that it replaces.
    """
    places = {path.removesuffix(".weight"): n for n, path in enumerate(param_spec(config))}
    names = (*LEAVES, *ADAPTER_LEAVES)

    def place(path: str) -> tuple[int, int, str]:
        linear, _, name = path.rpartition(".")
        return places.get(linear, len(places)), names.index(name) if name in names else len(names), path

    tree = tree_unflatten([(path, mx.contiguous(arrays[path])) for path in sorted(arrays, key=place)])
    # MLX makes a list of nothing.
    return cast(Params, tree or {})


def formats_of(
    found: Mapping[str, Described], places: Mapping[str, tuple[Sequence[str], int]]
) -> tuple[dict[str, Format], dict[str, list[str]]]:
    """The formats of the quantized linears among some arrays.

    Args:
        found: arrays by their names, which end as the tree's paths do.
        places: for each matrix's path in the tree, the names of the weights that make it up, and its input width. A
            matrix of several weights has the format of most of them.

    Returns:
        formats: the formats of the quantized matrices, by their paths.
        unknown: for each matrix that is quantized in an unknown way, the reasons. Each reason names its array.
    """
    formats: dict[str, Format] = {}
    unknown: dict[str, list[str]] = {}
    for path, (names, inner) in places.items():
        counts: Counter[Format | None] = Counter()
        problems: list[str] = []
        for name in names:
            linear = _linear(found, name)
            known = format_or_problem(linear, inner) if _is_quantized(linear) else None
            if isinstance(known, str):
                problems.append(name.removesuffix("weight") + known)
            else:
                counts[known] += 1
        if not counts:
            unknown[path] = problems
        elif (most := counts.most_common(1)[0][0]) is not None:
            formats[path] = most
    return formats, unknown


def _linear(found: Mapping[str, Described], name: str) -> dict[str, Described]:
    """The leaves, by their names, of the linear whose weight has this name."""
    base = name.removesuffix("weight")
    return {leaf: found[base + leaf] for leaf in LEAVES if base + leaf in found}


def _is_quantized(linear: Mapping[str, Described]) -> bool:
    """Whether these leaves are meant as a quantized matrix, valid or not."""
    return "scales" in linear or "biases" in linear or ("weight" in linear and dtype_name(linear["weight"]) == "uint32")


def companions(name: str) -> list[str]:
    """The names of all leaves that the matrix whose weight has this name can have, without an adapter's."""
    return [name.removesuffix("weight") + leaf for leaf in LEAVES]


def quantized_leaves(paths: Collection[str]) -> set[str]:
    """Those of a tree's paths that belong to quantized matrices, which have no gradient."""
    weights = [path.removesuffix("scales") + "weight" for path in paths if path.endswith(".scales")]
    return {name for weight in weights for name in companions(weight)} & set(paths)


def quantized_spec(spec: Mapping[str, Leaf], formats: Mapping[str, Format]) -> dict[str, Leaf]:
    """The spec of a quantized tree. `formats` gives the quantized matrices' formats by the paths of their weights."""
    leaves: dict[str, Leaf] = {}
    for path, leaf in spec.items():
        if path in formats:
            base = path.removesuffix("weight")
            leaves |= {base + name: part for name, part in leaf.quantized(formats[path]).items()}
        else:
            leaves[path] = leaf
    return leaves


def adapters_spec(spec: Mapping[str, Leaf], found: Mapping[str, Described], rows: int | None = None) -> dict[str, Leaf]:
    """The leaves of the adapters among some arrays. Each adapter's rank is that of its `lora_a`.

    Args:
        spec: the dense tree's.
        found: the tree's arrays, by their paths.
        rows: how many rows scales must be for, if they differ between rows; any number, if not given.
    """
    leaves: dict[str, Leaf] = {}
    for path, leaf in spec.items():
        base = path.removesuffix("weight")
        if leaf.is_norm or not any(base + name in found for name in ADAPTER_LEAVES):
            continue
        shape = found[f"{base}lora_a"].shape if f"{base}lora_a" in found else ()
        rank = max(1, shape[-2]) if len(shape) > 1 else 1
        leaves |= {base + name: part for name, part in leaf.adapter(rank).items()}
        scale = found[f"{base}lora_scale"].shape if f"{base}lora_scale" in found else ()
        if len(scale) == 2:
            leaves[f"{base}lora_scale"] = Leaf(("rows", "rank"), (rows or scale[0], rank), "float32")
    return leaves


@checked
def check_params(params: Params, config: Config) -> None:
    """Compares a tree with the spec. Any matrix may be quantized, and may have an adapter.

    Raises:
        CheckpointError: if a leaf is missing, unexpected, of a wrong shape, or of another dtype than `config.dtype`. It
            names every such leaf, with found and expected shapes.
    """
    _check(dict(tree_flatten(params)), param_spec(config), config.dtype)


def compiled_under(*paths: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`compiled`, for a layer whose first arguments are the parts of a tree below these paths, and the next a batch.

    `check_part` compares them with what the layer's `config` expects, before the types are checked.
    """

    def check(*arrays: Any, config: LayerConfig) -> None:
        for part, path in zip(arrays, paths, strict=False):
            check_part(part, config=config, under=path, rows=arrays[len(paths)].shape[0])

    return functools.partial(compiled, check=check)


@once
def check_part(part: Any, *, config: LayerConfig, under: str, rows: int | None = None) -> None:
    """`check_params` for the part of a tree below a path, such as `transformer.blocks.0`, and a batch of `rows`.

    Shapes and dtypes that have passed once cost nothing afterwards.
    """
    found = {f"{under}.{path}": array for path, array in dict(tree_flatten(part)).items()}
    _check(found, _part_spec(config, under), config.dtype, rows)


def _check(leaves: dict[str, Any], expected: Mapping[str, Leaf], dtype: Dtype, rows: int | None = None) -> None:
    spec = dict(expected)
    found: dict[str, mx.array] = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, mx.array)}
    formats, unknown = formats_of(
        found, {path: ((path,), leaf.shape[-1]) for path, leaf in spec.items() if not leaf.is_norm}
    )
    odd = leaves.keys() - found.keys()
    problems = [f"{path} is a {type(leaves[path]).__name__} where an array is expected" for path in odd]
    problems += [problem for reasons in unknown.values() for problem in reasons]
    for path in unknown:
        del spec[path]
        found = {name: array for name, array in found.items() if name not in companions(path)}
    spec = quantized_spec(spec, formats) | adapters_spec(expected, found, rows)
    problems += [f"{path} is missing" for path in spec.keys() - leaves.keys()]
    problems += [f"{path} is unexpected" for path in found.keys() - spec.keys()]
    for path in spec.keys() & found.keys():
        leaf, shape, found_dtype = spec[path], list(found[path].shape), dtype_name(found[path])
        if shape != list(leaf.shape):
            problems.append(f"{path} is {shape} where {list(leaf.shape)} ({' '.join(leaf.axes)}) is expected")
        if found_dtype != (leaf.dtype or dtype):
            problems.append(f"{path} is {found_dtype} where {leaf.dtype or dtype} is expected")
    if problems:
        raise CheckpointError(f"The parameters don't fit the config: {listed(problems)}.")


def listed(problems: list[str], most: int = 40) -> str:
    """Problems as one sorted phrase. Beyond `most` they are only counted."""
    shown = [problem if problem.isprintable() else repr(problem)[1:-1] for problem in sorted(problems)[:most]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
