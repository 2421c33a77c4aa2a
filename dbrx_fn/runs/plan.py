"""A training run's settings as a value: the part of its command that `run.json` keeps."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dbrx_fn.checkpoints.config_file import config_from_dict, config_to_dict
from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.adapters import Adapters, targets_of
from dbrx_fn.model.config import Config
from dbrx_fn.model.partition import Part, parts_named
from dbrx_fn.training.step import Recipe

_DECIDES = ("config", "recipe", "batch_size", "sequence_length", "seed", "adapters", "train_only")


@dataclass(frozen=True)
class Plan:
    """A run's settings, as in `run.json`. Together with the run's folder they are enough to resume it.

    `model`: the folder of the checkpoint to start from; `None` for a fresh model.
    `adapters`: the adapters to train in place of the model's own parameters, if any.
    `train_only`: the parts of the model to train, in place of all; the others stay as they are.
    `log_every`, `eval_every`, `save_every`: numbers of steps.
    `keep`: number of the last checkpoints to keep.

    Raises:
        InputError: if an option has an impossible value. It names the option.
    """

    config: Config
    recipe: Recipe
    batch_size: int
    sequence_length: int
    seed: int
    model: str | None
    log_every: int
    eval_every: int
    save_every: int
    keep: int
    adapters: Adapters | None = None
    train_only: tuple[Part, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "seed", "log_every", "eval_every", "save_every", "keep"):
            value, least = getattr(self, name), int(name != "seed")
            if type(value) is not int or value < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {shown(value)} where a whole number of at least {least} is expected.")
        if self.model is not None and type(self.model) is not str:
            raise InputError(f"--model is {shown(self.model)} where a folder's name is expected.")
        if self.sequence_length > self.config.max_seq_len:
            raise InputError(
                f"--sequence-length is {self.sequence_length} and the model's context holds {self.config.max_seq_len}"
                " (max_seq_len in its config.json): make it shorter."
            )
        if self.batch_size % self.recipe.micro_batches:
            raise InputError(
                f"--batch-size is {self.batch_size} where a multiple of --micro-batches,"
                f" {self.recipe.micro_batches}, is expected."
            )
        if self.adapters is not None and self.train_only is not None:
            raise InputError("--lora and --train-only are both given: train either adapters or parts of the model.")
        if self.trains_part and self.model is None:
            option = "--lora" if self.train_only is None else "--train-only"
            raise InputError(f"{option} needs --model: the parameters that aren't trained come from a checkpoint.")

        if self.adapters is not None:
            targets_of(self.adapters, self.config)

    @property
    def trains_part(self) -> bool:
        """Whether the checkpoint's other parameters stay as they are, in their own formats."""
        return self.adapters is not None or self.train_only is not None

    def with_steps(self, steps: int) -> "Plan":
        """The same plan with another number of steps. Raises `InputError` if that is impossible."""
        return replace(self, recipe=replace(self.recipe, steps=steps))

    def as_dict(self) -> dict[str, Any]:
        """The plan as values of JSON."""
        return {**asdict(self), "config": config_to_dict(self.config)}

    def decides(self) -> dict[str, Any]:
        """The settings that determine each step's results, as values of JSON. `steps` isn't one, since it may grow."""
        whole = self.as_dict()
        chosen = {name: whole[name] for name in _DECIDES}
        chosen["recipe"] = {name: value for name, value in whole["recipe"].items() if name != "steps"}
        decides: dict[str, Any] = json.loads(json.dumps(chosen))
        return decides

    @staticmethod
    def from_dict(raw: Any, source: Path) -> "Plan":
        """The inverse of `as_dict`.

        Raises:
            InputError: if `raw` isn't such a value.
        """
        try:
            recipe = {**raw["recipe"], "betas": tuple(raw["recipe"]["betas"])}
            _refuse_unknown(Recipe, recipe)
            _refuse_unknown(Plan, raw)
            checked = {"recipe": Recipe(**recipe), "config": config_from_dict(raw["config"], source=str(source))}
            if raw.get("adapters") is not None:
                adapters = {**raw["adapters"], "targets": tuple(raw["adapters"]["targets"])}
                _refuse_unknown(Adapters, adapters)
                checked["adapters"] = Adapters(**adapters)
            if raw.get("train_only") is not None:
                checked["train_only"] = parts_named(raw["train_only"])
            return Plan(**{**raw, **checked})
        except (DbrxError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{source} isn't what a run notes there ({str(error).rstrip('.')}): start the run again elsewhere."
            ) from None


def difference(here: object, there: object, name: str = "") -> str | None:
    """The first difference of two JSON values, in words, or `None` if they are equal."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            found = difference(here.get(key), there.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return None
    return None if here == there else f"{name or 'it'} is {shown(here)} here and {shown(there)} there"


def _refuse_unknown(kind: Any, found: Mapping[str, Any]) -> None:
    unknown = found.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise InputError(f"{shown(sorted(unknown)[0])} is none of its fields")
