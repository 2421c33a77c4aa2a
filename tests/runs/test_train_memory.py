"""The memory that a run's states take."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import dbrx_fn.runs.loop
from dbrx_fn import train
from dbrx_fn.training.step import train_step
from tests.support import tiny_runs


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
