"""Which kernels the package launches, found by tracing it as if there were a GPU. Nothing is computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx

from dbrx_fn.benchmarks.random_weights import random_params
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import DBRX, Config
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels import cuda_module
from dbrx_fn.ops.kernels.cuda_module import FOLDER, Kernel
from dbrx_fn.ops.kernels.read_memory import read_memory, wave
from dbrx_fn.runtime.device import Gpu, as_if

FORMATS: tuple[Format | None, ...] = (None, Format(4, 64), Format(4, 32, "mxfp4"), Format(8, 64))
"""The weights' formats: bfloat16, and those that `convert` writes and kernels read."""
STEPS = ((1, 1), (8, 1), (16, 1), (32, 1), (64, 1), (1, 2), (1, 4), (1, 8), (8, 4), (1, 16), (1, 128), (1, 2048))
"""Numbers of sequences and of new tokens of each: decoding, several tokens at once, prompts."""
CAPACITY = 4096


class Launch(NamedTuple):
    """A kernel and the dynamic shared memory of its launch, in bytes."""

    kernel: Kernel
    shared_memory: int


@contextmanager
def recorded(gpu: Gpu) -> Iterator[set[Launch]]:
    """Within it, kernels are chosen as for `gpu`, and their launches are noted instead."""
    found: set[Launch] = set()
    kernels: dict[bytes, Kernel] = {}

    def compiled_kernel(kernel: Kernel, architecture: str) -> bytes:
        code = repr(kernel).encode()
        kernels[code] = kernel
        return code

    def precompiled_cuda_kernel(
        *,
        compiled_source: bytes,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        shared_memory: int,
        **_: Any,
    ) -> list[mx.array]:
        found.add(Launch(kernels[compiled_source], shared_memory))
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    with (
        patch.object(cuda_module, "compiled_kernel", compiled_kernel),
        patch.object(mx.fast, "precompiled_cuda_kernel", precompiled_cuda_kernel),
        patch.object(cuda_module, "_can_run", lambda gpu: True),
        as_if(backend="cuda", compiles=False, kernels=True, gpu=gpu),
    ):
        yield found


def launches(gpu: Gpu, config: Config = DBRX, formats: Sequence[Format | None] = FORMATS) -> list[Launch]:
    """All launches of a model's steps in all formats, and of what the benchmarks measure, sorted.

    Raises:
        AssertionError: on a Hopper GPU, if no step launches one of the package's kernels: STEPS or FORMATS need one
            more then.
    """
    # All layers but the last launch the same.
    config = replace(config, n_layers=2)
    with recorded(gpu) as found:
        for form in formats:
            wanted = {} if form is None else wanted_formats(config, Quantization(form, form, form, form))
            params = random_params(config, wanted, mx.random.key(0))
            for batch, time in STEPS:
                tokens = mx.zeros((batch, time), mx.int32)
                forward(params, tokens, init_cache(config, batch, CAPACITY), last_only=time > 16)
        read_memory(mx.zeros(wave() // 4, mx.uint32), 1)
    if gpu.capability == (9, 0):
        missing = {path.stem for path in FOLDER.glob("*.cu")} - {launch.kernel.file for launch in found}
        assert not missing, f"no step launches {', '.join(sorted(missing))}"
    return sorted(found, key=repr)
