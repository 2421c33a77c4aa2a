"""Matrices of every kind that the CPU's kernels read, and the same in float64."""

import mlx.core as mx
import numpy as np

from dbrx_fn.ops.formats import LEAVES, Format, Linear, dequantize_matrix, quantize_matrix

Kind = Format | mx.Dtype

AFFINE = [Format(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
KINDS: list[Kind] = [mx.float32, mx.bfloat16, mx.float16, *AFFINE, Format(4, 32, "mxfp4")]


def matrix(kind: Kind, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> Linear:
    """Random numbers `[... outer inner]`. `dtype` is that of a quantized matrix's scales."""
    weight = mx.random.normal(shape, key=mx.random.key(shape[-2]))
    if isinstance(kind, mx.Dtype):
        return {"weight": weight.astype(kind)}
    made: Linear = dict(zip(LEAVES, quantize_matrix(weight.astype(dtype), kind), strict=False))  # type: ignore[assignment]
    return made


def in_float64(given: Linear, kind: Kind) -> np.ndarray:
    """The numbers that a matrix stands for."""
    if isinstance(kind, mx.Dtype):
        return np.array(given["weight"].astype(mx.float32)).astype(np.float64)
    parts = [given["weight"], given["scales"], *([given["biases"]] if "biases" in given else [])]
    if "biases" in given:
        parts[1:] = [part.astype(mx.float32) for part in parts[1:]]
    return np.array(dequantize_matrix(parts, kind, mx.float32)).astype(np.float64)
