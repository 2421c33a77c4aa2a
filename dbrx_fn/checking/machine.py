"""The description of the checked machine in the report."""

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import Backend, backend, memory_size, on_cpu

_SETTINGS = ("DBRX_FN_", "MLX_", "OPENBLAS_", "OMP_", "MKL_")


@dataclass(frozen=True)
class Machine:
    """The machine and its software.

    `commit`: the source's commit, if it is in a clone.
    `memory`: the device's memory in bytes.
    `blas`: the library that multiplies matrices on a CPU; `None` on a GPU.
    `settings`: environment variables that affect the computation.
    """

    dbrx_fn: str
    commit: str | None
    device: str
    architecture: str
    backend: Backend
    cores: int
    memory: int
    system: str
    python: str
    mlx: str
    numpy: str
    blas: str | None
    settings: tuple[str, ...]


def this_machine(package_version: str) -> Machine:
    """The machine's description, as far as it is available without a wait."""
    info = mx.device_info()
    return Machine(
        dbrx_fn=package_version,
        commit=_commit(Path(__file__).parents[2]),
        device=str(info.get("device_name") or platform.processor() or "unknown"),
        architecture=str(info.get("architecture") or platform.machine()),
        backend=backend(),
        cores=os.cpu_count() or 1,
        memory=memory_size(),
        system=platform.platform(),
        python=platform.python_version(),
        mlx=version("mlx"),
        numpy=np.__version__,
        blas=(FAST_BLAS or "MLX's own") if on_cpu() else None,
        settings=tuple(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)),
    )


def _commit(clone: Path) -> str | None:
    if not (clone / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None
