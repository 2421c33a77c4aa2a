"""The compiled kernels as MLX operations: `launch` makes a lazy one of a kernel's name.

An `mx.array` in Python holds its C++ array at a fixed place. MLX does not document it, so `kernels` compares what
C++ finds there with what Python says before any kernel runs. If something differs, or there is no compiler, one line
says so, and stock operations take the kernels' place. DBRX_FN_KERNELS=0 asks for that, and DBRX_FN_THREADS gives the
number of threads.
"""

import ctypes
import functools
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from dbrx_fn.ops.kernels.cpu.build import MLX_VERSION, BuildError, built_library
from dbrx_fn.runtime.cores import usable_cores
from dbrx_fn.runtime.device import as_if, backend, on_cpu, takes_kernels

logger = logging.getLogger("dbrx_fn.kernels")

_PLACE = 24
"""Where nanobind keeps the C++ array in a Python object, in bytes (`nb_inst` in nanobind's nb_internals.h)."""
_DTYPES = (mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.int32, mx.uint8)
"""In the order of `DTYPES` in binding.cpp."""
_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
_MOST_THREADS = 256


class Output(NamedTuple):
    """A kernel's result. `taken` is the place of the input whose contents it starts with, or -1.

    That input's memory becomes the output's, if nobody else holds it. Else it is copied first.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    taken: int = -1


@dataclass(frozen=True)
class Twin:
    """A kernel's stock operations: `function(inputs, *static)` returns the outputs. MLX's transformations take them.

    A process keeps each twin that it has met. So `static` holds what a model determines, and no sizes of batches or
    caches, which the inputs tell.
    """

    function: Callable[..., Sequence[mx.array]]
    static: tuple[Hashable, ...] = ()


def has_kernels() -> bool:
    """Whether kernels for the CPU run now: the default device is a CPU, and there is a library."""
    return takes_kernels() and on_cpu() and backend() == "cpu" and kernels() is not None


class Operands:
    """Arrays as C++ finds them. `None` stands for a leaf that isn't there, and is left out of a kernel's inputs."""

    def __init__(self, arrays: Sequence[mx.array | None]) -> None:
        self.arrays = arrays
        self.addresses = (ctypes.c_void_p * len(arrays))(
            *[None if array is None else id(array) + _PLACE for array in arrays]
        )

    def signature(self) -> bytes:
        """Their shapes and dtypes, and which are there, as bytes that are equal for equal ones."""
        library = kernels()
        assert library is not None
        room = 40 * len(self.arrays)
        to = ctypes.create_string_buffer(room)
        used = library.dbrx_signature(len(self.arrays), self.addresses, to, room)
        assert used >= 0
        return to.raw[:used]


class Launch:
    """A kernel with all that doesn't change from call to call.

    Args:
        kernel: its name in the C++ sources (`DBRX_KERNEL`).
        outputs: shapes, dtypes, and inputs whose contents they start with.
        numbers: whole numbers that the kernel gets.
        constants: floats that it gets.
        twin: its stock operations.
    """

    def __init__(
        self,
        kernel: str,
        outputs: Sequence[Output],
        *,
        numbers: Sequence[int] = (),
        constants: Sequence[float] = (),
        twin: Twin,
    ) -> None:
        layout = [n for one in outputs for n in (_NUMBERS[one.dtype], one.taken, len(one.shape), *one.shape)]
        self._outputs = len(outputs)
        self._function = _function(kernel)
        self._rest = (
            (ctypes.c_int * len(layout))(*layout),
            len(numbers),
            (ctypes.c_int64 * len(numbers))(*numbers),
            len(constants),
            (ctypes.c_float * len(constants))(*constants),
            _number(twin),
        )

    def __call__(self, inputs: Operands) -> list[mx.array]:
        """The outputs, lazily. Strided inputs are copied when the kernel runs."""
        library = kernels()
        assert library is not None
        made = [mx.array(0) for _ in range(self._outputs)]
        addresses = Operands(made).addresses
        count = len(inputs.arrays)
        if library.dbrx_launch(self._function, count, inputs.addresses, len(made), addresses, *self._rest):
            raise RuntimeError(library.dbrx_problem().decode(errors="replace"))
        return made


def launch(
    kernel: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[Output],
    *,
    numbers: Sequence[int] = (),
    constants: Sequence[float] = (),
    twin: Twin,
) -> list[mx.array]:
    """The outputs of a kernel, lazily. `has_kernels` must be true. `Launch` describes the arguments."""
    return Launch(kernel, outputs, numbers=numbers, constants=constants, twin=twin)(Operands(inputs))


def set_threads(threads: int) -> None:
    """Has kernels run in this many threads from now on, or in as many as the machine gives this process.

    Results are the same bits for any number.
    """
    library = kernels()
    if library is not None:
        library.dbrx_set_threads(max(1, min(threads, _MOST_THREADS)))


_loading = threading.Lock()


@functools.cache
def kernels() -> ctypes.PyDLL | None:
    """The library, compiled if need be; `None` if it can't be used. The logger `dbrx_fn.kernels` says why."""
    # Threads that ask at the same time get one library.
    with _loading:
        return _kernels()


