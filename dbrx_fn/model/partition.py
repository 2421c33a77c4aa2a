"""A tree in two parts, such as the leaves that are trained and those that aren't. Both are nested as the tree is."""

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import nest
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked


@checked
def partition(params: Params, config: Config, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """The leaves whose paths are `chosen`, and the others. `joined` makes the tree of them again."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    one = {path: leaf for path, leaf in leaves.items() if chosen(path)}
    other = {path: leaf for path, leaf in leaves.items() if path not in one}
    return nest(one, config), nest(other, config)


def joined(one: Params, other: Params, config: Config) -> Params:
    """The tree of two parts without common leaves."""
    return nest({**dict(tree_flatten(one)), **dict(tree_flatten(other))}, config)
