"""Random checkpoints as what `forward` takes, made without the loader: a config, a tree, tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import ArrayLike, NDArray

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import nest, param_spec
from dbrx_fn.model.tree import Params
from tests.support import checkpoints, oracle


@dataclass(frozen=True, eq=False)
class Case:
    """One random model: `raw` and `tensors` are for the oracle and for peers, `config` and `params` for `forward`."""

    raw: dict[str, Any]
    tensors: checkpoints.Tensors
    config: Config
    params: Params

    def expected(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """The oracle's logits `[time vocab]` of tokens `[time]`."""
        return oracle.forward(self.raw, self.tensors, tokens)


def tree(config: Config, tensors: Mapping[str, NDArray[Any]]) -> Params:
    """Tensors of a Hugging Face fused checkpoint as the tree for `config`."""
    ffn = config.ffn
    arrays: dict[str, mx.array] = {}
    for path in param_spec(config):
        if ".experts." not in path:
            arrays[path] = mx.array(tensors[path])
            continue
        stacked = tensors[path.removesuffix(".weight")].reshape(ffn.moe_num_experts, ffn.ffn_hidden_size, -1)
        arrays[path] = mx.array(stacked.swapaxes(1, 2) if ".w2." in path else stacked)
    return nest({path: array.astype(getattr(mx, config.dtype)) for path, array in arrays.items()}, config)


def tensors_of(params: Params) -> checkpoints.Tensors:
    """The tensors, float32, of which `tree` makes the dense tree `params`."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    tensors = {path: np.array(leaf.astype(mx.float32)) for path, leaf in leaves.items()}
    for path in [path for path in tensors if ".experts." in path]:
        stacked = tensors.pop(path)
        stacked = stacked.swapaxes(1, 2) if ".w2." in path else stacked
        tensors[path.removesuffix(".weight")] = stacked.reshape(-1, stacked.shape[-1])
    return tensors


def case_of(raw: dict[str, Any], rng: np.random.Generator, dtype: Dtype = "float32") -> Case:
    """A random model with the config `raw`; `tensors` are those values that are left when rounded to `dtype`."""
    config = replace(config_from_dict(raw), dtype=dtype)
    tensors = checkpoints.random_tensors(raw, rng)
    if dtype != "float32":
        tensors = checkpoints.rounded(tensors, dtype)
    return Case(raw, tensors, config, tree(config, tensors))


def random_case(seed: int, dtype: Dtype = "float32", **ffn: Any) -> tuple[Case, np.random.Generator]:
    """A random config and model; `ffn` replaces fields of its `ffn_config`. The generator draws what else is needed."""
    rng = np.random.default_rng(seed)
    raw = checkpoints.random_config(rng)
    raw["ffn_config"] |= ffn
    return case_of(raw, rng, dtype), rng


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """The largest difference, as a part of the largest expected value."""
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.abs(as_float64(actual) - expected).max() / np.abs(expected).max())


def as_float64(array: Any) -> NDArray[np.float64]:
    """An array of any float dtype; NumPy knows no bfloat16."""
    return np.asarray(array.astype(mx.float32) if isinstance(array, mx.array) else array, dtype=np.float64)
