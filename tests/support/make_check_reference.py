"""Makes what `python -m dbrx_fn.check` compares with, by the float64 oracle. A few seconds.

    python -m tests.support.make_check_reference

Run it after a change of what is checked, of the small model, or of the oracle.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dbrx_fn.checking.draws import leaves
from dbrx_fn.checking.models import DBRX_EXPERTS, MASK, QUANTIZED, RECIPE, SHAPES, TRAINED, Model
from dbrx_fn.checking.operands import MIXTURES, POSITIONS, THETA, Mixture, turned_heads
from dbrx_fn.checking.reference import FILE, MADE, PROMPT, kept
from dbrx_fn.checkpoints.config_file import config_to_dict, read_config
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.ops.formats import Format
from tests.support import oracle
from tests.support.dequantized import dequantized

Floats = NDArray[np.float64]
Parts = Mapping[str, NDArray[Any]]

CLOSEST = 0.04
"""A choice of experts is close where the last chosen and the first not chosen differ by less, in standard deviations of
the router's logits: bfloat16 could change it."""
_STEP = 1e-5
"""By which a weight is moved to see how the loss changes."""


def matrix(parts: Parts, form: Format | None) -> Floats:
    """A matrix's leaves in float64."""
    if form is None or "scales" not in parts:
        return parts["weight"].astype(np.float64)
    return dequantized(parts, form)


def by_matrix(arrays: Parts) -> dict[str, dict[str, NDArray[Any]]]:
    """Arrays by dotted path, as leaves by the paths of their matrices."""
    grouped: dict[str, dict[str, NDArray[Any]]] = {}
    for path, array in arrays.items():
        base, _, leaf = path.rpartition(".")
        grouped.setdefault(base, {})[leaf] = array
    return grouped


def fused(tree: Mapping[str, Floats]) -> dict[str, Floats]:
    """The tree's matrices by path, without ".weight", as the oracle's tensors."""
    tensors = {}
    for path, array in tree.items():
        if ".experts." in path:
            rows = array.swapaxes(1, 2) if path.endswith(".w2") else array
            tensors[path] = rows.reshape(-1, rows.shape[-1])
        else:
            tensors[f"{path}.weight"] = array
    return tensors


def tensors_of(model: Model) -> dict[str, Floats]:
    """A model's weights for the oracle."""
    parts = by_matrix(leaves(model.config, model.formats, model.seed))
    return fused({path: matrix(leaf, model.form) for path, leaf in parts.items()})


def closest_choice(scores: oracle.Scores, top_k: int) -> float:
    """The least difference between a chosen and a refused expert, in standard deviations of the router's logits."""
    logits = np.sort(scores.router_logits, axis=-1)
    if top_k == logits.shape[-1]:
        return math.inf
    gaps = logits[..., -top_k] - logits[..., -top_k - 1]
    return float((gaps / logits.std(axis=-1)).min())


def of_model(model: Model, closest: float = CLOSEST) -> dict[str, NDArray[Any]]:
    """Logits of each of its rows."""
    raw, tensors = config_to_dict(model.config), tensors_of(model)
    made = {}
    for row, tokens in enumerate(model.rows):
        scores = oracle.score(raw, tensors, tokens)
        gap = closest_choice(scores, model.config.ffn.moe_top_k)
        if gap < closest:
            raise ValueError(
                f"{model.name}: a choice of experts is close ({gap:.4f}): take another seed than {model.seed}"
            )
        made[f"{model.name}/{row}"] = scores.logits[:, kept(model.config.vocab_size)]
    return made


def of_small_model() -> dict[str, NDArray[Any]]:
    """Logits of a prompt, and the tokens that greedy generation makes after it."""
    config = read_config(SMALL)
    stored = by_matrix(load_file(SMALL / "model.safetensors"))
    split = {path: matrix(parts, Format(8, 64)) for path, parts in stored.items()}
    tree = {path: array for path, array in split.items() if ".experts." not in path}
    for block in range(config.n_layers):
        for name in ("w1", "v1", "w2"):
            experts = f"transformer.blocks.{block}.ffn.experts"
            each = [split[f"{experts}.{e}.{name}"] for e in range(config.ffn.moe_num_experts)]
            tree[f"{experts}.mlp.{name}"] = np.stack(each)
    raw, tensors = config_to_dict(config), fused(tree)
    made = oracle.greedy(raw, tensors, PROMPT, MADE)
    logits = oracle.forward(raw, tensors, [*PROMPT, *made])
    after = np.sort(logits[len(PROMPT) - 1 : -1], axis=-1)
    if (after[:, -1] - after[:, -2]).min() < 1e-3:
        raise ValueError("The small model's choice of a token is close: take another prompt.")
    return {"small/logits": logits[:, kept(config.vocab_size)], "small/made": np.array(made)}


def of_mixture(mixture: Mixture) -> dict[str, NDArray[Any]]:
    """Some of what the experts say of each token."""
    w1, v1, w2 = (matrix(parts, mixture.form) for parts in mixture.matrices().values())
    x, expert_weights, experts = mixture.inputs()
    return {mixture.name: oracle.moe(x, expert_weights, experts, w1, v1, w2).reshape(-1)[:: mixture.step]}


def of_positions() -> dict[str, NDArray[Any]]:
    """Heads turned to their positions."""
    heads = turned_heads().astype(np.float64)
    return {"positions": np.stack([oracle.turned(x, t, THETA) for x, t in zip(heads, POSITIONS, strict=True)])}


def of_training() -> dict[str, NDArray[Any]]:
    """The loss, its gradients by central differences, and the weights after AdamW's first step."""
    config = TRAINED.config
    raw = config_to_dict(config)
    tree = {
        path.removesuffix(".weight"): array.astype(np.float64)
        for path, array in leaves(config, {}, TRAINED.seed).items()
    }

    def loss() -> float:
        parts = oracle.loss(raw, fused(tree), TRAINED.rows, MASK)
        return parts.total(config.ffn.moe_loss_weight, RECIPE.z_loss_weight)

    gradients = {path: _gradient(array, loss) for path, array in tree.items()}
    made: dict[str, NDArray[Any]] = {"trained/loss": np.array([loss()])}
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    assert RECIPE.clip_norm is not None
    for path, gradient in gradients.items():
        made[f"trained/gradient/{path}.weight"] = gradient
        clipped = gradient * min(1.0, RECIPE.clip_norm / norm)
        # With bias correction, the first step's moments are the gradient and its square.
        decay = RECIPE.weight_decay * (tree[path].ndim > 1)
        moved = clipped / (np.abs(clipped) + RECIPE.eps) + decay * tree[path]
        made[f"trained/after/{path}.weight"] = tree[path] - RECIPE.learning_rate * moved
    return made


def _gradient(array: Floats, loss: Callable[[], float]) -> Floats:
    """How `loss` changes with each entry of `array`, which is moved and put back."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        before = array[index]
        array[index] = before + _STEP
        above = loss()
        array[index] = before - _STEP
        gradient[index] = (above - loss()) / (2 * _STEP)
        array[index] = before
    return gradient


def reference() -> dict[str, NDArray[Any]]:
    """All that is compared with: float32, but for tokens."""
    made = of_small_model() | of_positions() | of_training()
    for model in (*SHAPES, *QUANTIZED):
        made |= of_model(model)
    made |= of_model(DBRX_EXPERTS, closest=1e-4)
    for mixture in MIXTURES:
        made |= of_mixture(mixture)
    return {name: array.astype(np.int32 if array.dtype.kind == "i" else np.float32) for name, array in made.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, allow_pickle=False, **reference())
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
