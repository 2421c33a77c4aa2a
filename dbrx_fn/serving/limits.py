"""How much of a machine an engine may use: rows, and positions of caches."""

from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.costs import cache_bytes
from dbrx_fn.model.decode_step import MOST_ROWS, is_one_kernel
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import memory_size, on_cpu

_GPU_CHUNK, _CPU_CHUNK = 256, 128
"""A GPU reads all weights for each chunk, so it wants long ones; a CPU computes in proportion to the tokens."""


FREE_CHUNKS = 8
"""How many chunks of a prompt are prefilled at once while no row decodes. The exact mode reads one at a time."""

_USED = 0.905
"""The share of memory for weights and caches. The rest is for activations of a chunk (`docs/serving.md`)."""


_MOST_STOCK_ROWS = 8
"""With 16 rows, the rounding of OpenBLAS's AVX2 kernels depends on a row's place. With 8 it doesn't."""


@dataclass(frozen=True)
class Limits:
    """What an engine may use.

    `rows`: requests that decode at once, at most.
    `positions`: cache positions that memory has room for, over all rows and all prompts in prefill.
    `capacity`: the longest text in tokens; in the exact mode every row has room for it.
    `exact`: one static batch of `rows` rows, under any load.
    `chunk`: prompt tokens that are prefilled between two decoding steps.
    """

    rows: int
    positions: int
    capacity: int
    exact: bool = False
    chunk: int = 512


def check_exact(limits: Limits, params: Params, config: Config) -> None:
    """Raises `InputError` if the exact mode can't keep its promise with so many rows.

    On a CPU, this package's kernel for single tokens gives a row the same bits beside any others.
    """
    if not limits.exact or not on_cpu():
        return
    most = MOST_ROWS if is_one_kernel(params, config) else _MOST_STOCK_ROWS
    if limits.rows > most:
        raise InputError(
            f"The exact mode makes at most {most} texts at once on this CPU and {limits.rows} are asked for: lower the"
            " number of rows."
        )


def default_limits(
    params: Params,
    config: Config,
    *,
    rows: int | None = None,
    capacity: int | None = None,
    exact: bool = False,
    reserved: int = 0,
) -> Limits:
    """Limits that suit this machine's memory.

    Args:
        params: the tree.
        config: the model's.
        rows: requests that decode at once; 32 if not given, 8 in the exact mode.
        capacity: the longest text in tokens; as much as the context and memory allow, if not given.
        exact: one static batch, for answers that don't depend on load.
        reserved: bytes to leave for other uses, such as a `PrefixStore`.

    Raises:
        InputError: if memory has no room for these limits.
    """
    rows = rows or (8 if exact else 32)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    weights = sum(leaf.nbytes for leaf in leaves.values())
    positions = max(0, int(_USED * memory_size()) - weights - reserved) // cache_bytes(config, 1)
    most = positions // (rows + 1) if exact else _largest_bucket(positions)
    wanted = min(config.max_seq_len, most) if capacity is None else capacity
    if not 1 <= wanted <= min(config.max_seq_len, most):
        raise InputError(
            f"A text of {max(wanted, 1)} tokens doesn't fit: memory has room for {most} a text, and the model's context"
            f" for {config.max_seq_len}. Lower the capacity or the number of rows, or quantize the model."
        )
    return Limits(rows, positions, wanted, exact, chunk=_CPU_CHUNK if on_cpu() else _GPU_CHUNK)


def _largest_bucket(positions: int) -> int:
    """The largest capacity bucket of at most `positions` positions; 0 if there is none."""
    largest = 0
    while (bucket := capacity_bucket(largest + 1)) <= positions:
        largest = bucket
    return largest