@functools.cache
def _kernels() -> ctypes.PyDLL | None:
    if os.environ.get("DBRX_FN_KERNELS") == "0":
        return None
    try:
        return _load()
    except (BuildError, OSError, AttributeError) as error:
        logger.warning(
            "dbrx_fn's kernels for the CPU aren't used: %s. Slower stock operations take their place.", error
        )
        return None


def _load() -> ctypes.PyDLL:
    _check_objects()
    path, temporary = built_library()
    try:
        library = ctypes.PyDLL(str(path))
    finally:
        if temporary:
            shutil.rmtree(path.parent, ignore_errors=True)
    for name in ("dbrx_problem", "dbrx_running_version"):
        getattr(library, name).restype = ctypes.c_char_p
    library.dbrx_launch.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    ]
    library.dbrx_signature.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    library.dbrx_assign.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.dbrx_assign.restype = None
    library.dbrx_describe.argtypes = [ctypes.c_void_p] * 3
    _check_versions(library)
    _check_arrays(library)
    library.dbrx_set_call_twin.argtypes = [_CallTwin]
    library.dbrx_set_call_twin(_call_twin)
    library.dbrx_set_threads(default_threads())
    return library


def default_threads() -> int:
    """DBRX_FN_THREADS, or the number of cores that this process may use."""
    wanted = os.environ.get("DBRX_FN_THREADS", "")
    cores = usable_cores()
    if not wanted:
        return min(cores, _MOST_THREADS)
    if not wanted.isdecimal() or not 1 <= int(wanted) <= _MOST_THREADS:
        logger.warning("DBRX_FN_THREADS is %r where 1 to %d is expected: %d is taken.", wanted, _MOST_THREADS, cores)
        return min(cores, _MOST_THREADS)
    if int(wanted) > cores:
        logger.warning("DBRX_FN_THREADS is %s and this process may use %d cores: they take turns.", wanted, cores)
    return int(wanted)


@functools.cache
def _function(kernel: str) -> int | None:
    library = kernels()
    assert library is not None
    return ctypes.cast(getattr(library, f"dbrx_kernel_{kernel}"), ctypes.c_void_p).value


def _check_objects() -> None:
    """Raises `BuildError` unless Python's arrays look as expected from outside, before a pointer is followed."""
    place = _PLACE + 2 * ctypes.sizeof(ctypes.c_void_p)
    objects = [mx.array(0), mx.zeros((2, 3))]
    offsets = {ctypes.c_int32.from_address(id(one) + 16).value for one in objects}
    if sys.implementation.name != "cpython" or not place <= mx.array.__basicsize__ <= place + 16 or offsets != {_PLACE}:
        raise BuildError("arrays of this version of Python or MLX are laid out in another way")


def _check_versions(library: ctypes.PyDLL) -> None:
    numbers = [int(part) for part in MLX_VERSION.split(".dev")[0].split("+")[0].split(".")[:3]]
    python = 100_000 * numbers[0] + 1000 * numbers[1] + numbers[2]
    running = library.dbrx_running_version().decode()
    if python != library.dbrx_mlx_version() or running.split(".dev")[0] != MLX_VERSION.split(".dev")[0]:
        raise BuildError(f"MLX's headers aren't those of MLX {MLX_VERSION}, which runs")


def _check_arrays(library: ctypes.PyDLL) -> None:
    """Raises `BuildError` unless C++ sees the shapes and dtypes that Python sees."""
    shapes = ((), (1,), (5,), (2, 3), (4, 1, 7), (2, 3, 4, 5))
    cases = [(shape, dtype) for shape in shapes for dtype in _DTYPES]
    found, axes, dtype_number = [], (ctypes.c_int * 8)(), ctypes.c_int()
    if library.dbrx_array_size() != 2 * ctypes.sizeof(ctypes.c_void_p):
        raise BuildError("arrays of this version of MLX have another size")
    for shape, dtype in cases:
        one = mx.zeros(shape, dtype)
        count = library.dbrx_describe(id(one) + _PLACE, axes, ctypes.byref(dtype_number))
        found.append((tuple(axes[: max(0, count)]), dtype_number.value))
    if found != [(shape, _NUMBERS[dtype]) for shape, dtype in cases]:
        raise BuildError("C++ and Python see other arrays")


_twins: dict[int, Twin] = {}


@functools.cache
def _number(twin: Twin) -> int:
    _twins[len(_twins)] = twin
    return len(_twins) - 1


_CallTwin = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


@_CallTwin  # type: ignore[untyped-decorator]
def _call_twin(number: int, inputs: Any, n_inputs: int, outputs: Any, n_outputs: int) -> int:
    """Has a twin make C++ arrays of C++ arrays."""
    library = kernels()
    assert library is not None
    size = library.dbrx_array_size()
    try:
        given = [mx.array(0) for _ in range(n_inputs)]
        for place, array in enumerate(given):
            library.dbrx_assign(inputs + place * size, id(array) + _PLACE)
        twin = _twins[number]
        with as_if(kernels=False):
            made = twin.function(given, *twin.static)
        for place, array in zip(range(n_outputs), made, strict=True):
            library.dbrx_assign(id(array) + _PLACE, outputs + place * size)
    except Exception:
        traceback.print_exc()
        return 1
    return 0
