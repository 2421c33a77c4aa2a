"""Checks for workers that end, hang or compile; and `python -m dbrx_fn.check` with them, in two workers.

    python -m tests.support.check_in_workers FOLDER

Each worker leaves a file in FOLDER, whose name is its process id.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from dbrx_fn import check
from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.comparison import Comparison, compare
from dbrx_fn.checking.compiled_kernels import VARIABLE
from tests.support.check_with_a_fault import put


def right() -> Comparison:
    return compare(mx.array([1.0, 2.0]) * 2, [2.0, 4.0])


def ends() -> Comparison:
    os._exit(3)


def crashes() -> Comparison:
    os.kill(os.getpid(), signal.SIGSEGV)
    return right()


def hangs() -> Comparison:
    time.sleep(1000)
    return right()


def compiles(module: str) -> Comparison:
    """Writes a module as MLX does, or stops before its last file."""
    folder = Path(os.environ[VARIABLE], module).parent
    folder.mkdir(exist_ok=True)
    for part in ("ptx", "txt", "cu"):
        if (module, part) != ("half", "cu"):
            Path(os.environ[VARIABLE], f"{module}.{part}").write_text(f"{module} {part}")
    return right()


def waits_for(module: str) -> Comparison:
    """Waits until MLX would find a module of another process."""
    file = Path(os.environ[VARIABLE], f"{module}.ptx")
    while not file.exists():
        time.sleep(0.05)
    return compare(mx.array(float(file.read_text() == f"{module} ptx"))[None], [1.0])


def compiles_and_waits() -> Comparison:
    compiles("deep/whole")
    return waits_for("back")


def waits_and_compiles() -> Comparison:
    waits_for("deep/whole")
    return compiles("back")


def plan(*wanted: str) -> list[Check]:
    """A family for each check."""
    return [Check(f"row {n}", name, 0.0, CHECKS[name]) for n, name in enumerate(wanted)]


def unable(*wanted: str) -> list[Check]:
    """A plan that ends each worker."""
    if VARIABLE in os.environ and "dbrx_fn-check-" in os.environ[VARIABLE]:
        os._exit(1)
    return plan(*wanted)


CHECKS: dict[str, Callable[[], Comparison]] = {
    "right": right,
    "ends": ends,
    "crashes": crashes,
    "hangs": hangs,
    "compiles and waits": compiles_and_waits,
    "waits and compiles": waits_and_compiles,
    "compiles half": partial(compiles, "half"),
    "waits": partial(waits_for, "deep/whole"),
}


def hanging(folder: str, only: str | None) -> list[Check]:
    Path(folder, str(os.getpid())).touch()
    return plan("hangs", "hangs")


if __name__ == "__main__":
    from tests.support import check_in_workers

    put(partial(check_in_workers.hanging, sys.argv[1]), "planned", check)
    put(lambda: 2, "worker_count", check)
    sys.exit(check.main([]))
