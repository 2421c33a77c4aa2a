"""Adapters as mlx-lm's adapter folder: `adapters.safetensors` and `adapter_config.json`.

mlx-lm has a linear for each expert, and multiplies from the left, so its matrices are transposed:

    Wqkv             lora_a [inner rank]     lora_b [rank outer]
    experts.3.w1     the same, for each expert
    wte              lora_a [vocab rank]     lora_b [rank d_model]
"""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.saver import write_tensors
from dbrx_fn.model.adapters import Adapters
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Kind, kind_of, param_spec
from dbrx_fn.model.tree import Params

TENSORS, SETTINGS = "adapters.safetensors", "adapter_config.json"
ADAPTER_FILES = (TENSORS, SETTINGS)
"""The names of an adapter folder's files."""


def write_adapters(folder: Path, trained: Params, config: Config, adapters: Adapters) -> None:
    """Writes adapters into a folder that nobody reads yet.

    Args:
        folder: to write into.
        trained: the tree, or the part of it with `lora_a` and `lora_b`.
        config: the model's.
        adapters: what they are.

    Raises:
        CheckpointError: if they can't be computed.
        OSError: if a file can't be written.
    """
    leaves: dict[str, mx.array] = dict(tree_flatten(trained))
    tensors: dict[str, mx.array] = {}
    modules: set[str] = set()
    for path, leaf in param_spec(config).items():
        base = path.removesuffix(".weight")
        if f"{base}.lora_a" not in leaves:
            continue
        lora_a, lora_b = (leaves[f"{base}.{name}"] for name in ("lora_a", "lora_b"))
        if leaf.is_expert:
            before, after = base.split(".mlp.")
            for expert in range(leaf.shape[0]):
                module = f"{before}.{expert}.{after}"
                tensors |= _pair(module, lora_a[expert], lora_b[expert], "experts")
                modules.add(module)
        else:
            tensors |= _pair(base, lora_a, lora_b, kind_of(path))
            modules.add(base)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": config.n_layers,
        "lora_parameters": {
            "rank": adapters.rank,
            "scale": adapters.scale,
            "dropout": 0.0,
            "keys": sorted({_within_layer(module) for module in modules}),
        },
    }
    write_tensors(folder / TENSORS, tensors, {"format": "mlx"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _pair(module: str, lora_a: mx.array, lora_b: mx.array, kind: Kind | None) -> dict[str, mx.array]:
    """mlx-lm's two tensors for a module."""
    if kind == "embedding":
        return {f"{module}.lora_a": mx.contiguous(lora_b), f"{module}.lora_b": mx.contiguous(lora_a)}
    return {f"{module}.lora_a": mx.contiguous(lora_a.T), f"{module}.lora_b": mx.contiguous(lora_b.T)}


def _within_layer(module: str) -> str:
    """A module's path within its layer, or its whole path outside of the layers."""
    parts = module.split(".")
    return ".".join(parts[3:] if parts[:2] == ["transformer", "blocks"] else parts)
