"""Compiles every kernel that DBRX launches for every NVIDIA GPU from Ampere on, without a GPU, and prints a table.

It fails if a kernel doesn't compile, spills more than it may, or needs more shared memory than the GPU has. It needs
the wheel nvidia-cuda-nvrtc (`nox -s targets`).
"""

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from typing import NamedTuple

from dbrx_fn.ops.kernels.cuda_module import FOLDER, architecture, compile_kernel
from dbrx_fn.runtime.device import Gpu
from tests.targets.launches import Launch, launches


class Target(NamedTuple):
    """A GPU of an architecture, and the shared memory that one block may have, in KiB."""

    gpu: Gpu
    shared_memory: int


TARGETS = {
    "80": Target(Gpu((8, 0), 108), 163),
    "86": Target(Gpu((8, 6), 84), 99),
    "87": Target(Gpu((8, 7), 16), 163),
    "89": Target(Gpu((8, 9), 128), 99),
    "90a": Target(Gpu((9, 0), 132), 227),
    "100": Target(Gpu((10, 0), 148), 227),
    "103": Target(Gpu((10, 3), 160), 227),
    "110": Target(Gpu((11, 0), 20), 227),
    "120": Target(Gpu((12, 0), 170), 99),
    "121": Target(Gpu((12, 1), 48), 99),
}
"""A100, RTX 3090, Orin, RTX 4090, H100, B200, B300, Thor, RTX 5090, GB10."""
FOUR_BITS = (1, 3)
"""Values of FORMAT in weights.cuh."""
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class Usage(NamedTuple):
    """What a compiled kernel takes: registers of a thread, shared memory of a block, spilled bytes of a thread."""

    registers: int
    shared_memory: int
    spilled: int

    def __str__(self) -> str:
        spilled = f" spills {self.spilled}" if self.spilled else ""
        return f"{self.registers} {self.shared_memory / 1024:.0f}K{spilled}"


def usage(launch: Launch, target: str) -> Usage:
    """Compiles a kernel for a target.

    Raises:
        RuntimeError: if the compiler refuses it.
    """
    _, log = compile_kernel(launch.kernel, architecture(TARGETS[target].gpu.capability), "--ptxas-options=-v")
    used, spills = _USED.search(log), _SPILLS.search(log)
    if used is None or spills is None:
        raise RuntimeError(f"NVRTC's log of {launch.kernel.file}.cu doesn't say what it uses: {log}")
    return Usage(int(used[1]), int(used[2] or 0) + launch.shared_memory, int(spills[1]) + int(spills[2]))


def may_spill(launch: Launch, target: str) -> int:
    """Bytes that a thread of this kernel may spill: none for 4 bits. The rest is what the kernels spill today."""
    if dict(launch.kernel.defines).get("FORMAT") in FOUR_BITS:
        return 0
    return 24 if target == "90a" else 96


def problem(launch: Launch, target: str, result: Usage | str) -> str | None:
    """What is wrong with a compiled kernel, or with the compiler's refusal."""
    if isinstance(result, str):
        return result
    if result.spilled > may_spill(launch, target):
        return f"spills {result.spilled} bytes where {may_spill(launch, target)} may be"
    if result.shared_memory > TARGETS[target].shared_memory * 1024:
        return f"needs {result.shared_memory} bytes of shared memory of {TARGETS[target].shared_memory} KiB"
    return None


def load_nvrtc() -> None:
    """Loads the library of the wheel nvidia-cuda-nvrtc. From then on its bare name finds it."""
    library = next(file for file in files("nvidia-cuda-nvrtc") or () if re.fullmatch(r"libnvrtc\.so\.\d+", file.name))
    ctypes.CDLL(str(library.locate()))


def name_of(launch: Launch) -> str:
    macros = " ".join(f"{name}={value}" for name, value in launch.kernel.defines)
    return f"{launch.kernel.file} {macros}"


def main(wanted: Sequence[str]) -> int:
    """Prints the table. Returns 1 if something is wrong with a kernel."""
    load_nvrtc()
    launched = {target: launches(TARGETS[target].gpu) for target in wanted}
    # Long kernels take longest, so they come first.
    jobs = sorted(
        ((launch, target) for target in wanted for launch in launched[target]),
        key=lambda job: -(FOLDER / f"{job[0].kernel.file}.cu").stat().st_size,
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: _tried(*job), jobs))
    found = dict(zip(jobs, done, strict=True))
    print("registers of a thread, shared memory of a block; - for kernels that aren't launched there\n")
    print("| kernel | " + " | ".join(f"sm_{target}" for target in wanted) + " |")
    print("| --- |" + " --- |" * len(wanted))
    for launch in sorted({launch for launch, _ in jobs}, key=repr):
        cells = (str(found.get((launch, target), "-")).splitlines()[0] for target in wanted)
        print(f"| {name_of(launch)} | " + " | ".join(cells) + " |")
    wrong = [(job, fault) for job, result in found.items() if (fault := problem(*job, result)) is not None]
    for (launch, target), fault in wrong:
        print(f"sm_{target}: {name_of(launch)}: {fault}", file=sys.stderr)
    print(f"\n{len(jobs)} kernels, {len(wrong)} of them wrong", file=sys.stderr)
    return int(bool(wrong))


def _tried(launch: Launch, target: str) -> Usage | str:
    try:
        return usage(launch, target)
    except RuntimeError as error:
        return f"refused: {error}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all, if not given")
    targets = parser.parse_args().targets or list(TARGETS)
    if not TARGETS.keys() >= set(targets):
        parser.error(f"{' '.join(targets)}: choose from {', '.join(TARGETS)}")
    sys.exit(main(targets))
