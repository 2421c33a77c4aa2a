"""Settings that all tests share, and a table of what they measured."""

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# How a BLAS rounds depends on such settings, and a machine's own could hide a fault. A BLAS reads them when it is
# loaded; TESTS_KEEP names those that whoever started the tests asked for.
_BLAS_SETTINGS = ("OPENBLAS_", "GOTO_", "OMP_", "MKL_", "BLIS_", "NVPL_", "DBRX_FN_BLAS")
for name in [name for name in os.environ if name.startswith(_BLAS_SETTINGS)]:
    if name not in os.environ.get("TESTS_KEEP", "").split(","):
        del os.environ[name]

# Before the tests import MLX, so that they run with the BLAS that users get.
import dbrx_fn.runtime.blas  # noqa: E402, F401
from dbrx_fn.ops.kernels.cpu.library import kernels  # noqa: E402
from dbrx_fn.runtime.device import compiles, on_cpu  # noqa: E402

# Its tests are of compiled layers alone.
collect_ignore = [] if compiles() else ["compiled"]

# MLX keeps the CPU's fused kernels in the temporary folder, where g++ writes them under the names that they are loaded
# by: one process can load what another has half written. So each of several workers has a folder of its own.
if compiles() and on_cpu() and "PYTEST_XDIST_WORKER" in os.environ:
    own = Path(tempfile.gettempdir(), f"dbrx_fn-{os.environ['PYTEST_XDIST_WORKER']}")
    own.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(own)

# Compiled before the tests, which read what commands say on standard error.
if on_cpu():
    kernels()

# A shell has what it starts in the background ignore Ctrl-C, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first example of each shape waits for MLX to compile its kernels, which no deadline should count.
settings.register_profile("dbrx_fn", deadline=None)
settings.load_profile("dbrx_fn")

_MEASURED = "measured: "


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, float], float]:
    """Notes a figure under a name, for the table at the end, and gives it back to be compared."""

    def note(name: str, value: float) -> float:
        # Processes can't send NumPy's floats to one another.
        record_property(_MEASURED + name, float(value))
        return value

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the largest figure of each name, over all tests that noted one."""
    figures: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name.startswith(_MEASURED):
                        figures.setdefault(name.removeprefix(_MEASURED), []).append(value)
    if figures:
        terminalreporter.section("largest of what was measured")
        for name, values in sorted(figures.items()):
            terminalreporter.line(f"{max(values):10.2e}  {name} ({len(values)} figures)")
