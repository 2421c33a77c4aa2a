"""Two processes that share a model compute what one process does."""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.params import own_part, param_spec
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.shard import Shard
from dbrx_fn.ops.formats import Format
from tests.support.checkpoints import QUANTIZABLE, random_config, random_tensors, write_fused
from tests.support.processes import run_processes
from tests.support.share_models import computed

Results = dict[str, mx.array]

CASES = ["the small model", "random 0", "random 1", "8 bits", "mxfp4", "bfloat16"]


def shareable(seed: int) -> dict[str, Any]:
    """A random `config.json` that two processes can share."""
    rng = np.random.default_rng(seed)
    raw = random_config(rng)
    heads = 2 * int(rng.integers(1, 4))
    raw |= {"n_heads": heads, "d_model": heads * 6, "vocab_size": 2 * int(rng.integers(30, 90))}
    raw["attn_config"]["kv_n_heads"] = heads if seed % 2 else 2
    raw["ffn_config"]["ffn_hidden_size"] = 2 * int(rng.integers(3, 30))
    return raw


def made_checkpoints(folder: Path) -> list[Path]:
    """The cases' checkpoints."""
    for name in ("random 0", "random 1", "bfloat16"):
        raw = shareable(int(name[-1])) if name != "bfloat16" else QUANTIZABLE
        tensors = random_tensors(raw, np.random.default_rng(5))
        write_fused(folder / name, raw, tensors, dtype="float32" if name != "bfloat16" else "bfloat16")
    write_fused(folder / "dense", QUANTIZABLE, random_tensors(QUANTIZABLE, np.random.default_rng(5)))
    params, config = load(folder / "dense")
    for name, form in (("8 bits", Format(8, 64)), ("mxfp4", Format(4, 32, "mxfp4"))):
        save(folder / name, quantize(params, config, Quantization(*[form] * 5)), config)
    params, config = load(SMALL)
    save(folder / CASES[0], dequantize(params, config), config)
    return [folder / name for name in CASES]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Results]]]:
    """Each case's checkpoint, and what each process computed of its part."""
    folder = tmp_path_factory.mktemp("shared")
    made = made_checkpoints(folder)
    for one in run_processes(["-m", "tests.support.share_models", str(folder), *map(str, made)]):
        assert one.status == 0, one.err

    def computed_by(rank: int, number: int) -> Results:
        return cast(Results, mx.load(str(folder / f"{rank}-{number}.safetensors")))

    return {name: (made[n], [computed_by(0, n), computed_by(1, n)]) for n, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_one_process(
    name: str, shared: dict[str, tuple[Path, list[Results]]]
) -> None:
    path, ranks = shared[name]
    whole = computed(*load(path))
    for results in ranks:
        if name == "bfloat16":
            # Rounding may choose another expert for some tokens.
            assert float(mx.abs(whole["prompt"] - results["prompt"]).mean()) < 0.02
            continue
        for part in ("prompt", "step"):
            scale = mx.abs(whole[part]).max()
            assert float(mx.abs(whole[part] - results[part]).max() / scale) < 5e-6
        assert mx.array_equal(results["tokens"], whole["tokens"]).item()


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_bits(name: str, shared: dict[str, tuple[Path, list[Results]]]) -> None:
    _, (first, second) = shared[name]
    for part in ("prompt", "step", "tokens"):
        assert mx.array_equal(first[part], second[part]).item()


@pytest.mark.parametrize("name", ["random 0", "random 1"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_parts_of_one_process_s(
    name: str, recompute: bool, shared: dict[str, tuple[Path, list[Results]]]
) -> None:
    path, ranks = shared[name]
    params, config = load(path)
    whole = computed(params, config)
    for rank, results in enumerate(ranks):
        assert results[f"loss {recompute}"].item() == pytest.approx(whole[f"loss {recompute}"].item(), rel=1e-6)
        for leaf, described in param_spec(config).items():
            expected = own_part(whole[f"{leaf} {recompute}"], described.cut, Shard(rank, 2))
            scale = mx.abs(whole[f"{leaf} {recompute}"]).max()
            assert float(mx.abs(results[f"{leaf} {recompute}"] - expected).max() / scale) < 1e-5, leaf
