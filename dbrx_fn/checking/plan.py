"""All checks of this machine, the most important first. A machine that is too slow leaves out the last ones."""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.models import DBRX_EXPERTS, QUANTIZED, SHAPES, Model
from dbrx_fn.checking.of_models import check_models, format_group
from dbrx_fn.checking.of_operations import check_experts, check_positions
from dbrx_fn.checking.of_small_model import check_small_model
from dbrx_fn.checking.of_training import check_training
from dbrx_fn.model.config import Dtype
from dbrx_fn.ops.kernels.cpu.library import has_kernels
from dbrx_fn.ops.kernels.cuda_module import on_gpu
from dbrx_fn.runtime.device import Backend, on_cpu

_BRIEFLY = ("whole", "token by token")
"""The ways of passing tokens to `forward` when there isn't time for all."""
_COMMON = 5
"""Number of the most common quantized formats."""
_STOCK = "without this project's kernels"
"""The row of stock operations where kernels run."""


def planned(only: str | None = None) -> list[Check]:
    """The checks in their order: what users run comes first.

    Args:
        only: a text that the rows of the wanted checks hold; `None` for all checks.
    """
    usual: Dtype = "float32" if on_cpu() else "bfloat16"
    others = [dtype for dtype in get_args(Dtype) if dtype != usual]
    checks = [
        *_dense([usual]),
        *_quantized(QUANTIZED[:_COMMON], [usual]),
        *check_training("training"),
        *check_small_model(),
        *check_positions(),
        *_dense(others),
        *(_otherwise_on_a_cpu() if on_cpu() else _otherwise_on_a_gpu()),
        *_quantized(QUANTIZED[_COMMON:], [usual]),
        *_quantized(QUANTIZED, others),
        *(_compiled() if on_cpu() else ()),
    ]
    return [check for check in checks if only is None or only in check.group]


def _dense(dtypes: Sequence[Dtype]) -> Iterator[Check]:
    for dtype in dtypes:
        models = [*SHAPES, DBRX_EXPERTS] if dtype == "float32" else SHAPES
        yield from check_models(lambda dtype, way: f"forward, {dtype}, {way}", models, dtypes=[dtype])
        yield from check_experts(lambda dtype: f"experts, {dtype}", dtypes=[dtype])


def _quantized(models: Sequence[Model], dtypes: Sequence[Dtype]) -> Iterator[Check]:
    for dtype in dtypes:
        for model in models:
            yield from check_models(partial(_row, format_group(model)), [model], dtypes=[dtype], ways=_BRIEFLY)


def _row(name: str, *_: str) -> str:
    return name


def _otherwise_on_a_cpu() -> Iterator[Check]:
    """Checks without this project's kernels, if they run here, and with the choices of other back ends."""
    if has_kernels():
        yield from check_models(lambda dtype, _: f"{_STOCK}, {dtype}", SHAPES, dtypes=["float32"], kernels=False)
        yield from check_experts(lambda dtype: f"{_STOCK}, {dtype}", dtypes=["float32"], kernels=False)
        yield from check_models(
            lambda *_: f"{_STOCK}, quantized", QUANTIZED[:_COMMON], dtypes=["float32"], ways=_BRIEFLY, kernels=False
        )
    for other in get_args(Backend):
        if other != "cpu":
            yield from _arranged_as_on(other)


def _arranged_as_on(other: Backend) -> Iterator[Check]:
    row = f"arranged as on {other}"
    yield from check_models(lambda dtype, _: f"{row}, {dtype}", SHAPES, backend=other)
    yield from check_experts(lambda dtype: f"{row}, {dtype}", backend=other)
    yield from check_training(f"{row}, training", in_one=True, backend=other)
    yield from check_models(lambda *_: f"{row}, quantized", QUANTIZED, dtypes=["float32"], ways=_BRIEFLY, backend=other)


def _otherwise_on_a_gpu() -> Iterator[Check]:
    """Checks without this project's kernels, if they run here, and without compiling.

    Other back ends' choices aren't checked on a GPU, since its MLX kernels are made for its own.
    """
    if on_gpu():
        yield from check_models(lambda *_: _STOCK, SHAPES, dtypes=["bfloat16"], ways=_BRIEFLY, kernels=False)
    yield from check_models(lambda dtype, _: f"not compiled, {dtype}", SHAPES, ways=_BRIEFLY, compiles=False)
    yield from check_training("not compiled, training", in_one=True, compiles=False)


def _compiled() -> Iterator[Check]:
    """Checks with compiled layers, as on a GPU. MLX builds each kernel with g++, which takes half a second."""
    if shutil.which("g++"):
        yield from check_models(
            lambda *_: "compiled", SHAPES[:1], dtypes=["float32"], ways=_BRIEFLY, compiles=True, kernels=False
        )
