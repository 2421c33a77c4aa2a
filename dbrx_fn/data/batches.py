"""Cuts a stream of tokens into batches: which tokens are in a batch depends on the seed and its number only."""

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
    """The batches of training, without end: `batches[step]` is always the same, so a run resumes at any step.

    An epoch goes through the stream once, in windows of `sequence_length` tokens to predict, each with the token
    before them. Every token but the first is predicted exactly once: the stream is taken as a ring, which its equal
    ends (both end-of-text) allow, and the one window that would begin a second round has its rest masked out. A batch
    may hold windows of two epochs.

    Args:
        token_file: the tokens.
        batch_size: windows to a batch.
        sequence_length: tokens to predict in a window.
        seed: not negative; it decides the order.

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
        """How many windows an epoch has."""
        return -(-(len(self.token_file) - 1) // self.sequence_length)

    def epochs(self, step: int) -> float:
        """How many epochs lie before batch `step`."""
        return step * self.batch_size / self.windows

    def __getitem__(self, step: int) -> tuple[Tokens, Mask]:
        """Batch number `step`, from 0.

        Returns:
            tokens: each row is input and targets in one: `[:, :-1]` predict `[:, 1:]`.
            mask: which tokens are to be predicted; the first of a row never is. It may be none in a whole row, where a
                prompt is longer than the window.
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
        # How far from the epoch's first window each token is; a whole round and more is what was there already.
        along = windows[:, None] * width + offsets
        places = (starts[:, None] + along) % ring
        # The ring's first token is predicted as the stream's last one.
        places[places == 0] = ring
        mask = (offsets > 0) & (along <= ring)
        if self.token_file.targets is not None:
            mask &= self.token_file.targets[places]
        return self.token_file.tokens[places].astype(np.int32), mask


def eval_windows(
    token_file: TokenFile, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tokens, Mask, Lengths]]:
    """Goes through the stream once, in order, with every token but the first as a target once.

    All batches have the same shape, whatever the text: missing tokens and rows at the end are end-of-text tokens that
    are masked out.

    Args:
        token_file: the tokens.
        batch_size: windows to a batch.
        sequence_length: tokens to predict in a window.

    Returns:
        tokens: as of `Batches`.
        mask: as of `Batches`; False for padding.
        lengths: how many of a row's inputs `[:, :-1]` are real, 0 for a row of padding; `forward` takes them.

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
    """Where an epoch's first window starts, and the order of its windows.

    Each epoch starts elsewhere, so that the cuts fall elsewhere: a token right after a cut is predicted from nothing
    but one token before it, and would be in every epoch.
    """
    # NumPy promises the same bits of PCG64 in every version, but not the same permutations made of them.
    bits = np.random.PCG64([seed, epoch]).random_raw(windows + 1)
    order = np.argsort(bits[1:], kind="stable")
    order.flags.writeable = False
    return int(bits[0] % width), order


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, size in (("batch size", batch_size), ("sequence length", sequence_length)):
        if size < 1:
            raise InputError(f"The {name} is {size} where at least 1 is expected.")
