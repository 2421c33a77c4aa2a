"""A training state that several processes share by parts, as one whole, and back.

The optimizer's moments are cut as the parameters that they belong to. All else, such as the key, every process holds.
"""

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import of_own_parts, param_spec
from dbrx_fn.model.shard import Cut
from dbrx_fn.ops.collectives import all_gather_parts


def state_cut(path: str, config: Config) -> Cut | None:
    """How the state's leaf at this path is cut. `None` means that every process holds all of it."""
    for beginning in ("params.", "optimizer.", "matrices.", "norms."):
        path = path.removeprefix(beginning)
    leaf = param_spec(config).get(path.removesuffix(".m").removesuffix(".v"))
    return None if leaf is None else leaf.cut


def whole_state(state: dict[str, Any], config: Config) -> dict[str, Any]:
    """The state of all processes together. All must call this. Each leaf is computed before the next one is.

    A process that doesn't keep the result holds one leaf of it at a time.
    """
    if config.shard.is_whole:
        return state
    leaves: dict[str, mx.array] = dict(tree_flatten(state))
    wholes = iter(_whole(leaf, state_cut(path, config), config) for path, leaf in leaves.items())
    keeps = config.shard.rank == 0
    whole = tree_map(lambda own: next(wholes) if keeps else (next(wholes), own)[1], state)
    return cast(dict[str, Any], whole)


def _whole(own: mx.array, cut: Cut | None, config: Config) -> mx.array:
    if cut is None:
        return own
    whole = mx.contiguous(of_own_parts(all_gather_parts(own, config.shard.size), cut))
    mx.eval(whole)
    return whole
