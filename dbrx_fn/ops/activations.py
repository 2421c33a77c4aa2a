"""Activation functions of the gate, by their names in transformers (`transformers.activations.ACT2FN`)."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from dbrx_fn.ops import cpu


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x)."""
    return cpu.sigmoid(x) if cpu.on_linux_cpu() else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), DBRX's activation. `mlx.nn.silu` is compiled, which on a CPU calls g++ on first use."""
    return x * sigmoid(x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": silu,
    "swish": silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "sigmoid": sigmoid,
    "tanh": mx.tanh,
    "mish": nn.mish,
}
