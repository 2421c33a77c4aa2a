"""The memory that a run's states take."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import dbrx_fn.runs.loop
from dbrx_fn import train
from dbrx_fn.training import memory_plan
from dbrx_fn.training.memory_plan import MemoryPlan
from dbrx_fn.training.step import train_step
from tests.support import tiny_runs

Measured = Callable[[str, float], float]


def test_no_earlier_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step there is one state, as before the first."""
    active: list[int] = []
    nbytes = 0

    def measured(state: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal nbytes
        leaves: dict[str, mx.array] = dict(tree_flatten(state))
        mx.eval(state)
        nbytes = sum(leaf.nbytes for leaf in leaves.values())
        active.append(mx.get_active_memory())
        return train_step(state, *arguments, **options)

    monkeypatch.setattr(dbrx_fn.runs.loop, "train_step", measured)
    config = tiny_runs.write_config(tmp_path / "config.json", d_model=128)
    data = tiny_runs.write_text(tmp_path / "text.txt")
    options = tiny_runs.arguments(tmp_path / "run", config, [data], steps=4, save_every=2, eval_every=1)
    assert train.main(options) == 0
    assert len(active) == 4
    assert max(active) < active[0] + 0.5 * nbytes


def test_a_run_takes_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: Measured
) -> None:
    """A step's next state takes the memory of the one before it."""
    planned: list[int] = []

    def plan_memory(*arguments: Any, **options: Any) -> MemoryPlan:
        plan = memory_plan.plan_memory(*arguments, **options)
        planned.append(plan.peak)
        return plan

    def first_step(*arguments: Any, **options: Any) -> Any:
        if not taken:
            mx.reset_peak_memory()
        taken.append(0)
        return train_step(*arguments, **options)

    taken: list[int] = []
    monkeypatch.setattr(dbrx_fn.runs.loop, "plan_memory", plan_memory)
    monkeypatch.setattr(dbrx_fn.runs.loop, "train_step", first_step)
    config = tiny_runs.write_config(tmp_path / "config.json", d_model=256, n_layers=8)
    data = tiny_runs.write_text(tmp_path / "text.txt")
    gc.collect()
    before = mx.get_active_memory()
    options = tiny_runs.arguments(tmp_path / "run", config, [data], steps=4, save_every=9, held_out_share=0)
    assert train.main([*options, "--recompute"]) == 0
    peak = mx.get_peak_memory() - before
    assert measured("planned memory to that taken by a run", abs(planned[0] / peak - 1)) <= 0.1
    assert f"about {planned[0] / 2**20:.1f} MiB at the peak" in capsys.readouterr().err
