"""Checkpoint folders: every form that is read gives the same model."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import check_params, param_count
from dbrx_fn.ops.kernels.cuda_module import on_gpu
from dbrx_fn.runtime.device import as_if
from tests.support import checkpoints, oracle
from tests.support.loading import (
    DTYPES,
    INDEX,
    MEMORY,
    RAW,
    TENSORS,
    TOKENS,
    Writer,
    assert_same,
    both_layouts,
    full_size,
    leaves,
    logits,
)


@both_layouts
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_logits_are_the_oracles(write: Writer, shards: int, tmp_path: Path) -> None:
    write(tmp_path, RAW, TENSORS, shards=shards)
    params, config = load(tmp_path)
    check_params(params, config)
    expected = oracle.forward(RAW, TENSORS, TOKENS)
    np.testing.assert_allclose(logits(params, config), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_forms_give_the_same_tree(dtype: Dtype, tmp_path: Path) -> None:
    """To the last bit, so that the oracle's word on one form holds for all."""
    expected = checkpoints.rounded(TENSORS, dtype)
    trees = []
    for number, (write, shards) in enumerate(
        (write, shards) for write in (checkpoints.write_fused, checkpoints.write_split) for shards in (1, 2, 3, 4, 5)
    ):
        folder = tmp_path / str(number)
        write(folder, RAW, TENSORS, shards=shards, dtype=dtype)
        params, config = load(folder)
        assert config.dtype == dtype
        trees.append(params)
    for params in trees[1:]:
        assert_same(params, trees[0])
    found = leaves(trees[0])
    for path, leaf in found.items():
        assert leaf.dtype == getattr(mx, dtype)
        name = path.removesuffix(".weight") if ".experts." in path else path
        tensor = expected[name]
        if ".experts." in path:
            tensor = tensor.reshape(3, 5, 12)
            tensor = tensor.swapaxes(1, 2) if ".w2." in path else tensor
        assert np.array_equal(np.array(leaf.astype(mx.float32)), tensor), path


@both_layouts
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_dtype_converts(write: Writer, lazy: bool, stored: Dtype, asked: Dtype, tmp_path: Path) -> None:
    write(tmp_path, RAW, TENSORS, dtype=stored)
    params, config = load(tmp_path, dtype=asked, lazy=lazy)
    assert config.dtype == asked
    check_params(params, config)
    wte = np.array(leaves(params)["transformer.wte.weight"].astype(mx.float32))
    twice = checkpoints.rounded(checkpoints.rounded(TENSORS, stored), asked)
    assert np.array_equal(wte, twice["transformer.wte.weight"])


@pytest.mark.parametrize("said", [{"torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": None}])
def test_the_tensors_dtype_counts_not_the_configs(said: dict[str, Any], fused: Path) -> None:
    (fused / "config.json").write_text(json.dumps(RAW | said))
    params, config = load(fused)
    assert config.dtype == "float32"
    check_params(params, config)


def test_shards_without_an_index(sharded: Path, tmp_path: Path) -> None:
    expected, _ = load(sharded)
    (sharded / INDEX).unlink()
    params, _ = load(sharded)
    assert_same(params, expected)


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    expected, _ = load(sharded)
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    params, _ = load(sharded)
    assert_same(params, expected)


def test_path_as_text(fused: Path) -> None:
    assert_same(load(str(fused))[0], load(fused)[0])


def test_progress_ends_at_the_total(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    params, _ = load(sharded, progress=lambda done, total: calls.append((done, total)))
    total = sum(leaf.nbytes for leaf in leaves(params).values())
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert len(done) > 10


LARGE = RAW | {"d_model": 600, "vocab_size": 10_000}
"""The embedding alone is 24 MB, far more than what else comes and goes while a test runs."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    checkpoints.write_fused(tmp_path / "large", LARGE, checkpoints.random_tensors(LARGE, np.random.default_rng(0)))
    return tmp_path / "large"


def test_lazy_reads_nothing_before_use(large: Path) -> None:
    mx.synchronize()
    before = mx.get_active_memory()
    calls: list[int] = []
    params, _ = load(large, lazy=True, progress=lambda done, total: calls.append(done))
    assert mx.get_active_memory() - before < 2**20
    assert calls == []
    norm = params["transformer"]["norm_f"]["weight"]
    mx.eval(norm)
    assert norm.shape == (600,)
    assert mx.get_active_memory() - before < 2**20
    mx.eval(params["transformer"]["wte"])
    assert mx.get_active_memory() - before >= 24_000_000


def test_all_is_read_unless_lazy(large: Path) -> None:
    """The files may go once `load` has returned."""
    mx.synchronize()
    before = mx.get_active_memory()
    params, config = load(large)
    assert mx.get_active_memory() - before >= 24_000_000
    for file in large.iterdir():
        os.truncate(file, 0)
    check_params(params, config)
    assert mx.isfinite(params["lm_head"]["weight"]).all()


@both_layouts
def test_reading_holds_no_tensor_twice(write: Writer, tmp_path: Path) -> None:
    raw = LARGE | {"ffn_config": {"ffn_hidden_size": 3000, "moe_num_experts": 4, "moe_top_k": 2}}
    write(tmp_path, raw, checkpoints.random_tensors(raw, np.random.default_rng(0), np.float32), dtype="float16")
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    params, _ = load(tmp_path)
    sizes = [leaf.nbytes for leaf in leaves(params).values()]
    # The leaf that is being put together, its tensors, and what stays of them.
    assert mx.get_peak_memory() - before < sum(sizes) + 2 * max(sizes) + 2**20


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="GPUs compute in what is stored")
def test_a_cpu_computes_in_float32_where_that_fits(tmp_path: Path) -> None:
    checkpoints.write_fused(tmp_path / "small", RAW, TENSORS, dtype="bfloat16")
    assert computing_dtype(tmp_path / "small") == "float32"
    config = full_size(tmp_path / "large")
    assert 4 * param_count(config) > MEMORY
    assert computing_dtype(tmp_path / "large") is None


@pytest.mark.skipif(not on_gpu(), reason="needs a GPU that the kernels run on")
def test_a_gpu_with_kernels_computes_in_bfloat16_where_float16_is_stored(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        checkpoints.write_fused(tmp_path / dtype, RAW, TENSORS, dtype=dtype)
        assert computing_dtype(tmp_path / dtype) == ("bfloat16" if dtype == "float16" else None)
    with as_if(kernels=False):
        assert computing_dtype(tmp_path / "float16") is None
