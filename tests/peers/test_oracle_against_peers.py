"""The oracle computes what transformers and mlx-lm compute, wherever those compute what the config says."""

from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.peers import reference
from tests.support import oracle
from tests.support.checkpoints import random_config, random_tensors, rounded, write_fused, write_split

SEEDS = range(32)
MLX_LM_SEEDS = list(
    islice((s for s in count() if reference.mlx_lm_is_right(random_config(np.random.default_rng(s)))), 32)
)


def case(seed: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]], list[int]]:
    """A config, its tensors and 1 to 40 tokens; the first seed's are 40, the second's 1."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    time = {0: 40, 1: 1}.get(seed, int(rng.integers(1, 41)))
    tokens = rng.integers(config["vocab_size"], size=time).tolist()
    return config, random_tensors(config, rng), tokens


def error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers(seed: int) -> None:
    config, tensors, tokens = case(seed)
    model = reference.transformers_model(config, tensors, "float64")
    logits = oracle.forward(config, tensors, tokens)
    assert error(reference.transformers_logits(model, tokens), logits) <= 1e-6
    exact = reference.transformers_logits(reference.in_float64(model), tokens)
    assert error(exact, logits) <= 1e-13


@pytest.mark.parametrize("seed", MLX_LM_SEEDS)
def test_logits_equal_mlx_lm(seed: int, tmp_path: Path) -> None:
    config, tensors, tokens = case(seed)
    write_fused(tmp_path, config, tensors)
    actual = reference.mlx_lm_logits(reference.mlx_lm_model(tmp_path), tokens)
    assert error(actual, oracle.forward(config, tensors, tokens)) <= 5e-6


@pytest.mark.parametrize("act", oracle.ACTIVATIONS)
def test_activations_equal_transformers(act: str) -> None:
    config, tensors, tokens = case(0)
    config["ffn_config"]["ffn_act_fn"] = {"name": act}
    model = reference.in_float64(reference.transformers_model(config, tensors, "float64"))
    assert error(reference.transformers_logits(model, tokens), oracle.forward(config, tensors, tokens)) <= 1e-13


@pytest.mark.parametrize("p", [1.5, 3])
def test_other_norms_equal_transformers(p: float) -> None:
    config, tensors, tokens = case(0)
    config["ffn_config"] |= {"moe_top_k": 2, "moe_normalize_expert_weights": p}
    model = reference.in_float64(reference.transformers_model(config, tensors, "float64"))
    assert error(reference.transformers_logits(model, tokens), oracle.forward(config, tensors, tokens)) <= 1e-13


def test_absent_keys_mean_their_defaults() -> None:
    config, tensors, tokens = case(0)
    config["attn_config"]["clip_qkv"] = None
    config["ffn_config"] |= {"moe_normalize_expert_weights": 1, "ffn_act_fn": {"name": "silu"}}
    explicit = oracle.forward(config, tensors, tokens)
    del config["attn_config"]["clip_qkv"]
    del config["ffn_config"]["moe_normalize_expert_weights"], config["ffn_config"]["ffn_act_fn"]
    np.testing.assert_array_equal(oracle.forward(config, tensors, tokens), explicit)


@pytest.mark.parametrize("seed", MLX_LM_SEEDS[:4])
def test_greedy_continuations_agree(seed: int, tmp_path: Path) -> None:
    config, tensors, tokens = case(seed)
    write_fused(tmp_path, config, tensors)
    expected = oracle.greedy(config, tensors, tokens, 12)
    assert reference.transformers_greedy(reference.transformers_model_from(tmp_path), tokens, 12) == expected
    assert reference.mlx_lm_greedy(reference.mlx_lm_model(tmp_path), tokens, 12) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_written_folders_hold_the_same_model(dtype: Any, shards: int, tmp_path: Path) -> None:
    config, tensors, tokens = case(MLX_LM_SEEDS[0])
    write_fused(tmp_path / "fused", config, tensors, shards=shards, dtype=dtype)
    write_split(tmp_path / "split", config, tensors, shards=shards, dtype=dtype)
    fused, split = (reference.mlx_lm_model(tmp_path / layout) for layout in ("fused", "split"))
    np.testing.assert_array_equal(reference.mlx_lm_logits(fused, tokens), reference.mlx_lm_logits(split, tokens))

    model = reference.transformers_model_from(tmp_path / "fused", "float64")
    expected = oracle.forward(config, rounded(tensors, dtype), tokens)
    assert error(reference.transformers_logits(model, tokens), expected) <= 1e-6


@pytest.mark.parametrize("p", [2, None])
def test_mlx_lm_ignores_the_norm_of_the_expert_weights(p: int | None, tmp_path: Path) -> None:
    """Fails when mlx-lm repairs this: then `mlx_lm_is_right` is too strict."""
    config, tensors, tokens = case(0)
    config["ffn_config"] |= {"moe_top_k": 2, "moe_normalize_expert_weights": p}
    write_fused(tmp_path, config, tensors)
    actual = reference.mlx_lm_logits(reference.mlx_lm_model(tmp_path), tokens)
    assert error(actual, oracle.forward(config, tensors, tokens)) > 1e-3
