"""The lengths, capacities and attention spans that the model runs with. They are few, since each one costs a trace."""

from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import BlockParams, Params
from dbrx_fn.runtime.device import backend

CHUNK_SIZE = 2048
"""Default number of tokens per row that go through the model at once."""


def time_bucket(time: int, capacity: int) -> int:
    """The length that `time` tokens are padded to. Each length is one trace of the block.

    With a cache it is 1 or a power of two from 8 on, and at most the capacity. `chunk_widths` cuts prompts to lengths
    close to these. On CUDA, 2 to 7 tokens aren't padded either: each token reads more experts. Without a cache
    (capacity 0) a text can't be cut, so there are eight lengths per doubling.
    """
    if time == 1 or (capacity and time < 8 and backend() == "cuda"):
        return time
    bucket = _power_of_two(time)
    if capacity:
        return min(bucket, capacity)
    step = max(8, bucket // 16)
    return -(-time // step) * step


def chunk_widths(time: int, chunk_size: int) -> list[int]:
    """Cuts `time` tokens into chunks of at most `chunk_size` tokens that need little padding."""
    widths = []
    while time:
        width = min(chunk_size, time)
        bucket = _power_of_two(width)
        # Two passes cost less than one that is a quarter padding, unless a pass of half the length costs as much.
        if bucket > cheap_chunk() and 4 * width <= 3 * bucket:
            width = bucket // 2
        widths.append(width)
        time -= width
    return widths


def _power_of_two(time: int) -> int:
    return max(8, 1 << (time - 1).bit_length())


def cheap_chunk() -> int:
    """The number of tokens up to which a pass through the model costs about the same.

    On a GPU such passes are bound by reading the weights (`docs/performance.md`). On a CPU computing is the bound.
    """
    return 64 if backend() == "cpu" else 512


def attended(time: int, held: int, capacity: int) -> int:
    """How many positions of a cache `time` new tokens attend to, if no row holds more than `held` afterwards.

    Each number costs a trace on a GPU and a check of types on a CPU, so there are few: multiples of 128 on a CPU,
    powers of two on a GPU. Single tokens on a GPU attend to the whole capacity, so decoding never waits for a trace.
    """
    if backend() == "cpu":
        return min(capacity, -(-held // 128) * 128)
    return capacity if time == 1 else min(capacity, 1 << (held - 1).bit_length())


def capacity_bucket(length: int) -> int:
    """The capacity for a cache of `length` tokens: a power of two from 256 to 8,192, then four steps per doubling.

    Each capacity costs a trace of the decoding step, so there are few. Beyond 8,192 doubling would waste memory:
    2.5 GiB for the 16,385th token of DBRX.
    """
    length = max(length, 256)
    power = 1 << (length - 1).bit_length()
    step = power if power <= 8192 else power // 8
    return -(-length // step) * step


def traced_first(prompt_length: int, chunk_size: int, capacity: int) -> list[tuple[int, int]]:
    """The passes through the model that each start a trace, for a prompt and the single tokens after it.

    A CPU traces nothing. One chunk of each width is enough there.

    Returns:
        widths in tokens, and where in the cache each stands.
    """
    starts = {(1, 0): 0}
    start = 0
    for width in chunk_widths(prompt_length, min(chunk_size, capacity)):
        time = time_bucket(width, capacity)
        seen = 0 if backend() == "cpu" or width == 1 else attended(time, start + time, capacity)
        starts.setdefault((width, seen), start)
        start += width
    return [(width, start) for (width, _), start in starts.items()]


def shallow(params: Params, config: Config) -> tuple[Params, Config]:
    """A model of few layers, which makes all traces that the whole model needs.

    They are one of each kind, since layers may differ in formats and adapters, and then the last, whose traces differ.
    """
    transformer = params["transformer"]
    *before, last = transformer["blocks"]
    kinds = {_shapes(block): block for block in reversed(before)}
    few = [*kinds.values(), last]
    tree: Params = {"transformer": {**transformer, "blocks": few}, "lm_head": params["lm_head"]}
    return tree, replace(config, n_layers=len(few))


def _shapes(block: BlockParams) -> tuple[object, ...]:
    leaves: dict[str, mx.array] = dict(tree_flatten(block))
    return tuple((path, leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items())
