"""Adapters that change something, as training leaves them."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.model.adapters import Adapters, add_adapters
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Kind, nest
from dbrx_fn.model.tree import Params


def with_random_adapters(
    params: Params, config: Config, targets: Sequence[Kind], *, rank: int = 4, seed: int = 0
) -> Params:
    """The tree with adapters whose `lora_b` isn't zero, but as large as `lora_a`."""
    adapters = Adapters(rank, 1.5 * rank, tuple(targets))
    leaves: dict[str, mx.array] = dict(tree_flatten(add_adapters(params, config, adapters, mx.random.key(seed))))
    rng = np.random.default_rng(seed)
    for path, leaf in leaves.items():
        if path.endswith(".lora_b"):
            drawn = rng.standard_normal(leaf.shape) / np.sqrt(3 * rank)
            leaves[path] = mx.array(drawn.astype(np.float32)).astype(leaf.dtype)
    return nest(leaves, config)
