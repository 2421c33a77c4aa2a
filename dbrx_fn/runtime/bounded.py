"""Indices that somebody gave, kept inside of what they point into: MLX reads and writes past an array's end unasked."""

import mlx.core as mx


def within(ids: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """The nearest ids of a table of `size` rows, int32, and where those are the given ones, bool.

    Args:
        ids: integers of any dtype and shape.
        size: rows of the table, at least one.
    """
    # In fewer bits 5 billion would be an id of the table, and in 8 bits the size is none.
    wide = ids if ids.dtype == mx.int32 else ids.astype(mx.int64)
    near = mx.clip(wide, 0, size - 1)
    return near.astype(mx.int32), near == wide
