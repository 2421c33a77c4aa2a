"""Sums and gathers over the processes that share a model (`mlx.distributed`). One process alone computes nothing here.

All processes must make the same calls in the same order. Every process gets the same bits.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

_BUCKET = 64 * 2**20
"""Bytes of arrays that are summed at once."""


def all_sum(x: mx.array, processes: int) -> mx.array:
    """The sum of all processes' `x`. Its gradient is the cotangent, since every process has the same one."""
    return x if processes == 1 else mx.distributed.all_sum(x)


def all_sum_many(arrays: Sequence[mx.array], processes: int) -> list[mx.array]:
    """`all_sum` of each array. Arrays of one dtype travel together in large buckets, since each sum costs a start."""
    if processes == 1:
        return list(arrays)
    sums = dict[int, mx.array]()
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        bucket: list[int] = []
        for place, array in enumerate(arrays):
            if array.dtype != dtype:
                continue
            bucket.append(place)
            if sum(arrays[one].nbytes for one in bucket) >= _BUCKET:
                sums |= _summed(arrays, bucket, processes)
                bucket = []
        sums |= _summed(arrays, bucket, processes)
    return [sums[place] for place in range(len(arrays))]


def _summed(arrays: Sequence[mx.array], bucket: Sequence[int], processes: int) -> dict[int, mx.array]:
    if not bucket:
        return {}
    ends = list(itertools.accumulate(arrays[place].size for place in bucket))
    together = mx.concatenate([arrays[place].reshape(-1) for place in bucket])
    parts = mx.split(all_sum(together, processes), ends[:-1])
    return {place: part.reshape(arrays[place].shape) for place, part in zip(bucket, parts, strict=True)}


def all_gather_parts(x: mx.array, processes: int) -> list[mx.array]:
    """Every process's `x`, in the order of their ranks."""
    return [x] if processes == 1 else list(mx.distributed.all_gather(x[None]))


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
