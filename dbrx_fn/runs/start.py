"""The parameters that a run starts from: those it trains and, if these are a part of a model, the others."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.checkpoints.loader import load
from dbrx_fn.errors import InputError
from dbrx_fn.files.checksums import file_sum
from dbrx_fn.model.adapters import Adapters, add_adapters, is_adapter
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import KINDS, init_params
from dbrx_fn.model.partition import Part, part_of, partition
from dbrx_fn.model.quantization import dequantize
from dbrx_fn.model.shard import WHOLE, Shard
from dbrx_fn.model.tree import Params
from dbrx_fn.runs.plan import Plan


def start_parts(plan: Plan, key: mx.array, *, outline: bool) -> tuple[Params, Params | None]:
    """The parameters to train, and the others in the dtype of the forward pass (`None` if all are trained).

    Args:
        plan: the run's settings.
        key: draws fresh parameters and adapters.
        outline: whether only the shapes of the parameters to train are needed, as there is a checkpoint of them.
    """
    if plan.model is None or (outline and not plan.trains_part):
        # Fresh parameters that serve as an outline are never computed, and need no checkpoint.
        return init_params(plan.config, key), None
    model = Path(plan.model)
    if plan.adapters is not None:
        return _adapters(model, plan.adapters, plan.recipe.dtype, key)
    if plan.train_only is not None:
        return _parts(model, plan.train_only, plan.recipe.dtype)
    return start_params(model, plan.config.shard), None


def start_params(model: Path, shard: Shard = WHOLE) -> Params:
    """A checkpoint's parameters for training: float32, with quantized matrices dequantized."""
    params, config = load(model, dtype="float32", shard=shard)
    return dequantize(params, config)


def model_sums(plan: Plan) -> dict[str, Any]:
    """The sums of the files of a model that only a part of is trained, by their names. Empty if all is trained.

    Raises:
        InputError: if a file can't be read.
    """
    if not plan.trains_part or plan.model is None:
        return {}
    folder = Path(plan.model)
    try:
        return {file.name: file_sum(file) for file in sorted([folder / "config.json", *folder.glob("*.safetensors")])}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} can't be read ({getattr(error, 'strerror', None) or error}): the run needs the model that it was"
            " started from, as it was."
        ) from None


def _adapters(model: Path, adapters: Adapters, dtype: Dtype, key: mx.array) -> tuple[Params, Params]:
    """Fresh adapters, and the model as it is."""
    params, config = load(model, dtype=dtype)
    return partition(add_adapters(params, config, adapters, key), config, is_adapter)


def _parts(model: Path, parts: tuple[Part, ...], dtype: Dtype) -> tuple[Params, Params]:
    """These parts in float32, dequantized, and the others as they are."""

    def is_trained(path: str) -> bool:
        return part_of(path) in parts

    exact, config = load(model, dtype="float32", lazy=True)
    exact = dequantize(exact, config, tuple(kind for kind in KINDS if kind in parts))
    trained, _ = partition(exact, config, is_trained)
    del exact
    params, config = load(model, dtype=dtype)
    return trained, partition(params, config, is_trained)[1]
