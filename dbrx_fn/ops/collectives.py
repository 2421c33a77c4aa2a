"""Sums and gathers over the processes that share a model (`mlx.distributed`). One process alone computes nothing here.

All processes must make the same calls in the same order. Every process gets the same bits.
"""

from typing import cast

import mlx.core as mx


def all_sum(x: mx.array, processes: int) -> mx.array:
    """The sum of all processes' `x`. Its gradient is the cotangent, since every process has the same one."""
    return x if processes == 1 else mx.distributed.all_sum(x)


def all_gather_last(x: mx.array, processes: int) -> mx.array:
    """All processes' `x` `[... n]`, one behind the other along the last axis: `[... processes * n]`."""
    if processes == 1:
        return x
    gathered = mx.distributed.all_gather(x[None])
    return mx.moveaxis(gathered, 0, -2).reshape(*x.shape[:-1], -1)


def sum_gradients(x: mx.array, processes: int) -> mx.array:
    """`x` itself, with its gradient summed over the processes.

    It stands where every process has the same `x` and computes only its part from it.
    """
    return x if processes == 1 else cast(mx.array, _sum_gradients(x))


@mx.custom_function
def _sum_gradients(x: mx.array) -> mx.array:
    return x


@_sum_gradients.vjp
def _sum_gradients_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.distributed.all_sum(cotangent)
