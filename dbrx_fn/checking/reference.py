"""The reference: numbers of the float64 oracle, made by `python -m tests.support.make_check_reference`."""

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.errors import CheckpointError

FILE = Path(__file__).with_name("reference.npz")
COLUMNS = 48
"""The reference holds the logits of about this many tokens of the vocabulary."""

PROMPT = (509, 301, 11, 533, 338, 293, 301)
"""The small model's prompt: "To be, or not to be"."""
MADE = 16
"""Number of tokens that it generates."""


def kept(vocab_size: int) -> slice:
    """The columns of logits in the reference."""
    return slice(0, None, -(-vocab_size // COLUMNS))


@cache
def _contents() -> dict[str, NDArray[np.generic]]:
    with np.load(FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def expected(name: str) -> NDArray[np.generic]:
    """The reference's numbers of this name.

    Raises:
        CheckpointError: if there are none.
    """
    contents = _contents()
    if name not in contents:
        raise CheckpointError(f"{FILE.name} holds no {name!r}: it is of another version, so install the package again.")
    return contents[name]
