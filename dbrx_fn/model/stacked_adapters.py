"""Several adapters over one tree's weights, for batches whose rows use different ones.

Adapters of one matrix stand side by side along the rank's axis. A row's scales are zero for all but its own adapter:

    narrow   x @ lora_a.T            [batch time ranks]     ranks: those of all adapters together
    scaled   narrow * lora_scale     [batch time ranks]     lora_scale: [batch ranks]
    added    scaled @ lora_b.T       [batch time outer]

Shapes don't depend on which row uses what, so one trace serves every mix. A row without an adapter adds zeros. The cost
grows with the sum of the ranks, whatever the rows use.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.adapters import adapted, check_single
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Leaf, check_params, nest, param_spec
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import ADAPTER_LEAVES
from dbrx_fn.runtime.arguments import checked

Leaves = dict[str, mx.array]


@checked
def stack_adapters(params: Params, config: Config, trees: Sequence[Params]) -> Params:
    """A tree with the adapters of several trees beside the weights of the first, for `choose_adapters`.

    Each `lora_scale` is `[1 + n ranks]`: a row for no adapter, and one for each of the `n` trees. A kind of matrix that
    has an adapter in one layer has one in each, zeros if need be, so that all layers have one trace.

    Args:
        params: the tree, dense or quantized, without adapters.
        config: the model's.
        trees: trees of the same model with adapters, as `load_adapters` makes them. Only their adapters are read.

    Raises:
        InputError: if `params` has adapters, or one of `trees` has none, or several.
        CheckpointError: if a tree doesn't fit the config.
    """
    check_params(params, config)
    if found := adapted(params):
        raise InputError(f"{found[0]} has an adapter already: stack adapters beside the tree without any.")
    stacked = [_adapters_of(tree, config, number) for number, tree in enumerate(trees)]
    ranks = [_ranks(own) for own in stacked]
    leaves: Leaves = dict(tree_flatten(params))
    for path, leaf in param_spec(config).items():
        widths = [of_kinds.get(_in_any_layer(path), 0) for of_kinds in ranks]
        if any(widths):
            leaves |= _side_by_side(path.removesuffix("weight"), leaf, stacked, widths, getattr(mx, config.dtype))
    # Matrices with equal scales share one array, so that `choose_adapters` takes its rows once.
    shared: dict[tuple[object, ...], mx.array] = {}
    return _with_scales(
        nest(leaves, config), lambda scale: shared.setdefault((scale.shape, np.array(scale).tobytes()), scale)
    )


@checked
def choose_adapters(params: Params, rows: Sequence[int]) -> Params:
    """The tree for a batch whose rows use these adapters. It shares all leaves but the scales.

    A tree without a stack is returned as it is.

    Args:
        params: as `stack_adapters` made it.
        rows: each row's adapter, by its place in the stack, counted from 1. 0 means none.

    Raises:
        InputError: if there is no such adapter.
    """
    count = stacked_count(params)
    wrong = [row for row in rows if type(row) is not int or not 0 <= row <= count]
    if wrong:
        raise InputError(f"rows names adapter {shown(wrong[0])} where the tree has 1 to {count}, and 0 is none.")
    if not count:
        return params
    index, taken = mx.array(list(rows), mx.int32), dict[int, mx.array]()

    def of_rows(scale: mx.array) -> mx.array:
        if id(scale) not in taken:
            taken[id(scale)] = mx.take(scale, index, axis=0)
        return taken[id(scale)]

    return _with_scales(params, of_rows)


def stacked_count(params: Params) -> int:
    """How many adapters are stacked beside the tree's weights."""

    def scales(part: Any) -> Iterator[mx.array]:
        if isinstance(part, dict) and "lora_scale" in part:
            yield part["lora_scale"]
        elif isinstance(part, dict | list):
            for one in part.values() if isinstance(part, dict) else part:
                yield from scales(one)

    return next((scale.shape[0] - 1 for scale in scales(params) if scale.ndim), 0)


def _adapters_of(tree: Params, config: Config, number: int) -> Leaves:
    """The leaves of a tree's adapters, by path."""
    check_params(tree, config)
    check_single(tree)
    leaves: Leaves = dict(tree_flatten(tree))
    found = {path: leaf for path, leaf in leaves.items() if path.rpartition(".")[2] in ADAPTER_LEAVES}
    if not found:
        raise InputError(f"trees[{number}] has no adapters: load them with load_adapters.")
    return found


def _ranks(own: Leaves) -> dict[str, int]:
    """The largest rank of each matrix over all layers."""
    ranks: dict[str, int] = {}
    for path, leaf in own.items():
        if path.endswith("lora_a"):
            kind = _in_any_layer(path.removesuffix("lora_a") + "weight")
            ranks[kind] = max(ranks.get(kind, 0), leaf.shape[-2])
    return ranks


def _in_any_layer(path: str) -> str:
    return re.sub(r"\.blocks\.\d+\.", ".blocks.", path)


def _side_by_side(base: str, leaf: Leaf, stacked: Sequence[Leaves], widths: Sequence[int], dtype: mx.Dtype) -> Leaves:
    """The leaves of one matrix's adapters. One that lacks the matrix, or has a smaller rank there, gets zeros."""
    scales = np.zeros((1 + len(stacked), sum(widths)), np.float32)
    firsts: list[mx.array] = []
    seconds: list[mx.array] = []
    for row, (own, width) in enumerate(zip(stacked, widths, strict=True), start=1):
        parts, there = leaf.adapter(width), f"{base}lora_a" in own
        first = own[f"{base}lora_a"] if there else mx.zeros(parts["lora_a"].shape, dtype)
        second = own[f"{base}lora_b"] if there else mx.zeros(parts["lora_b"].shape, dtype)
        lacking, before = width - first.shape[-2], sum(widths[: row - 1])
        whole = [(0, 0)] * (first.ndim - 2)
        firsts.append(mx.pad(first, [*whole, (0, lacking), (0, 0)]))
        seconds.append(mx.pad(second, [*whole, (0, 0), (0, lacking)]))
        scales[row, before : before + width] = float(np.array(own[f"{base}lora_scale"])) if there else 0
    return {
        f"{base}lora_a": mx.concatenate(firsts, axis=-2),
        f"{base}lora_b": mx.concatenate(seconds, axis=-1),
        f"{base}lora_scale": mx.array(scales),
    }


def _with_scales(params: Params, scale: Callable[[mx.array], mx.array]) -> Params:
    """The tree with other scales of adapters."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(one) for one in part]
        if not isinstance(part, dict):
            return part
        return {name: scale(one) if name == "lora_scale" else changed(one) for name, one in part.items()}

    return cast(Params, changed(params))
