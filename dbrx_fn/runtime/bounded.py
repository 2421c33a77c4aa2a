"""Bounds for indices from outside, since MLX reads and writes past an array's end without an error."""

import mlx.core as mx


def within(ids: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """The ids clipped to a table of `size` rows, int32, and which of them were within it, bool.

    Args:
        ids: integers of any dtype and shape.
        size: number of rows of the table, at least one.
    """
    # Ids of 64 bits would wrap around in int32, and a large size would in 8 bits.
    wide = ids if ids.dtype == mx.int32 else ids.astype(mx.int64)
    near = mx.clip(wide, 0, size - 1)
    return near.astype(mx.int32), near == wide
