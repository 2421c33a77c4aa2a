"""Replaces the BLAS of MLX's wheels for Linux by the system's, if the system has a fast one.

MLX's wheels carry the slow reference BLAS (`docs/training.md`). Every BLAS exports the same names (`cblas_sgemm`),
and a process uses the library that it loads first. So this module loads the system's before `mlx.core`.
DBRX_FN_BLAS=0 keeps MLX's own, and DBRX_FN_BLAS=PATH names another library. MLX's own is also kept in a small address
space (`ulimit -v`). The logger `dbrx_fn.blas` says at level INFO which one is used.
"""

import ctypes
import logging
import os
import resource
import sys
import warnings

logger = logging.getLogger("dbrx_fn.blas")

# Sonames, which the system's loader finds without development packages.
_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.2", "libblis.so.4")


def _load() -> str | None:
    """Loads the first library that exists. Returns its name, or `None` if MLX's own is used."""
    wanted = os.environ.get("DBRX_FN_BLAS", "")
    if sys.platform != "linux" or wanted == "0":
        return None
    if _is_loaded():
        logger.info("the process has loaded a BLAS already")
        return "preloaded"
    if "mlx.core" in sys.modules:
        logger.info("MLX was imported before dbrx_fn and uses its own BLAS: import dbrx_fn first")
        return None
    if not wanted and not _has_room():
        logger.info("the address space (ulimit -v) has no room for another BLAS: MLX's own is used")
        return None
    for name in [wanted] if wanted else _LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            logger.info("%s isn't used: %s", name, error)
            continue
        if hasattr(library, "cblas_sgemm"):
            logger.info("%s computes matrix products on the CPU", name)
            return name
    if wanted:
        warnings.warn(f"DBRX_FN_BLAS is {wanted!r} where a library with cblas_sgemm, or 0, is expected.", stacklevel=2)
    return None


def _has_room() -> bool:
    """Whether OpenBLAS's buffers, 128 MiB per thread, fit the address space. If not, it would retry forever."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit == resource.RLIM_INFINITY or limit > 2**30 + (os.cpu_count() or 1) * 2**28


def _is_loaded() -> bool:
    """Whether the process has loaded a BLAS already, such as by LD_PRELOAD."""
    return hasattr(ctypes.CDLL(None), "cblas_sgemm")


FAST_BLAS = _load()
"""The library that computes the CPU's matrix products, or `None` for MLX's own."""
