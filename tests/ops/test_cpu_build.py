"""The CPU's kernels are compiled once, and kept where only their user writes. Without them stock operations run."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn.ops.kernels.cpu import build
from dbrx_fn.ops.kernels.cpu.build import BuildError, built_library
from dbrx_fn.ops.kernels.cpu.library import has_kernels, kernels

pytestmark = [
    pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="they are for CPUs"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no compiler"),
    pytest.mark.skipif(os.environ.get("DBRX_FN_KERNELS") == "0", reason="kernels are off"),
]
ROOT = Path(__file__).parents[2]
DECODE = """
import hashlib
import dbrx_fn
import mlx.core as mx
import numpy as np
from dbrx_fn.model.decode_step import DecodeStep
params, config = dbrx_fn.load(dbrx_fn.SMALL)
cache = dbrx_fn.init_cache(config, 2, 256)
token = mx.array([[1], [2]])
for _ in range(3):
    logits, cache = dbrx_fn.forward(params, token, cache)
    token = mx.argmax(logits, axis=-1)
print(DecodeStep.of(params, token, cache, (1, 1)) is not None, token[:, 0].tolist(), sep=";")
print(hashlib.sha256(np.array(logits).tobytes()).hexdigest())
"""
FAILS = "#!/bin/sh\necho 'x.cpp:1: error: no such luck' >&2\nexit 1\n"
OLD = "-march=x86-64" if platform.machine() == "x86_64" else "-O1"
HANGS = "#!/bin/sh\nsleep 1000\n"


def decoded(*before: str, **environment: str) -> tuple[bool, str, str, str]:
    """Whether kernels ran, the last tokens, a hash of the logits, and what was said on standard error."""
    done = subprocess.run(
        [*before, sys.executable, "-c", DECODE],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
    )
    ran, logits = done.stdout.split()[0].split(";")[0], done.stdout.splitlines()[-1]
    return ran == "True", done.stdout.splitlines()[0].split(";")[1], logits, done.stderr


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def make(text: str) -> str:
        path = tmp_path / "compiler"
        path.write_text(text)
        path.chmod(0o700)
        return str(path)

    return make


def test_a_machine_with_a_compiler_has_kernels() -> None:
    assert has_kernels()


@functools.cache
def usual() -> tuple[bool, str, str, str]:
    return decoded()


def test_the_first_process_compiles_and_the_next_finds_it_on_an_old_cpu_too(tmp_path: Path) -> None:
    old = {"XDG_CACHE_HOME": str(tmp_path), "DBRX_FN_CPU_FLAGS": OLD}
    first = decoded(**old)
    assert first[:2] == usual()[:2]
    assert re.fullmatch(r"dbrx_fn: compiling kernels for this CPU, once for this machine\.\.\. [\d.]+ s\n", first[3])
    (library,) = (tmp_path / "dbrx_fn").iterdir()
    assert (tmp_path / "dbrx_fn").stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o022 == 0
    assert decoded(**old) == (*first[:3], "")
    assert list((tmp_path / "dbrx_fn").iterdir()) == [library]


def test_the_switch_takes_stock_operations_and_compiles_nothing(tmp_path: Path) -> None:
    ran, tokens, _, said = decoded(XDG_CACHE_HOME=str(tmp_path), DBRX_FN_KERNELS="0")
    assert (ran, said) == (False, "")
    assert not list(tmp_path.iterdir())
    assert usual()[:2] == (True, tokens)


def test_more_threads_than_cores_compute_the_same_bits() -> None:
    *found, said = decoded(DBRX_FN_THREADS="64")
    assert found == list(usual()[:3])
    assert ("they take turns" in said) == (len(os.sched_getaffinity(0)) < 64)


def test_one_core_takes_one_thread_and_a_number_of_threads_that_is_none_is_said() -> None:
    core = str(min(os.sched_getaffinity(0)))
    *found, said = decoded("taskset", "-c", core, DBRX_FN_THREADS="many")
    assert found == list(usual()[:3])
    assert said == "DBRX_FN_THREADS is 'many' where 1 to 256 is expected: 1 is taken.\n"


def test_without_a_compiler_stock_operations_run(tmp_path: Path) -> None:
    ran, tokens, _, said = decoded(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert not ran
    assert said == (
        "dbrx_fn's kernels for the CPU aren't used: this machine has no C++ compiler (CXX, no-such-compiler, isn't"
        " found). Slower stock operations take their place.\n"
    )
    assert usual()[1] == tokens


def test_a_compiler_that_fails_is_told_in_its_words(tmp_path: Path, script: Callable[[str], str]) -> None:
    ran, _, _, said = decoded(XDG_CACHE_HOME=str(tmp_path), CXX=script(FAILS))
    assert not ran
    assert "x.cpp:1: error: no such luck" in said
    assert not list((tmp_path / "dbrx_fn").iterdir())


def test_a_compiler_that_hangs_is_ended(
    tmp_path: Path,
    script: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", script(HANGS))
    with pytest.raises(BuildError, match=r"takes longer than 0\.5 s"):
        built_library(limit=0.5)
    assert capsys.readouterr().err.endswith("once for this machine... failed\n")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the compiler's work done by copying the library that is kept, which takes no seconds."""
    library, _ = built_library()

    def copy(*arguments: object) -> Path:
        work = arguments[2]
        assert isinstance(work, Path)
        made = work / "kernels.so"
        made.write_bytes(library.read_bytes())
        return made

    assert kernels() is not None
    monkeypatch.setattr(build, "_compiled", copy)


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The library is made for this process only, outside of `folder`, where nothing changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    before = sorted(folder.rglob("*"))
    library, temporary = built_library()
    assert temporary
    assert folder not in library.parents
    assert said in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    library.unlink()
    library.parent.rmdir()


