"""The gradient of the whole loss, of every parameter, is what torch's autograd finds through transformers in float64.

transformers' own auxiliary loss is not this package's (`training/losses.py` says how they differ), so it is compared
twice:

- Of any depth, with this package's formula written in torch, on the `router_logits` that transformers returns with
  `output_router_logits`: one `[batch * time expert]` a layer, before the softmax.
- On one layer, where pooling layers changes nothing, with transformers' own `loss` as it comes. Its auxiliary loss is
  then `moe_top_k` times ours, so its weight is `moe_top_k` times smaller. It reads all tokens, so an attention mask
  hides each row's last, which ours doesn't read. It takes logarithms, and means over tokens, in float32.

An error is given twice: the length of a leaf's difference as a part of the leaf's length, and its largest entry as a
part of the leaf's largest.
"""

from collections.abc import Callable
from itertools import count, islice
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from transformers import DbrxForCausalLM

from dbrx_fn.model.transformer import score
from dbrx_fn.training.losses import LossParts, loss
from tests.peers.reference import in_float64, transformers_model
from tests.support.checkpoints import random_config
from tests.support.trees import Case, case_of, random_case, tree

Measured = Callable[[str, float], float]

# Of seed 0 an entry of q lies 2e-8 from the clip, where rounding decides whether it has a gradient.
SEEDS = range(1, 15)
ONE_LAYER_SEEDS = list(
    islice((seed for seed in count(1) if random_config(np.random.default_rng(seed))["n_layers"] == 1), 6)
)
DBRX_FFN = {"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1}
Z_LOSS_WEIGHT = 0.001
BAR = 1e-5
NOTHING = 1e-7
"""A leaf whose gradient is zero but for rounding has no relative error: the part of the tree's largest entry that its
entries must stay below."""

Grads = dict[str, NDArray[np.float64]]


class Batch(NamedTuple):
    """`tokens` and `mask` `[batch time]`, `lengths` `[batch]`."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]


def random_batch(case: Case, rng: np.random.Generator, lengths: list[int]) -> Batch:
    """Two thirds of the tokens are targets."""
    shape = (len(lengths), max(lengths))
    return Batch(
        rng.integers(case.config.vocab_size, size=shape), rng.random(shape) < 2 / 3, np.array(lengths, np.int32)
    )


class Ours(NamedTuple):
    """`top_experts` uint32 `[layer batch time-1 top_k]`, in any order."""

    loss: float
    parts: LossParts
    top_experts: mx.array
    grads: Grads


def our_loss(case: Case, batch: Batch, z_loss_weight: float) -> Ours:
    tokens, mask, lengths = mx.array(batch.tokens.astype(np.int32)), mx.array(batch.mask), mx.array(batch.lengths)

    def objective(params: Any) -> tuple[mx.array, LossParts, mx.array]:
        value, parts = loss(params, tokens, mask, case.config, lengths=lengths, z_loss_weight=z_loss_weight)
        # Nothing is compiled under mx.grad alone, which saves a kernel for each constant of each config.
        _, routing = score(params, tokens[:, :-1], case.config)
        return value, parts, routing.top_experts

    (value, parts, top_experts), grads = mx.value_and_grad(objective)(case.params)
    return Ours(float(value), parts, top_experts, leaves(grads))


def leaves(grads: Any) -> Grads:
    return {path: np.array(array, np.float64) for path, array in dict(tree_flatten(grads)).items()}


def their_grads(case: Case, model: DbrxForCausalLM, value: torch.Tensor) -> Grads:
    value.backward()
    parameters: Any = model.named_parameters()
    return leaves(tree(case.config, {name: parameter.grad.numpy() for name, parameter in parameters}))


def our_formula(
    case: Case, batch: Batch, out: Any, z_loss_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its parts, float64, of all tokens but each row's last."""
    ffn = case.config.ffn
    targets, mask = torch.from_numpy(batch.tokens[:, 1:]), torch.from_numpy(batch.mask[:, 1:])
    nats = -out.logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    balance, z = [], []
    for logits in out.router_logits:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(ffn.moe_top_k).indices
        share = torch.bincount(chosen.flatten(), minlength=ffn.moe_num_experts).double() / chosen.numel()
        balance.append(ffn.moe_num_experts * (share * probabilities.mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
    parts = {
        "cross_entropy": nats[mask].mean(),
        "load_balance": torch.stack(balance).mean(),
        "router_z": torch.stack(z).mean(),
    }
    total = parts["cross_entropy"] + ffn.moe_loss_weight * parts["load_balance"] + z_loss_weight * parts["router_z"]
    return total, parts


def assert_same_experts(ours: mx.array, out: Any) -> None:
    """No choice was so close that rounding turned it, which would make every comparison meaningless."""
    for chosen, logits in zip(np.array(ours), out.router_logits, strict=True):
        theirs = logits.topk(chosen.shape[-1]).indices.sort(-1).values
        np.testing.assert_array_equal(np.sort(chosen.reshape(theirs.shape)), theirs.numpy())


def compare(ours: Grads, theirs: Grads, measured: Measured, name: str) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(np.abs(leaf).max()) for leaf in theirs.values())
    for path, expected in theirs.items():
        error = ours[path] - expected
        if np.abs(expected).max() < 1e-12 * largest:
            assert np.abs(error).max() < NOTHING * largest, path
            continue
        length = measured(f"{name}, length", float(np.linalg.norm(error) / np.linalg.norm(expected)))
        entry = measured(f"{name}, largest entry", float(np.abs(error).max() / np.abs(expected).max()))
        assert length <= BAR, path
        assert entry <= BAR, path


@pytest.mark.parametrize(
    ("seed", "ffn"), [*((seed, {}) for seed in SEEDS), (1, DBRX_FFN)], ids=[*map(str, SEEDS), "DBRX's experts"]
)
def test_gradients_of_our_formula(seed: int, ffn: dict[str, Any], measured: Measured) -> None:
    case, rng = random_case(seed, **ffn)
    batch = random_batch(case, rng, [21, 21])
    model = in_float64(transformers_model(case.raw, case.tensors, "float64"))
    call: Any = model
    out = call(torch.from_numpy(batch.tokens[:, :-1]), use_cache=False, output_router_logits=True)
    shape = (batch.tokens[:, :-1].size, case.config.ffn.moe_num_experts)
    assert [logits.shape for logits in out.router_logits] == [shape] * case.config.n_layers

    ours = our_loss(case, batch, Z_LOSS_WEIGHT)
    assert_same_experts(ours.top_experts, out)
    expected, expected_parts = our_formula(case, batch, out, Z_LOSS_WEIGHT)
    assert measured("loss to transformers", abs(ours.loss / expected.item() - 1)) <= 1e-6
    for name, part in expected_parts.items():
        assert measured(f"{name} to transformers", abs(float(getattr(ours.parts, name)) / part.item() - 1)) <= 1e-6
    compare(ours.grads, their_grads(case, model, expected), measured, "gradients to transformers, our formula")


@pytest.mark.parametrize("seed", ONE_LAYER_SEEDS)
def test_gradients_of_transformers_own_loss(seed: int, measured: Measured) -> None:
    """With padding, and with an auxiliary loss that weighs as much as cross-entropy does."""
    rng = np.random.default_rng(seed)
    raw = random_config(rng)
    assert raw["n_layers"] == 1
    raw["ffn_config"]["moe_loss_weight"] = 1.0
    case = case_of(raw, rng)
    batch = random_batch(case, rng, [21, 13])
    top_k = case.config.ffn.moe_top_k
    scaled = {**raw, "ffn_config": {**raw["ffn_config"], "moe_loss_weight": 1.0 / top_k}}
    model = in_float64(transformers_model(scaled, case.tensors, "float64"))
    call: Any = model
    position, lengths = np.arange(batch.tokens.shape[1]), batch.lengths[:, None]
    out = call(
        torch.from_numpy(batch.tokens),
        attention_mask=torch.from_numpy((position < lengths - 1).astype(np.int64)),
        labels=torch.from_numpy(np.where(batch.mask & (position < lengths), batch.tokens, -100)),
        use_cache=False,
        output_router_logits=True,
    )
    ours = our_loss(case, batch, 0.0)
    assert measured("loss to transformers' own", abs(ours.loss / out.loss.item() - 1)) <= 1e-6
    theirs = out.aux_loss.item() / top_k
    assert measured("load_balance to transformers' own", abs(float(ours.parts.load_balance) / theirs - 1)) <= 1e-6
    compare(ours.grads, their_grads(case, model, out.loss), measured, "gradients to transformers, its own loss")
