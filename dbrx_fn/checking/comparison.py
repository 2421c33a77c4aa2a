"""How far what was computed is from what is right, and where."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike

from dbrx_fn.model.config import Dtype

LIMITS: dict[Dtype, float] = {"float32": 5e-6, "bfloat16": 2**-5, "float16": 2**-8}
"""For logits and what leads to them: float32's is that of `docs/exactness.md`, the others are eight roundings."""
GRADIENT_LIMIT = 1e-5
"""In float32."""


@dataclass(frozen=True)
class Comparison:
    """The largest difference as a part of the largest expected number; NaN where a number isn't finite.

    `place`: its index, where `found` was computed and `expected` is right.
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
    # NumPy knows no bfloat16.
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
