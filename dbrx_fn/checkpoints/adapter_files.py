"""Writes adapters as mlx-lm's folder, `adapters.safetensors` and `adapter_config.json`, or as PEFT's."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_names import SETTINGS, TENSORS, Module, Style, modules
from dbrx_fn.checkpoints.adapter_reader import read_adapters, style_of
from dbrx_fn.checkpoints.adapter_settings import AdapterSettings, read_settings
from dbrx_fn.checkpoints.saver import write_tensors
from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import new_folder
from dbrx_fn.model.adapters import Adapters, adapted, check_single
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked

ADAPTER_FILES = (TENSORS["mlx-lm"], SETTINGS)
"""The names of the files in mlx-lm's folder."""


@checked
def save_adapters(folder: str | Path, params: Params, config: Config, *, style: Style = "mlx-lm") -> None:
    """Writes a tree's adapters into a new folder, which appears when it is complete, or not at all.

    Args:
        folder: the new folder. Missing parents are made too.
        params: the tree with adapters, or the part of it with `lora_a`, `lora_b` and `lora_scale`.
        config: the model's.
        style: whose folder it is.

    Raises:
        InputError: if the folder exists or can't be written, if the tree has no adapters, if they have several ranks or
            scales or are stacked, or if PEFT can't have one of them: those of experts.
    """
    check_single(params)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    paths = adapted(params)
    ranks = {leaves[path.removesuffix("weight") + "lora_a"].shape[-2] for path in paths}
    scales = {float(np.array(leaves[path.removesuffix("weight") + "lora_scale"])) for path in paths}
    if len(ranks) != 1 or len(scales) != 1:
        raise InputError(
            f"The tree has adapters of {len(ranks)} ranks and {len(scales)} scales where one of each is expected: add"
            " adapters to it, or save those of one rank and scale."
        )
    with new_folder(Path(folder), files=(*TENSORS.values(), SETTINGS)) as beside:
        _write(beside, leaves, config, ranks.pop(), scales.pop(), style)


def convert_adapters(source: Path, folder: Path, config: Config, style: Style) -> AdapterSettings:
    """Writes the adapters of mlx-lm's folder as PEFT's, or the reverse. Every number is kept, as float32.

    Args:
        source: the folder to read.
        folder: the new folder, which appears when it is complete, or not at all.
        config: the model's.
        style: whose folder to write.

    Returns:
        Rank and scale of the adapters.

    Raises:
        CheckpointError: as in `read_adapters`.
        InputError: if the source is of this style, or as in `save_adapters`.
    """
    found = style_of(source)
    if found == style:
        raise InputError(f"{source} is {style}'s folder already: copy it, or choose the other layout.")
    settings = read_settings(source / SETTINGS, found, config.n_layers)
    leaves = read_adapters(source, replace(config, dtype="float32"))
    with new_folder(folder, files=(*TENSORS.values(), SETTINGS)) as beside:
        _write(beside, leaves, config, settings.rank, settings.scale, style)
    return settings


def write_adapters(folder: Path, trained: Params, config: Config, adapters: Adapters) -> None:
    """Writes adapters into a folder that nobody reads yet, as mlx-lm's.

    Args:
        folder: to write into.
        trained: the tree, or the part of it with `lora_a` and `lora_b`.
        config: the model's.
        adapters: what they are.

    Raises:
        CheckpointError: if they can't be computed.
        OSError: if a file can't be written.
    """
    _write(folder, dict(tree_flatten(trained)), config, adapters.rank, adapters.scale, "mlx-lm")


def _write(folder: Path, leaves: dict[str, mx.array], config: Config, rank: int, scale: float, style: Style) -> None:
    tensors: dict[str, mx.array] = {}
    written: list[Module] = []
    for module in modules(config, style):
        base = module.path.removesuffix("weight")
        if f"{base}lora_a" in leaves:
            written.append(module)
            for part in module.parts:
                leaf = leaves[base + part.leaf]
                tensors[part.name] = part.of(leaf if module.expert is None else leaf[module.expert])
    lost = {path for path in leaves if path.endswith(".lora_a")} - {
        module.path.removesuffix("weight") + "lora_a" for module in written
    }
    if lost:
        raise InputError(
            f"{min(lost)} is an expert's adapter, which PEFT can't have since transformers' experts are no linears:"
            " save it for mlx-lm, merge it (python -m dbrx_fn.fuse), or train only --lora-targets attention."
        )
    names = _names(written, config)
    settings = _mlx_lm_settings(names, config, rank, scale) if style == "mlx-lm" else _peft_settings(names, rank, scale)
    write_tensors(folder / TENSORS[style], tensors, {"format": "mlx" if style == "mlx-lm" else "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _names(written: list[Module], config: Config) -> list[str]:
    """What the settings call the modules: names within a layer, or whole names if only some layers have the module."""
    layers = Counter(module.within_layer for module in written if module.layer is not None)
    return sorted(
        {module.within_layer if layers[module.within_layer] == config.n_layers else module.name for module in written}
    )


def _mlx_lm_settings(names: list[str], config: Config, rank: int, scale: float) -> dict[str, Any]:
    return {
        "fine_tune_type": "lora",
        "num_layers": config.n_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": names},
    }


def _peft_settings(names: list[str], rank: int, scale: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names,
    }
