"""Adapters that change something, as training leaves them."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.model.adapters import Adapters, add_adapters
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Kind, nest
from dbrx_fn.model.tree import Params
from dbrx_fn.random_checkpoint import write_random_checkpoint


def write_model_with_adapters(folder: Path, config: Config, targets: Sequence[Sequence[Kind]]) -> list[Path]:
    """Writes `model` in a folder, and adapters beside it, one for each of `targets`. Returns the adapters' folders."""
    write_random_checkpoint(folder / "model", config, mx.random.key(0))
    params, config = load(folder / "model")
    written = []
    for seed, kinds in enumerate(targets, start=1):
        written.append(folder / f"adapters-{seed}")
        save_adapters(written[-1], with_random_adapters(params, config, kinds, rank=1 + seed, seed=seed), config)
    return written


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


def without_first_layer(params: Params, config: Config) -> Params:
    """The tree without the first layer's adapters, as mlx-lm trains the last layers alone by default."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    return nest({path: leaf for path, leaf in leaves.items() if not (".blocks.0." in path and "lora_" in path)}, config)
