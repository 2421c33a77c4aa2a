"""The chosen experts' outputs for each token, weighted and summed.

Rows of work are sorted and cut into segments (`dbrx_fn.ops.dispatch`), multiplied by their experts' matrices, put back
in order, weighted and summed. NVIDIA GPUs have kernels for this.
"""

from typing import TypedDict, cast

import mlx.core as mx
from jaxtyping import Float, Integer

from dbrx_fn.ops.activations import ACTIVATIONS
from dbrx_fn.ops.dispatch import Dispatch, dispatch, segment_rows
from dbrx_fn.ops.formats import Linear, format_of, is_adapted
from dbrx_fn.ops.kernels import experts as kernels
from dbrx_fn.ops.kernels.cpu import experts as cpu_kernel
from dbrx_fn.ops.linear import expert_linear
from dbrx_fn.ops.twin import with_kernel
from dbrx_fn.runtime.bounded import within
from dbrx_fn.runtime.compile import compiled, typed


class ExpertsParams(TypedDict):
    """All experts' matrices.

    `w1`, `v1`: gate and up, `[expert ffn_hidden d_model]`.
    `w2`: down, `[expert d_model ffn_hidden]`.
    """

    w1: Linear
    v1: Linear
    w2: Linear


def _kernels(
    params: ExpertsParams,
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    *,
    activation: str,
    cached: bool = False,
) -> mx.array:
    return kernels.mix_experts(params, x, expert_weights, top_experts)


def _have_kernels(
    params: ExpertsParams,
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    *,
    activation: str,
    cached: bool = False,
) -> bool:
    tokens, top_k = top_experts.shape
    fits = kernels.fits(params, x.dtype, activation=activation, top_k=top_k, tokens=tokens)
    return _pay(params, cached) and fits and expert_weights.dtype == x.dtype


def _pay(params: ExpertsParams, cached: bool) -> bool:
    """Whether kernels pay. Under a gradient a kernel's stock operations run as well, so training (dense weights, no
    cache) takes only those."""
    return cached or "scales" in params["w1"]


def _cpu_kernel(
    params: ExpertsParams,
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    *,
    activation: str,
    cached: bool = False,
) -> mx.array:
    return cpu_kernel.mix_experts(params, x, expert_weights, top_experts, activation=activation)


def _has_cpu_kernel(
    params: ExpertsParams,
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    *,
    activation: str,
    cached: bool = False,
) -> bool:
    fits = cpu_kernel.fits(params, x, expert_weights, top_experts, activation=activation)
    return fits and _pay(params, cached)


@compiled
@with_kernel(_cpu_kernel, fits=_has_cpu_kernel, gradients=False)
@with_kernel(_kernels, fits=_have_kernels)
def mix_experts(
    params: ExpertsParams,
    x: Float[mx.array, "tokens d_model"],
    expert_weights: Float[mx.array, "tokens top_k"],
    top_experts: Integer[mx.array, "tokens top_k"],
    *,
    activation: str,
    cached: bool = False,
) -> Float[mx.array, "tokens d_model"]:
    """`sum_k expert_weights[t, k] * w2_e(activation(w1_e x[t]) * v1_e x[t])`, with `e = top_experts[t, k]`.

    Args:
        params: the experts' matrices.
        x: normalized activations.
        expert_weights: the weight of each choice.
        top_experts: the chosen experts. Each must exist; one may occur twice.
        activation: name of the gate's activation.
        cached: whether there is a cache. Then no gradients of dense weights are expected, so kernels may be used
            for them too.
    """
    w1 = params["w1"]
    experts = w1["weight"].shape[0]
    form = format_of(w1, x.shape[-1]) if "scales" in w1 else None
    # The CPU's kernel takes each expert's rows together, without padding.
    alone = cached and cpu_kernel.can_read(params, x)
    rows = 1 if alone else segment_rows(top_experts.size, experts, w1["weight"].dtype, form)
    plan = dispatch(top_experts, experts=experts, rows=rows)
    w1, v1, w2 = (_of_slots(matrices, plan) for matrices in (w1, params["v1"], params["w2"]))
    segments = gather_segments(x, plan)
    gate = ACTIVATIONS[activation](expert_linear(w1, segments, plan.segment_experts, cached=cached))
    up = expert_linear(v1, segments, plan.segment_experts, cached=cached)
    # Weighted before the product, since w2 is linear. The gradients then don't need the product computed again.
    hidden = gate * up * gather_weights(expert_weights, plan)
    return combine(expert_linear(w2, hidden, plan.segment_experts, cached=cached), plan)


