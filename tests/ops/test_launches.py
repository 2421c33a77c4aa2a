"""Which kernels are launched on which GPU, traced without one. `nox -s targets` compiles them."""

from pathlib import Path

import pytest

from dbrx_fn.ops.kernels import cuda_module, decode_attention, nvrtc
from dbrx_fn.ops.kernels.cuda_module import FOLDER, on_gpu, on_hopper
from dbrx_fn.runtime.device import Gpu, as_if
from tests.targets.launches import launches

H100, A100, GB10 = Gpu((9, 0), 132), Gpu((8, 0), 108), Gpu((12, 1), 48)


def included(file: Path) -> set[str]:
    """The names of all headers that a source includes, directly or not."""
    names = {line.split('"')[1] for line in file.read_text().splitlines() if line.startswith('#include "')}
    return names.union(*(included(FOLDER / name) for name in names))


def test_every_kernel_is_launched_by_one_of_dbrx_s_steps_on_a_hopper_gpu() -> None:
    assert launches(H100)


@pytest.mark.parametrize("gpu", [A100, GB10], ids=str)
def test_other_gpus_get_the_kernels_that_need_no_hopper(gpu: Gpu) -> None:
    launched = {launch.kernel.file for launch in launches(gpu)}
    assert {"short_segments", "project_qkv", "decode_attention", "norm_router"} <= launched
    assert not [file for file in launched if "hopper.cuh" in included(FOLDER / f"{file}.cu")]


@pytest.mark.parametrize(
    ("wanted", "taken"), [(None, {H100}), (True, {H100, A100, GB10}), (False, set())], ids=["unset", "1", "0"]
)
def test_gpus_that_nobody_has_measured_take_kernels_only_on_request(
    wanted: bool | None, taken: set[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "_WANTED", wanted)
    monkeypatch.setattr(cuda_module, "_can_run", cuda_module._can_run.__wrapped__)
    monkeypatch.setattr(nvrtc, "compiles_for", lambda capability: True)
    for gpu in (H100, A100, GB10, Gpu((7, 5), 72)):
        with as_if(gpu=gpu):
            assert on_gpu() == (gpu in taken)
            assert on_hopper() == (gpu in taken and gpu == H100)
            with as_if(kernels=False):
                assert not on_gpu()


def test_attention_has_as_many_splits_as_fill_the_gpu() -> None:
    splits = []
    for gpu in (H100, A100, GB10):
        with as_if(gpu=gpu):
            splits.append(decode_attention._splits(8, 32_768))
    assert splits == [49, 40, 18]
