"""Choices as for another device, made on this one."""

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from dbrx_fn.runtime.compile import compiled
from dbrx_fn.runtime.device import as_if, backend, compiles, takes_kernels


def test_another_back_end_is_chosen_for_and_then_no_longer() -> None:
    own = backend(), compiles()
    with as_if(backend="metal", compiles=True):
        assert (backend(), compiles()) == ("metal", True)
        with as_if(backend="cuda"):
            assert (backend(), compiles()) == ("cuda", True)
        assert (backend(), compiles()) == ("metal", True)
    assert (backend(), compiles()) == own


def test_an_error_ends_it_too() -> None:
    own = backend()
    with pytest.raises(ValueError, match="within"), as_if(backend="metal"):
        raise ValueError("within")
    assert backend() == own


def test_other_threads_choose_for_their_own_device() -> None:
    found: list[str] = []
    with as_if(backend="metal"):
        thread = threading.Thread(target=lambda: found.append(backend()))
        thread.start()
        thread.join()
    assert found == [backend()]


def test_a_trace_of_one_back_end_is_not_used_for_another() -> None:
    @compiled
    def on_metal(x: mx.array) -> mx.array:
        return x + 1 if backend() == "metal" else x

    for _ in range(2):
        for machine, expected in (("cpu", 0), ("metal", 1), ("cuda", 0)):
            for compile_it in (False, True):
                with as_if(backend=machine, compiles=compile_it):  # type: ignore[arg-type]
                    assert on_metal(mx.zeros(1)).item() == expected


def test_a_trace_with_kernels_is_not_used_without() -> None:
    @compiled
    def with_kernels(x: mx.array) -> mx.array:
        return x + 1 if takes_kernels() else x

    for compile_it in (False, True):
        for kernels in (True, False, True):
            with as_if(compiles=compile_it, kernels=kernels):
                assert with_kernels(mx.zeros(1)).item() == kernels
    assert takes_kernels()


@pytest.mark.parametrize(("said", "expected"), [("1", "True"), ("0", "False")])
def test_the_environment_says_whether_layers_are_compiled(said: str, expected: str) -> None:
    script = "from dbrx_fn.runtime.device import compiles; print(compiles())"
    ran = subprocess.run(
        [sys.executable, "-c", script], env={"DBRX_FN_COMPILE": said}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == expected


def test_what_the_environment_says_wrongly_is_warned_of() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import dbrx_fn"], env={"DBRX_FN_COMPILE": "yes"}, capture_output=True, text=True
    )
    assert ran.returncode == 0
    assert "DBRX_FN_COMPILE is 'yes' where 0 or 1 is expected" in ran.stderr