def mix_any_experts(
    params: ExpertsParams,
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    *,
    activation: str,
    cached: bool = False,
) -> mx.array:
    """`mix_experts` for any choice of experts. A token becomes NaN if one of its experts doesn't exist."""
    chosen, known = within(top_experts, params["w1"]["weight"].shape[0])
    expert_weights = mx.where(known, expert_weights, mx.nan)
    return mix_experts(params, x, expert_weights, chosen, activation=activation, cached=cached)


@typed
def gather_segments(x: Float[mx.array, "tokens d_model"], plan: Dispatch) -> Float[mx.array, "segments rows d_model"]:
    """The rows of each segment. Padding is zeros, which can't overflow and spoil a gradient."""
    return cast(mx.array, _to_slots(x, plan.slot_pairs, plan.pair_slots))


def _of_slots(matrices: Linear, plan: Dispatch) -> Linear:
    """The matrices, with their adapters' scales for each slot instead of each row of the batch, if rows differ."""
    if not is_adapted(matrices) or matrices["lora_scale"].ndim == 0:
        return matrices
    scale, tokens = matrices["lora_scale"], plan.pair_slots.shape[0]
    of_tokens = mx.repeat(scale, tokens // scale.shape[0], axis=0)
    return {**matrices, "lora_scale": gather_segments(of_tokens, plan)}


@typed
def gather_weights(
    expert_weights: Float[mx.array, "tokens top_k"], plan: Dispatch
) -> Float[mx.array, "segments rows 1"]:
    """The weight of each slot's pair. Padding has weight 0."""
    return cast(mx.array, _to_slots(expert_weights.reshape(-1, 1), plan.slot_pairs, plan.pair_slots.reshape(-1, 1)))


@typed
def combine(down: Float[mx.array, "segments rows d_model"], plan: Dispatch) -> Float[mx.array, "tokens d_model"]:
    """Takes each pair's row out of its segment, and returns each token's sum."""
    return cast(mx.array, _from_slots(down, plan.slot_pairs, plan.pair_slots))


# MLX's gradient of a gather is a scatter-add, whose writers collide. Each row knows its slots and each slot its row, so
# both gradients can be gathers instead. They are faster, and their sums have a fixed order (`docs/architecture.md`).
# Each of the two functions is the other's gradient.


@mx.custom_function
def _to_slots(x: mx.array, slot_pairs: mx.array, pair_slots: mx.array) -> mx.array:
    """Row n of `x` `[rows inner]` in each slot of `pair_slots[n]`, and zeros in padding."""
    copies = pair_slots.shape[1]
    return _rows_or_zeros(x, slot_pairs if copies == 1 else slot_pairs // copies)


@mx.custom_function
def _from_slots(y: mx.array, slot_pairs: mx.array, pair_slots: mx.array) -> mx.array:
    """In row n the sum of the slots `pair_slots[n]` of `y` `[segments rows inner]`."""
    return y.reshape(-1, y.shape[-1])[pair_slots].sum(axis=1)


@_to_slots.vjp
def _to_slots_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, slot_pairs, pair_slots = primals
    of_rows = cast(mx.array, _from_slots(cotangent, slot_pairs, pair_slots))
    return of_rows, mx.zeros_like(slot_pairs), mx.zeros_like(pair_slots)


@_from_slots.vjp
def _from_slots_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, slot_pairs, pair_slots = primals
    of_slots = cast(mx.array, _to_slots(cotangent, slot_pairs, pair_slots))
    return of_slots, mx.zeros_like(slot_pairs), mx.zeros_like(pair_slots)


def _rows_or_zeros(x: mx.array, slot_rows: mx.array) -> mx.array:
    """`x[slot_rows]`, with zeros for the index one past the last row. Segments of one row have no padding."""
    if slot_rows.shape[1] > 1:
        x = mx.concatenate([x, mx.zeros((1, x.shape[1]), x.dtype)])
    return x[slot_rows]
