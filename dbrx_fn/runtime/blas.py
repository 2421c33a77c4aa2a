"""Puts the system's BLAS in the place of the one in MLX's wheels for Linux, where there is one.

Those carry the reference BLAS, of which a matrix product uses 2 GFLOP/s where OpenBLAS makes 55 to 130 of the same two
cores. Both have the same plain names (`cblas_sgemm`), and the first library that is loaded with them is used: so it is
loaded here, before `mlx.core`. DBRX_FN_BLAS=0 leaves MLX its own, and DBRX_FN_BLAS=PATH names another library. In a
small address space (`ulimit -v`) MLX keeps its own too. What was done is told to the logger `dbrx_fn.blas` at level
INFO.
"""

import ctypes
import logging
import os
import resource
import sys
import warnings

logger = logging.getLogger("dbrx_fn.blas")

# By their sonames, which a system's loader finds without its developer's packages.
_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.2", "libblis.so.4")


def _load() -> str | None:
    """Loads the first library that is there; its name, or `None` if MLX's own is what computes."""
    wanted = os.environ.get("DBRX_FN_BLAS", "")
    if sys.platform != "linux" or wanted == "0":
        return None
    if _is_loaded():
        logger.info("a BLAS is there already")
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
    """Whether OpenBLAS's buffers, 128 MiB a thread, fit the address space: where they don't, it tries for ever."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit == resource.RLIM_INFINITY or limit > 2**30 + (os.cpu_count() or 1) * 2**28


def _is_loaded() -> bool:
    """Whether the process itself brings a BLAS along, as with LD_PRELOAD."""
    return hasattr(ctypes.CDLL(None), "cblas_sgemm")


FAST_BLAS = _load()
"""The library that computes the CPU's matrix products, or `None` if that is MLX's own."""
