"""A system's own BLAS takes the place of MLX's, and says so; the switch that leaves MLX its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
{first}
import dbrx_fn
import mlx.core as mx, numpy as np
from dbrx_fn.runtime.blas import FAST_BLAS
one = mx.random.normal((65, 190), key=mx.random.key(0))
np.save(sys.argv[1], np.array(one @ one.T))
print(FAST_BLAS)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac's MLX has Accelerate")


def run(folder: Path, *, first: str = "", **environment: str) -> tuple[str, str, np.ndarray]:
    """What was loaded, what the log says, and a matrix product."""
    file = folder / "product.npy"
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT.format(first=first), str(file)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
    )
    return done.stdout.strip(), done.stderr, np.load(file)


@linux
def test_products_are_the_same_with_any_blas(tmp_path: Path) -> None:
    found, log, product = run(tmp_path, DBRX_FN_BLAS="")
    own, _, expected = run(tmp_path, DBRX_FN_BLAS="0")
    assert own == "None"
    if found == "None":
        pytest.skip("this system has no other BLAS")
    assert "computes matrix products" in log or found == "preloaded"
    assert np.linalg.norm(product - expected) <= 1e-6 * np.linalg.norm(expected)
    again, _, _ = run(tmp_path, DBRX_FN_BLAS=found if found != "preloaded" else "")
    assert again == found


@linux
def test_mlx_that_was_imported_before_keeps_its_own(tmp_path: Path) -> None:
    found, log, _ = run(tmp_path, first="import mlx.core", DBRX_FN_BLAS="")
    if found == "preloaded":
        pytest.skip("LD_PRELOAD comes before everything")
    assert found == "None"
    assert "import dbrx_fn first" in log


@linux
def test_a_library_that_is_none(tmp_path: Path) -> None:
    found, log, _ = run(tmp_path, DBRX_FN_BLAS="libc.so.6")
    if found == "preloaded":
        pytest.skip("LD_PRELOAD comes before everything")
    assert found == "None"
    assert "DBRX_FN_BLAS is 'libc.so.6' where a library with cblas_sgemm, or 0, is expected." in log


@linux
def test_where_no_blas_can_be_loaded_mlx_keeps_its_own(tmp_path: Path) -> None:
    for name in ("libopenblas.so.0", "libmkl_rt.so.2", "libblis.so.4"):
        (tmp_path / name).touch()
    found, log, _ = run(tmp_path, DBRX_FN_BLAS="", LD_LIBRARY_PATH=str(tmp_path))
    if found == "preloaded":
        pytest.skip("LD_PRELOAD comes before everything")
    assert found == "None"
    assert log.count("isn't used") == 3


@linux
@pytest.mark.parametrize("kibibytes", [900_000, 2**20 + (os.cpu_count() or 1) * 2**18])
def test_in_a_small_address_space_mlx_keeps_its_own(kibibytes: int) -> None:
    """OpenBLAS tries for ever to get a buffer that doesn't fit."""
    if (os.cpu_count() or 1) > 8 and kibibytes < 2**20:
        pytest.skip("threads' stacks alone take more")
    command = f'ulimit -v {kibibytes}; exec "{sys.executable}" -m dbrx_fn.generate --prompt "To be" --max-tokens 20'
    environment = {name: value for name, value in os.environ.items() if name != "DBRX_FN_BLAS"}
    ended = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert "finish reason" in ended.stderr
