"""Runs `python -m dbrx_fn.check` with a fault that is put in first: its name, then the command's arguments.

The fault is put in when the checks are planned, so workers have it too.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# Before MLX, so that its BLAS is the one that users get.
import dbrx_fn.runtime.blas  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn import check
from dbrx_fn.checking import of_operations, reference
from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.plan import planned
from dbrx_fn.model import positions
from dbrx_fn.ops import experts

FOLDER = tempfile.TemporaryDirectory()
"""Goes when the process ends."""


def put(value: Any, name: str, *modules: ModuleType) -> Any:
    """Puts a value in place of what modules have under a name, and returns what was there."""
    before = getattr(modules[0], name)
    for module in modules:
        assert getattr(module, name) is before
        setattr(module, name, value)
    return before


def a_wrong_segment() -> None:
    """The first segment is the last expert's."""

    def wrong(*args: Any, **static: Any) -> Any:
        plan = right(*args, **static)
        first = mx.arange(plan.segment_experts.size) == 0
        return plan._replace(segment_experts=mx.where(first, static["experts"] - 1, plan.segment_experts))

    right = put(wrong, "dispatch", experts)


def a_kernel_s_sign() -> None:
    """Heads turn the other way."""

    def wrong(*args: Any, **static: Any) -> Any:
        cosines, sines = right(*args, **static)
        return cosines, -sines

    right = put(wrong, "turns", positions, of_operations)


def ship(contents: dict[str, NDArray[Any]]) -> None:
    """Puts another reference in place of the one that ships."""
    other = Path(FOLDER.name) / reference.FILE.name
    np.savez(other, allow_pickle=False, **contents)
    put(other, "FILE", reference)


def a_stale_reference() -> None:
    """One model's logits are those of other tokens."""
    with np.load(reference.FILE) as file:
        ship(dict(file) | {"odd sizes/0": np.roll(file["odd sizes/0"], 1, axis=0)})


def a_reference_of_other_models() -> None:
    """A model isn't in it."""
    with np.load(reference.FILE) as file:
        ship({name: array for name, array in file.items() if not name.startswith("odd sizes/")})


def an_operation_that_fails() -> None:
    """As where a kernel can't be built."""

    def fail(*args: Any, **static: Any) -> Any:
        raise RuntimeError("no such kernel\nin this library")

    put(fail, "mix_experts", of_operations)


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


def planned_with(fault: str, only: str | None) -> list[Check]:
    """The checks, in a process with the fault."""
    FAULTS[fault]()
    return planned(only)


if __name__ == "__main__":
    # Workers find the function by its module, which `__main__` isn't there.
    from tests.support import check_with_a_fault

    put(partial(check_with_a_fault.planned_with, sys.argv[1]), "planned", check)
    sys.exit(check.main(sys.argv[2:]))
