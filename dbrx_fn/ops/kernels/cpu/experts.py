"""`dbrx_fn.ops.experts.mix_experts` on a CPU, as one kernel that takes each expert's own rows, without padding."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx

from dbrx_fn.ops.formats import LEAVES, Linear, is_adapted
from dbrx_fn.ops.kernels.cpu.library import Output, Twin, has_kernels, launch
from dbrx_fn.ops.kernels.cpu.matrix import leaves, matrix_numbers

_MATRICES = ("w1", "v1", "w2")


def fits(
    params: Mapping[str, Any], x: mx.array, expert_weights: mx.array, top_experts: mx.array, *, activation: str
) -> bool:
    """Whether the kernel takes these experts."""
    if activation not in ("silu", "swish") or expert_weights.dtype != mx.float32:
        return False
    if any(map(is_adapted, params.values())):
        return False
    return can_read(params, x)


def can_read(params: Mapping[str, Any], x: mx.array) -> bool:
    """Whether kernels for the CPU can multiply these experts' matrices."""
    readable = all(numbers is not None for numbers in _numbers(params, x.shape[-1]))
    return has_kernels() and x.dtype == mx.float32 and readable


def mix_experts(
    params: Mapping[str, Any], x: mx.array, expert_weights: mx.array, top_experts: mx.array, *, activation: str
) -> mx.array:
    """The experts' outputs for each token, for arguments that `fits` accepts."""
    matrices = [params[name] for name in _MATRICES]
    numbers = [number for one in _numbers(params, x.shape[-1]) for number in one or ()]
    names = tuple(tuple(name for name in LEAVES if name in matrix) for matrix in matrices)
    return launch(
        "mix_experts",
        [*(leaf for matrix in matrices for leaf in leaves(matrix)), x, expert_weights, top_experts.astype(mx.int32)],
        [Output(x.shape, mx.float32)],
        numbers=[*numbers, *top_experts.shape, params["w1"]["weight"].shape[0]],
        twin=Twin(_stock, (activation, *names)),
    )[0]


def _numbers(params: Mapping[str, Any], d_model: int) -> list[tuple[int, ...] | None]:
    hidden = params["w1"]["weight"].shape[-2]
    inner = {"w1": d_model, "v1": d_model, "w2": hidden}
    return [matrix_numbers(params[name], inner[name]) for name in _MATRICES]


def _stock(inputs: Sequence[mx.array], activation: str, *names: tuple[str, ...]) -> list[mx.array]:
    # Within a twin no kernel fits, so these are the stock operations.
    from dbrx_fn.ops import experts as operations

    rest = list(inputs)
    params = {}
    for matrix, held in zip(_MATRICES, names, strict=True):
        params[matrix] = cast(Linear, {name: rest.pop(0) for name in held})
    x, expert_weights, top_experts = rest
    return [
        operations.mix_experts(
            cast(operations.ExpertsParams, params), x, expert_weights, top_experts, activation=activation
        )
    ]
