"""The bench's mlx-lm runs the same weights after the same context: it makes the same tokens."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn.bench import main
from dbrx_fn.benchmarks.inference import our_program
from dbrx_fn.benchmarks.mlx_lm import check_mlx_lm, mlx_lm_program
from dbrx_fn.benchmarks.random_weights import random_params
from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.quantization import Quantization, wanted_formats

CONFIG = Config(
    d_model=64,
    n_heads=2,
    n_layers=2,
    max_seq_len=512,
    vocab_size=50,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=1, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    initializer_range=0.3,
    dtype="float32",
)


@pytest.mark.parametrize("quantization", [None, Quantization(), Quantization(embedding=None)])
def test_both_decode_the_same_tokens_after_the_same_context(quantization: Quantization | None) -> None:
    formats = {} if quantization is None else wanted_formats(CONFIG, quantization)
    params = random_params(CONFIG, formats, mx.random.key(1))
    ours, theirs = our_program(params, CONFIG), mlx_lm_program(params, CONFIG, formats)
    start = mx.array([3, 14, 15], mx.int32)
    made: list[list[int]] = []
    for program in (ours, theirs):
        step, tokens = program.decoder(7, 3, 64, 1), [start]
        for _ in range(10):
            tokens.append(step(tokens[-1]).astype(mx.int32))
        made.append([int(token) for row in tokens for token in row])
    assert len(set(made[0])) > 5
    assert made[0] == made[1]


def test_the_command_measures_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(config_to_dict(CONFIG)))
    options = ["--prompt", "5", "--context", "7", "--batch-size", "2", "--tokens", "2", "--repeats", "1", "--json"]
    assert main(["inference", "--shape", str(tmp_path / "tiny.json"), "--peer", "mlx-lm", *options]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"][1:]
    assert [figure["program"] for figure in figures] == ["dbrx_fn", "mlx-lm"] * 3
    assert all(figure["missing"] is None and figure["seconds"] > 0 for figure in figures)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="GPUs compute in what is stored")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_each_computes_in_the_dtype_that_its_users_get(
    dtype: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = replace(CONFIG, dtype="bfloat16")
    save(tmp_path / "model", random_params(stored, {}, mx.random.key(2)), stored)
    (tmp_path / "tiny.json").write_text(json.dumps(config_to_dict(stored)))
    options = ["--prompt", "5", "--context", "7", "--batch-size", "2", "--tokens", "2", "--repeats", "1", "--json"]
    if dtype is not None:
        options += ["--dtype", dtype]
    for model in (["--model", str(tmp_path / "model")], ["--shape", str(tmp_path / "tiny.json")]):
        assert main(["inference", *model, "--peer", "mlx-lm", *options]) == 0
        made, *figures = json.loads(capsys.readouterr().out)["figures"]
        assert [figure["dtype"] for figure in (made, *figures)] == [dtype or "float32"] + [
            dtype or "float32",
            "bfloat16",
        ] * 3
        assert all(figure["missing"] is None for figure in figures)
        # Each has the bounds of what it reads.
        assert dtype or all(
            ours["bytes"] == 2 * theirs["bytes"] for ours, theirs in zip(figures[::2], figures[1::2], strict=True)
        )


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, attn=replace(CONFIG.attn, clip_qkv=None)),
        replace(CONFIG, ffn=replace(CONFIG.ffn, moe_normalize_expert_weights=2.0)),
        replace(CONFIG, ffn=replace(CONFIG.ffn, ffn_act_fn="gelu")),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(config: Config) -> None:
    with pytest.raises(InputError, match="mlx-lm computes no other"):
        check_mlx_lm(config)
