"""Runs `python -m dbrx_fn.check` with a fault that is put in first: its name, then the command's arguments."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dbrx_fn import check
from dbrx_fn.checking import of_operations, reference
from dbrx_fn.model import positions
from dbrx_fn.ops import experts


def a_wrong_segment() -> None:
    """The last segment is the first expert's."""
    right: Callable[..., Any] = experts.dispatch

    def wrong(*args: Any, **static: Any) -> Any:
        plan = right(*args, **static)
        place = mx.arange(plan.segment_experts.size)
        last = place == plan.segment_experts.size - 1
        return plan._replace(segment_experts=mx.where(last, 0, plan.segment_experts))

    experts.dispatch = wrong


def a_kernel_s_sign() -> None:
    """Heads turn the other way."""
    right: Callable[..., Any] = positions.turns

    def wrong(*args: Any, **static: Any) -> Any:
        cosines, sines = right(*args, **static)
        return cosines, -sines

    positions.turns = of_operations.turns = wrong


def a_stale_reference() -> None:
    """One model's logits are those of other tokens."""
    with np.load(reference.FILE) as file:
        contents = dict(file)
    contents["odd sizes/0"] = np.roll(contents["odd sizes/0"], 1, axis=0)
    stale = Path(tempfile.mkdtemp()) / reference.FILE.name
    np.savez(stale, allow_pickle=False, **contents)
    reference.FILE = stale


def a_reference_of_other_models() -> None:
    """A model isn't in it."""
    with np.load(reference.FILE) as file:
        contents = {name: array for name, array in file.items() if not name.startswith("odd sizes/")}
    stale = Path(tempfile.mkdtemp()) / reference.FILE.name
    np.savez(stale, allow_pickle=False, **contents)
    reference.FILE = stale


def an_operation_that_fails() -> None:
    """As where a kernel can't be built."""

    def fail(*args: Any, **static: Any) -> Any:
        raise RuntimeError("no such kernel\nin this library")

    of_operations.mix_experts = fail


FAULTS = {
    fault.__name__: fault
    for fault in (
        a_wrong_segment,
        a_kernel_s_sign,
        a_stale_reference,
        a_reference_of_other_models,
        an_operation_that_fails,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(check.main(sys.argv[2:]))
