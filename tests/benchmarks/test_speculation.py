"""Texts that are known beforehand: greedy decoding follows them in every format, and speculation copies repetitions."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.bench import main
from dbrx_fn.benchmarks.random_weights import random_params
from dbrx_fn.benchmarks.speculation import following
from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import check_params
from dbrx_fn.model.quantization import Quantization, tree_formats, wanted_formats
from dbrx_fn.ops.formats import Format, format_of_mode

CONFIG = Config(
    d_model=128,
    n_heads=4,
    n_layers=3,
    max_seq_len=512,
    vocab_size=900,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=128, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [None, Format(4, 64), Format(8, 32), format_of_mode("mxfp4")], ids=str)
def test_greedy_text_is_the_permutation(form: Format | None, dtype: Dtype) -> None:
    config = replace(CONFIG, dtype=dtype)
    formats = {} if form is None else wanted_formats(config, Quantization(*[form] * 4))
    after = np.random.default_rng(1).permutation(config.vocab_size)
    params = following(random_params(config, formats, mx.random.key(0)), config, formats, after)
    check_params(params, config)
    assert tree_formats(params, config) == formats
    made = list(stream_tokens(params, config, [5, 9, 7], max_tokens=30))
    assert made == [after[token] for token in [7, *made[:-1]]]


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "narrow.json").write_text(json.dumps(config_to_dict(CONFIG)))
    return str(tmp_path / "narrow.json")


def test_what_copies_itself_takes_few_passes_and_what_never_repeats_one_a_token(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["speculation", "--shape", shape, "--quantize", "4", "--prompt", "320", "--tokens", "64"]
    assert main([*arguments, "--repeats", "2", "--json"]) == 0
    copied, new = json.loads(capsys.readouterr().out)
    for speed in (copied, new):
        assert (speed["prompt"], speed["tokens"], speed["other_tokens"]) == (320, 64, 0)
        assert len(speed["off"]) == len(speed["on"]) == 2
        assert speed["gain"] == pytest.approx(sum(speed["on"]) / sum(speed["off"]))
    assert new["passes"] == 63
    assert copied["passes"] < 63
    assert main([*arguments, "--repeats", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "gain" in header
    assert [row.split()[0] for row in rows] == ["copies", "never"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "500", "--tokens", "13"], "come to 513 tokens, and the longest text"),
        (["--tokens", "1"], "--tokens is 1 where it must be at least 2"),
        (["--tokens", "64"], "--prompt is 8 where it must be at least 300: the text that copies itself begins again"),
        (["--repeats", "0"], "--repeats is 0 where it must be at least 1"),
    ],
)
def test_impossible_texts_are_refused(
    options: list[str], message: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speculation", "--shape", shape, "--prompt", "8", *options]) == 2
    assert message in capsys.readouterr().err
