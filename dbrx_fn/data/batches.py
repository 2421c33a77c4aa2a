"""Cuts a stream of tokens into batches. A batch's tokens depend only on the seed and the batch's number."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dbrx_fn.data.token_file import TokenFile
from dbrx_fn.errors import InputError

Tokens = Int32[np.ndarray, "batch time+1"]
Mask = Bool[np.ndarray, "batch time+1"]
Lengths = Int32[np.ndarray, "batch"]


@dataclass(frozen=True, eq=False)
class Batches:
    """An endless sequence of training batches. `batches[step]` is always the same, so a run can resume at any step.

    An epoch goes through the stream once, in windows of `sequence_length` tokens to predict and the token before them.
    Every token but the first is predicted exactly once. The stream is treated as a ring, since both of its ends are
    end-of-text. The window that reaches a second round has the rest masked out. A batch may hold windows of two epochs.

    Args:
        token_file: the tokens.
        batch_size: number of windows per batch.
        sequence_length: number of tokens to predict per window.
        seed: determines the order. It must not be negative.

    Raises:
        InputError: if a size isn't positive, the seed is negative, or the text is shorter than one window.
    """

    token_file: TokenFile
    batch_size: int
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        _check_sizes(self.batch_size, self.sequence_length)
        if self.seed < 0:
            raise InputError(f"The seed is {self.seed} where 0 or a positive whole number is expected.")
        found, needed = len(self.token_file), self.sequence_length + 1
        if found < needed:
            raise InputError(
                f"The text makes {found} tokens where one sequence of {self.sequence_length} needs {needed}: give more "
                f"text, or a sequence length of at most {found - 1}."
            )

    @property
    def windows(self) -> int:
        """Number of windows per epoch."""
        return -(-(len(self.token_file) - 1) // self.sequence_length)

    def epochs(self, step: int) -> float:
        """Number of epochs before batch `step`."""
        return step * self.batch_size / self.windows

    def __getitem__(self, step: int) -> tuple[Tokens, Mask]:
        """Batch number `step`, from 0.

        Returns:
            tokens: input and targets in one array: `[:, :-1]` predict `[:, 1:]`.
            mask: true for tokens to predict. The first of a row never is. A row may have none at all, if a prompt is
                longer than the window.
        """
        if step < 0:
            raise IndexError(f"step is {step} where 0 or more is expected")
        width = self.sequence_length
        ring = len(self.token_file) - 1
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts, windows = np.empty((2, self.batch_size), np.int64)
        for row, number in enumerate(numbers):
            epoch, place = divmod(number, self.windows)
            shift, order = _order(self.seed, epoch, self.windows, width)
            starts[row], windows[row] = shift, order[place]
        offsets = np.arange(width + 1)
        # Each token's distance from the epoch's first window. A distance of a full round or more is a repetition.
        along = windows[:, None] * width + offsets
        places = (starts[:, None] + along) % ring
        # The ring's first token is the stream's last one, and is predicted there.
        places[places == 0] = ring
        mask = (offsets > 0) & (along <= ring)
        if self.token_file.targets is not None:
            mask &= self.token_file.targets[places]
        return self.token_file.tokens[places].astype(np.int32), mask


def eval_windows(
    token_file: TokenFile, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tokens, Mask, Lengths]]:
    """Goes through the stream once, in order. Every token but the first is a target once.

    All batches have the same shape. Missing tokens and rows at the end are masked end-of-text tokens.

    Args:
        token_file: the tokens.
        batch_size: number of windows per batch.
        sequence_length: number of tokens to predict per window.

    Returns:
        tokens: as in `Batches`.
        mask: as in `Batches`; false for padding.
        lengths: the number of real inputs `[:, :-1]` in each row, as `forward` takes them. 0 for a row of padding.

    Raises:
        InputError: if a size isn't positive.
    """
    _check_sizes(batch_size, sequence_length)
    last = len(token_file) - 1
    windows = -(-last // sequence_length)
    return (
        _eval_batch(token_file, np.arange(first, first + batch_size) * sequence_length, sequence_length)
        for first in range(0, windows, batch_size)
    )


def _eval_batch(token_file: TokenFile, starts: Int64[np.ndarray, "batch"], width: int) -> tuple[Tokens, Mask, Lengths]:
    last = len(token_file) - 1
    offsets = np.arange(width + 1)
    wanted = starts[:, None] + offsets
    places = np.minimum(wanted, last)
    mask = (offsets > 0) & (wanted <= last)
    if token_file.targets is not None:
        mask &= token_file.targets[places]
    lengths = np.clip(last - starts, 0, width).astype(np.int32)
    return token_file.tokens[places].astype(np.int32), mask, lengths


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, windows: int, width: int) -> tuple[int, Int64[np.ndarray, "windows"]]:
    """The start of an epoch's first window, and the order of its windows.

    Each epoch starts at another place, so its cuts fall at other places. Otherwise the same tokens, right after a cut,
    would have only one token of context in every epoch.
    """
    # NumPy guarantees the bits of PCG64 in every version, but not the permutations that it makes of them.
    bits = np.random.PCG64([seed, epoch]).random_raw(windows + 1)
    order = np.argsort(bits[1:], kind="stable")
    order.flags.writeable = False
    return int(bits[0] % width), order


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, size in (("batch size", batch_size), ("sequence length", sequence_length)):
        if size < 1:
            raise InputError(f"The {name} is {size} where at least 1 is expected.")
