"""A tree in two parts, such as the leaves that are trained and those that aren't. Both are nested as the tree is."""

from collections.abc import Callable, Sequence
from typing import Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import KINDS, Kind, kind_of, nest
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked

Part = Kind | Literal["norms"]
PARTS: tuple[Part, ...] = (*KINDS, "norms")


def part_of(path: str) -> Part:
    """The part of the model that the leaf at this path belongs to."""
    return kind_of(path) or "norms"


def parts_named(names: Sequence[str]) -> tuple[Part, ...]:
    """These parts, in `PARTS`' order.

    Raises:
        InputError: if a name is none of `PARTS`, or there is none.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        found = shown(unknown[0]) if unknown else "nothing"
        raise InputError(f"{found} is named where parts of the model are expected: {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


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
