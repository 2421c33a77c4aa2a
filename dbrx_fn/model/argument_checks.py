"""Checks of arguments that annotations can't express: parameter trees and random keys."""

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError


def check_tree(params: object) -> None:
    """Raises `InputError` if `params` is not a tree of arrays. Whether they fit a config is up to `check_params`."""
    what = f"of type {type(params).__name__}"
    if isinstance(params, dict):
        leaves: dict[str, object] = dict(tree_flatten(params))
        others = [type(leaf).__name__ for leaf in leaves.values() if not isinstance(leaf, mx.array)]
        if params and not others:
            return
        what = f"a tree that holds a value of type {others[0]}" if others else "empty"
    raise InputError(
        f"params is {what} where a tree of arrays is expected: dbrx_fn.load gives params and config, in this order."
    )


def check_key(name: str, key: object) -> None:
    """Raises `InputError` if `key` is not a key for random numbers."""
    if not isinstance(key, mx.array) or (key.shape, key.dtype) != ((2,), mx.uint32):
        found = f"{key.dtype} {list(key.shape)}" if isinstance(key, mx.array) else f"of type {type(key).__name__}"
        raise InputError(f"{name} is {found.removeprefix('mlx.core.')} where a key is expected: mx.random.key(0).")
