"""Compiles this folder's C++ with the machine's compiler, once per machine, and keeps the library in the user's cache.

MLX's wheel brings its headers and `libmlx`. `CXX` names the compiler if it is neither `g++` nor `clang++`.
"""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from dbrx_fn.ops.kernels.cache_folder import cache_folder, keep, kept

_FOLDER = Path(__file__).parent
_MLX = Path(str(mx.__file__)).parent
_FLAGS = ("-std=c++20", "-ffp-contract=off", "-fPIC", "-pthread", "-w")
_LEVELS = {"binding.cpp": "-O1", "weights.cpp": "-O3"}
"""Where another level pays: MLX's headers take long to compile, and the products' loops gain from unrolling."""
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]
_LIMIT = 120.0
"""Seconds that the compiler may take. On two cores it takes about five."""


class BuildError(Exception):
    """There is no library. The text says why, and follows "dbrx_fn's kernels for the CPU aren't used: "."""


def built_library(limit: float = _LIMIT) -> tuple[Path, bool]:
    """The compiled library. Compiles it, if it isn't kept, and says so on standard error.

    Args:
        limit: seconds that the compiler may take.

    Returns:
        its path, and whether its folder must be removed once it is loaded.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    compiler = _compiler()
    flags = (*_FLAGS, *_words("DBRX_FN_CPU_FLAGS", os.environ.get("DBRX_FN_CPU_FLAGS", _NATIVE)))
    key = f"kernels-{_key(compiler, flags)}"
    folder, problem = cache_folder()
    if folder is not None and (library := kept(folder, key, ".so")) is not None:
        return library, False
    work = Path(_work_folder())
    how_often = "once for this machine" if folder is not None else f"for this process only, since {problem}"
    _tell(f"dbrx_fn: compiling kernels for this CPU, {how_often}... ")
    try:
        start = time.monotonic()
        made = _compiled(compiler, flags, work, start + limit)
        seconds = time.monotonic() - start
        library, problem = (None, "") if folder is None else keep(made.read_bytes(), folder, key, ".so")
        _tell(f"{seconds:.1f} s, and the next process compiles again: {problem}\n" if problem else f"{seconds:.1f} s\n")
        if library is not None:
            return library, False
        alone = Path(_work_folder()) / made.name
        shutil.move(made, alone)
        return alone, True
    except (BuildError, KeyboardInterrupt) as error:
        _tell("failed\n" if isinstance(error, BuildError) else "stopped\n")
        raise
    except subprocess.TimeoutExpired as error:
        _tell("failed\n")
        raise BuildError(f"the compiler {compiler[0]} takes longer than {limit:g} s") from error
    except OSError as error:
        _tell("failed\n")
        raise BuildError(f"their library can't be written ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tell(text: str) -> None:
    # Standard error may be closed, or a pipe that nobody reads.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _work_folder() -> str:
    try:
        return tempfile.mkdtemp(prefix="dbrx_fn-")
    except OSError as error:
        raise BuildError(f"there is no room for temporary files ({error.strerror})") from error


def _compiler() -> tuple[str, ...]:
    wanted = os.environ.get("CXX", "")
    for command in [wanted] if wanted else ["g++", "clang++"]:
        words = _words("CXX", command)
        if words and (found := shutil.which(words[0])):
            return found, *words[1:]
    missing = f"CXX, {wanted}," if wanted else "g++ or clang++"
    raise BuildError(f"this machine has no C++ compiler ({missing} isn't found)")


def _words(name: str, value: str) -> list[str]:
    """The words of an environment variable, as a shell splits them."""
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{name}, {value}, can't be split into words ({error})") from error


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    """All that the library depends on, as a short text."""
    file = os.stat(os.path.realpath(compiler[0]))
    parts = [*compiler, str(file.st_size), str(file.st_mtime_ns), *flags, MLX_VERSION, str(_MLX), _cpu()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in _sources("*.h", "*.cpp"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What `-march=native` depends on."""
    if sys.platform == "linux":
        wanted = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(wanted))
    return f"{platform.machine()} {platform.processor()} {platform.version()}"


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in _FOLDER.glob(pattern))


def _compiled(compiler: Sequence[str], flags: Sequence[str], work: Path, deadline: float) -> Path:
    """Compiles all sources at once, each by a process of its own, and links them."""
    sources = _sources("*.cpp")
    objects = [work / f"{source.stem}.o" for source in sources]
    _run(
        [
            [*compiler, *flags, *_own_flags(source), "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ],
        deadline,
        work,
    )
    library = work / "kernels.so"
    rest = [f"-L{_MLX / 'lib'}", "-lmlx", f"-Wl,-rpath,{_MLX / 'lib'}", "-o", str(library)]
    _run([[*compiler, *flags, "-shared", *map(str, objects), *rest]], deadline, work)
    if not library.is_file():
        raise BuildError(f"the compiler {compiler[0]} makes no library")
    return library


def _own_flags(source: Path) -> list[str]:
    return [f"-I{_MLX / 'include'}", _LEVELS.get(source.name, "-O2")]


def _started(command: Sequence[str], work: Path, to: BinaryIO) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(work), "LC_ALL": "C"},
        )
    except OSError as error:
        raise BuildError(f"the compiler {command[0]} can't be run ({error.strerror})") from error


def _run(commands: Sequence[Sequence[str]], deadline: float, work: Path) -> None:
    running: list[subprocess.Popen[bytes]] = []
    logs = [work / f"{number}.log" for number in range(len(commands))]
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as to:
                running.append(_started(command, work, to))
        for process, log in zip(running, logs, strict=True):
            if process.wait(max(0.0, deadline - time.monotonic())):
                lines = log.read_text(errors="replace").splitlines() or [f"status {process.returncode}"]
                said = next((line for line in lines if "error" in line.lower()), lines[-1])
                raise BuildError(f"the compiler {commands[0][0]} fails ({said.strip()[:300]!r})")
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