@pytest.mark.usefixtures("compiled")
def test_a_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dbrx_fn"
    folder.mkdir()
    folder.chmod(0o777)
    refused(tmp_path, monkeypatch, f"for this process only, since {folder} can be written by others... ", capsys)
    folder.chmod(0o700)
    tmp_path.chmod(0o777)
    refused(tmp_path, monkeypatch, "can be written by others", capsys)
    tmp_path.chmod(0o700)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, monkeypatch, "is a link", capsys)


@pytest.mark.usefixtures("compiled")
def test_a_cache_that_is_no_folder_or_is_full_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dbrx_fn").write_text("")
    refused(tmp_path, monkeypatch, "for this process only, since there is no cache folder", capsys)
    (tmp_path / "dbrx_fn").unlink()
    (tmp_path / "dbrx_fn").mkdir(mode=0o700)
    # Such a folder's files can't be made, as on a full disk or a read-only one.
    monkeypatch.setattr(build, "_key", lambda *arguments: "x" * 300)
    said = f"and the next process compiles again: {tmp_path / 'dbrx_fn'} can't be written (File name too long)\n"
    refused(tmp_path, monkeypatch, said, capsys)


@pytest.mark.usefixtures("compiled")
def test_a_planted_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library, _ = built_library()
    right = library.read_bytes()
    library.unlink()
    (tmp_path / "evil").write_bytes(b"evil")
    library.symlink_to(tmp_path / "evil")
    assert built_library() == (library, False)
    assert library.read_bytes() == right
    library.chmod(0o666)
    library.write_bytes(b"evil")
    assert built_library() == (library, False)
    assert library.read_bytes() == right
    assert (tmp_path / "evil").read_bytes() == b"evil"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_truncated_library_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library, _ = built_library()
    right = library.read_bytes()
    library.write_bytes(right[: int(left * len(right))])
    assert built_library() == (library, False)
    assert library.read_bytes() == right


@pytest.mark.parametrize("name", ["CXX", "DBRX_FN_CPU_FLAGS"])
def test_a_variable_whose_quotes_do_not_match_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "g++ '-O1")
    with pytest.raises(BuildError, match=f"{name}, g\\+\\+ '-O1, can't be split into words"):
        built_library()


def test_a_compiler_that_is_no_program_is_named(
    tmp_path: Path, script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", script("no program"))
    with pytest.raises(BuildError, match="compiler can't be run \\(Exec format error\\)"):
        built_library()
