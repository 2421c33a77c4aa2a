"""Which shapes are computed: few lengths, capacities and spans, since each costs a trace."""

from dbrx_fn.runtime.device import backend

CHUNK_SIZE = 2048
"""Tokens of each row that go through the model at once, unless asked otherwise."""


def time_bucket(time: int, capacity: int) -> int:
    """The length that `time` tokens are padded to, within a capacity other than 0. Each is one trace of the block.

    1, or a power of two from 8 on; a prompt is cut so that it comes close to them (`chunk_widths`). What goes into a
    cache of capacity 0 can't be cut, so there are eight lengths to each doubling then.
    """
    if time == 1:
        return 1
    bucket = _power_of_two(time)
    if capacity:
        return min(bucket, capacity)
    step = max(8, bucket // 16)
    return -(-time // step) * step


def chunk_widths(time: int, chunk_size: int) -> list[int]:
    """Cuts `time` tokens into chunks of at most `chunk_size`, each little shorter than what it will be padded to."""
    widths = []
    while time:
        width = min(chunk_size, time)
        bucket = _power_of_two(width)
        # Two passes cost less than one with a third of padding, unless passes this short all cost the same.
        if bucket > cheap_chunk() and 4 * width <= 3 * bucket:
            width = bucket // 2
        widths.append(width)
        time -= width
    return widths


def _power_of_two(time: int) -> int:
    return max(8, 1 << (time - 1).bit_length())


def cheap_chunk() -> int:
    """Tokens up to which a pass through the model costs about the same however many they are.

    On a GPU that is where reading the weights takes longer than computing with them: 8 layers of the released widths
    on one H200 take 19 ms for 16 tokens, 27 for 128, 52 for 512, 108 for 1076 in two chunks, 164 for 2048. A CPU
    computes more slowly than it reads.
    """
    return 64 if backend() == "cpu" else 512


def attended(time: int, held: int, capacity: int) -> int:
    """How many positions of a cache attention looks at from `time` tokens, if no row then holds more than `held`.

    On a CPU each number is one more signature for which types are checked, on a GPU one more trace, so there should
    be few of them: the next 128, and for a GPU the next power of two. Single tokens see the whole capacity on a GPU,
    lest one of them has to wait for a trace.
    """
    if backend() == "cpu":
        return min(capacity, -(-held // 128) * 128)
    return capacity if time == 1 else min(capacity, 1 << (held - 1).bit_length())


def capacity_bucket(length: int) -> int:
    """The capacity to give a cache that must hold `length` tokens: a power of two from 256 to 8,192, then four steps to
    each doubling.

    Each capacity is one more trace of the decoding step, so there should be few of them. But to make room for twice
    16,384 tokens of DBRX when there is one more would be 2.5 GiB for nothing.
    """
    length = max(length, 256)
    power = 1 << (length - 1).bit_length()
    step = power if power <= 8192 else power // 8
    return -(-length // step) * step
