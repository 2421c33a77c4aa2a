"""Compares results with the reference: the largest error, and its place."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike

from dbrx_fn.model.config import Dtype

LIMITS: dict[Dtype, float] = {"float32": 5e-6, "bfloat16": 2**-5, "float16": 2**-8}
"""Limits for logits and intermediate results: float32's is that of `docs/exactness.md`, the others are 8 roundings."""
GRADIENT_LIMIT = 1e-5
"""The limit for gradients in float32."""


@dataclass(frozen=True)
class Comparison:
    """The largest difference, divided by the largest expected number. NaN if a number isn't finite.

    `place`: the index of the largest difference.
    `found`, `expected`: the numbers at that place.
    """

    error: float
    place: tuple[int, ...]
    found: float
    expected: float


def compare(found: mx.array, expected: ArrayLike) -> Comparison:
    """Compares arrays of one shape.

    Raises:
        ValueError: if the shapes differ.
    """
    right = np.asarray(expected, dtype=np.float64)
    # NumPy has no bfloat16.
    made = np.array(found.astype(mx.float32), dtype=np.float64)
    if made.shape != right.shape:
        raise ValueError(f"the result is {list(made.shape)} where {list(right.shape)} is expected")
    difference = np.abs(made - right)
    place = np.unravel_index(int(np.argmax(difference)), right.shape)
    error = float(difference[place] / np.abs(right).max())
    return Comparison(error, tuple(map(int, place)), float(made[place]), float(right[place]))


def compare_tokens(found: list[int], expected: ArrayLike) -> Comparison:
    """Compares tokens one by one: the error is 0 or 1."""
    right = np.asarray(expected).tolist()
    place = next((n for n, pair in enumerate(zip(found, right, strict=False)) if pair[0] != pair[1]), 0)
    return Comparison(float(found != right), (place,), found[place], right[place])
