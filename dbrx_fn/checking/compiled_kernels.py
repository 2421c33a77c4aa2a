"""Kernels that several processes compile at the same time, in one folder each.

MLX keeps a compiled module as three files, `name.ptx`, `name.txt` and `name.cu`. It opens them in this order and writes
in place (`mlx/backend/cuda/jit_module.cpp`), so in a common folder a process could read what another has half written.
Here each process has its own folder, and whole modules are copied to the others. Links won't do: a process that is just
compiling the same module would write through them.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

VARIABLE = "MLX_PTX_CACHE_DIR"
"""The environment variable that names MLX's folder. MLX reads it at the first kernel."""
_SETTLED = 1.0
"""A module whose last file is older, in seconds, is written. Writing takes milliseconds."""
_PARTS = (".txt", ".ptx")
"""The files that MLX reads. It looks for the second one first, so a module without it doesn't exist."""


def kernel_folder() -> Path:
    """The folder where MLX keeps compiled kernels."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir(), "mlx", version("mlx"), "ptx")


def lend_kernels(kept: Path, folder: Path) -> None:
    """Links all compiled kernels into a process's empty folder, before it starts. MLX doesn't write what it finds."""
    for part in _PARTS:
        for file in kept.rglob(f"*{part}"):
            link = folder / file.relative_to(kept)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())


def compiled_in(folder: Path, *, idle: bool) -> list[Path]:
    """The modules that the folder's process has compiled and written, as paths in the folder, without an ending.

    The folder's `.cu` files tell them. `share_kernels` removes these, so each module is returned once.

    Args:
        folder: the process's.
        idle: whether the process is between two checks, so that it writes nothing.
    """
    before = time.time() - (0 if idle else _SETTLED)
    found = [(file, file.stat()) for file in folder.rglob("*.cu")]
    return [
        file.relative_to(folder).with_suffix("")
        for file, status in found
        # On a full disk it is empty, and the module may be cut off.
        if status.st_size and status.st_mtime <= before
    ]


def share_kernels(modules: Sequence[Path], folder: Path, others: Sequence[Path]) -> None:
    """Copies modules to the folders that lack them. Folders that can't be written to go without."""
    for module in modules:
        for other in others:
            if not _file(other, module, ".ptx").exists():
                with suppress(OSError):
                    for part in _PARTS:
                        _copy(_file(folder, module, part), _file(other, module, part))
        _file(folder, module, ".cu").unlink()


def _file(folder: Path, module: Path, part: str) -> Path:
    return folder / module.with_name(module.name + part)


def _copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{os.getpid()}.part")
    try:
        shutil.copyfile(source, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
