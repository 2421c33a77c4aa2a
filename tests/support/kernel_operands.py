"""Operands for tests of the kernels: matrices as the loader would have them, and the same exactly."""

from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.ops.formats import LEAVES, Format, Linear, dequantize_matrix, format_of, quantize_matrix
from tests.support.trees import as_float64


def normal(seed: int, *shape: int, scale: float = 1.0) -> mx.array:
    """bfloat16 normal numbers."""
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(mx.bfloat16)


def matrix(form: Format | None, seed: int, *shape: int, scale: float = 0.1) -> Linear:
    """A linear `[... outer inner]` of normal numbers, quantized if a format is given."""
    weight = normal(seed, *shape, scale=scale)
    if form is None:
        return {"weight": weight}
    return cast(Linear, dict(zip(LEAVES, quantize_matrix(weight, form), strict=False)))


def dense(params: Linear, inner: int) -> NDArray[np.float64]:
    """What a linear's matrix is, in float64."""
    if "scales" not in params:
        return as_float64(params["weight"])
    leaves = [params["weight"], params["scales"], *([params["biases"]] if "biases" in params else [])]
    exact = [leaf.astype(mx.float32) if leaf.dtype == mx.bfloat16 else leaf for leaf in leaves]
    return as_float64(dequantize_matrix(exact, format_of(params, inner), mx.float32))


def error(actual: mx.array, expected: NDArray[np.float64]) -> float:
    """The norm of the difference, as a part of that of what is expected."""
    return float(np.linalg.norm(as_float64(actual) - expected) / np.linalg.norm(expected))
