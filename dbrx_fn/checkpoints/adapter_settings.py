"""Reads `adapter_config.json`, of mlx-lm or of PEFT: rank, scale, and which modules have adapters.

mlx-lm stores all options of its training there, and reads three of them. PEFT's fields beside the known ones change
what is computed, so they must have the values that change nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dbrx_fn.checkpoints.adapter_names import Module, Style, names_of
from dbrx_fn.errors import CheckpointError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown

_MLX_LM_FIELDS = {"rank", "scale", "dropout", "keys"}
_PEFT_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "bias"}
_PEFT_NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
"""PEFT's fields that change nothing once training has ended, or that only give others a meaning."""
_PEFT_FRESH = (True, False, None, "gaussian", "orthogonal", "eva")
"""The ways of drawing fresh adapters that leave the model's own weights as they are."""


@dataclass(frozen=True)
class AdapterSettings:
    """What the tensors' file doesn't say.

    `scale`: the factor of the product.
    `has_adapter`: whether a module has one.
    `names`: the names that the file gives for modules. `None` if it means all in the layers.
    """

    rank: int
    scale: float
    has_adapter: Callable[[Module], bool]
    names: frozenset[str] | None


def read_settings(file: Path, style: Style, n_layers: int) -> AdapterSettings:
    """Reads the settings of adapters for a model of `n_layers`.

    Raises:
        CheckpointError: if they are missing or damaged, or ask for something that isn't done here.
    """
    try:
        settings = parse_json(read_bounded(file), unique=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, which gives adapters their scale: fetch it.") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read ({error.strerror}): make it readable.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} isn't valid JSON ({error}): fetch it again.") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds {shown(settings)} where settings by name are expected: fetch it again.")
    found = cast(dict[str, Any], settings)
    return _mlx_lm(file, found, n_layers) if style == "mlx-lm" else _peft(file, found)


def _mlx_lm(file: Path, found: dict[str, Any], n_layers: int) -> AdapterSettings:
    kind = found.get("fine_tune_type", "lora")
    if kind != "lora":
        raise CheckpointError(f"{file} has fine_tune_type {shown(kind)} where only 'lora' is read: train with that.")
    parameters, layers = found.get("lora_parameters"), found.get("num_layers")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{file} has lora_parameters {shown(parameters)} where rank and scale are expected.")
    if unknown := sorted(parameters.keys() - _MLX_LM_FIELDS):
        raise CheckpointError(
            f"{file} has {shown(unknown[0])} in lora_parameters where only {', '.join(sorted(_MLX_LM_FIELDS))} are"
            " known: leave it out if it changes nothing."
        )
    if type(layers) is not int:
        raise CheckpointError(f"{file} has num_layers {shown(layers)} where a number of layers is expected.")
    # mlx-lm takes a number that isn't positive as all layers.
    first = max(0, n_layers - layers) if layers > 0 else 0
    keys = parameters.get("keys")
    if keys is not None and not _are_names(keys):
        raise CheckpointError(f"{file} has keys {shown(keys)} where names of modules are expected.")
    known = None if keys is None else frozenset(keys)

    def has_adapter(module: Module) -> bool:
        if module.layer is None:
            return known is not None and module.name in known
        # A key that is a whole name counts in every layer.
        whole = known is not None and module.name in known
        return whole or (module.layer >= first and (known is None or module.within_layer in known))

    return AdapterSettings(_rank(file, "rank", parameters), _number(file, "scale", parameters), has_adapter, known)


def _peft(file: Path, found: dict[str, Any]) -> AdapterSettings:
    if found.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file} has peft_type {shown(found.get('peft_type'))} where only 'LORA' is read: train with that."
        )
    if found.get("init_lora_weights") not in _PEFT_FRESH:
        raise CheckpointError(
            f"{file} has init_lora_weights {shown(found['init_lora_weights'])}, which changes the model's own weights:"
            " let PEFT convert it to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for name in sorted(found.keys() - _PEFT_READ - _PEFT_NEUTRAL) + (["bias"] if found.get("bias") != "none" else []):
        if found.get(name):
            raise CheckpointError(
                f"{file} has {name} {shown(found[name])}, which isn't supported: train without it, or let PEFT merge"
                " the adapters (merge_and_unload) and load the model that it saves."
            )
    targets = found.get("target_modules")
    if not _are_names(targets):
        raise CheckpointError(
            f"{file} has target_modules {shown(targets)} where a list of names is expected: list the modules."
        )
    names = frozenset(cast(list[str], targets))

    def has_adapter(module: Module) -> bool:
        return any(name in names for name in names_of(module, "peft"))

    rank = _rank(file, "r", found)
    alpha = _number(file, "lora_alpha", found)
    if type(found.get("use_rslora", False)) is not bool:
        raise CheckpointError(f"{file} has use_rslora {shown(found['use_rslora'])} where true or false is expected.")
    return AdapterSettings(rank, alpha / (math.sqrt(rank) if found.get("use_rslora") else rank), has_adapter, names)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _rank(file: Path, name: str, found: dict[str, Any]) -> int:
    rank = found.get(name)
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise CheckpointError(f"{file} has {name} {shown(rank)} where a rank of at least 1 is expected.")
    return rank


def _number(file: Path, name: str, found: dict[str, Any]) -> float:
    number = found.get(name)
    if type(number) not in (int, float) or not abs(cast(float, number)) < 2.0**127:
        raise CheckpointError(f"{file} has {name} {shown(number)} where a number is expected.")
    return float(cast(float, number))
