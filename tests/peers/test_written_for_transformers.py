"""A checkpoint written here, given to transformers as a user would, computes what it does here: nothing is repaired."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DbrxConfig

from dbrx_fn.checkpoints.config_file import read_config
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.convert import main as convert
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Activation, AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward
from tests.peers import reference
from tests.support.trees import relative_error

BAR = 2e-5
CONFIG = Config(
    d_model=64,
    n_heads=4,
    n_layers=2,
    max_seq_len=256,
    vocab_size=50,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=48, moe_num_experts=5, moe_top_k=3),
    # Wide enough that heads attend to something, so that a wrong angle is seen.
    initializer_range=0.2,
    dtype="float32",
)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=200).tolist()

Measured = Callable[[str, float], float]


def error_of(folder: Path, config: Config) -> float:
    """How far transformers is from here, on the same folder."""
    params = init_params(config, mx.random.key(0))
    save(folder, params, config, layout="fused")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.train(False)
    assert model.dtype == getattr(torch, config.dtype)
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return relative_error(reference.transformers_logits(model, TOKENS), np.array(logits[0].astype(mx.float32)))


@pytest.mark.parametrize(
    "changed",
    [
        *[{"attn": {"rope_theta": theta}} for theta in (500_000.0, 10_000.0, 1e6, 123.5)],
        {"attn": {"rope_theta": 500_000, "clip_qkv": 1}},
        *[{"ffn": {"moe_normalize_expert_weights": p}} for p in (None, 1, 2, 0.5)],
        *[{"ffn": {"ffn_act_fn": name}} for name in get_args(Activation)],
        {"ffn": {"moe_top_k": 1, "moe_loss_weight": 0, "moe_jitter_eps": 0}},
        {"ffn": {"moe_top_k": 5, "moe_loss_weight": 1, "moe_jitter_eps": 0.1}},
        {"attn": {"kv_n_heads": 1}, "top": {"initializer_range": 0.1, "max_seq_len": 200}},
    ],
    ids=str,
)
def test_whatever_the_config_says(changed: dict[str, dict[str, Any]], tmp_path: Path, measured: Measured) -> None:
    attn, ffn = replace(CONFIG.attn, **changed.get("attn", {})), replace(CONFIG.ffn, **changed.get("ffn", {}))
    config = replace(CONFIG, attn=attn, ffn=ffn, **changed.get("top", {}))
    assert measured("saved here, transformers", error_of(tmp_path / "dbrx", config)) <= BAR


@pytest.mark.parametrize(("dtype", "bar"), [("float16", 2e-2), ("bfloat16", 2e-1)])
def test_dtypes_are_kept(dtype: Any, bar: float, tmp_path: Path) -> None:
    """Whose router rounds in them, and then chooses other experts now and then."""
    assert error_of(tmp_path / "dbrx", replace(CONFIG, dtype=dtype)) <= bar


def test_converted_from_another_layout(tmp_path: Path, measured: Measured) -> None:
    params = init_params(CONFIG, mx.random.key(0))
    save(tmp_path / "split", params, CONFIG, layout="split")
    assert convert([str(tmp_path / "split"), str(tmp_path / "fused"), "--layout", "fused"]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    logits, _ = forward(params, mx.array([TOKENS]), init_cache(CONFIG, 1, 0))
    error = relative_error(reference.transformers_logits(model, TOKENS), np.array(logits[0]))
    assert measured("converted here, transformers", error) <= BAR


def test_every_field_that_transformers_has_is_what_it_is_here(tmp_path: Path) -> None:
    """By name, so that one that it gains is looked at; what isn't written has a default that changes nothing."""
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_normalize_expert_weights=None, moe_jitter_eps=0.25))
    save(tmp_path / "dbrx", init_params(config, mx.random.key(0)), config, layout="fused")
    theirs: Any = AutoConfig.from_pretrained(tmp_path / "dbrx")
    assert isinstance(theirs, DbrxConfig)
    base = {field.name for field in fields(DbrxConfig.__mro__[1])}
    attn, ffn = theirs.attn_config, theirs.ffn_config
    own = [{field.name for field in fields(part)} - base for part in (theirs, attn, ffn)]
    top, of_attn, of_ffn = own
    assert {name: getattr(attn, name) for name in of_attn} == {"attn_pdrop": 0.0, "clip_qkv": 8.0, "kv_n_heads": 2}
    assert {name: getattr(ffn, name) for name in of_ffn} == {
        "hidden_size": 64,
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": 48,
        "moe_num_experts": 5,
        "moe_top_k": 3,
        "moe_jitter_eps": 0.25,
        "moe_loss_weight": 0.01,
        "moe_normalize_expert_weights": None,
    }
    found = {name: getattr(theirs, name) for name in top - {"attn_config", "ffn_config"}}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    assert found == tokens | {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "vocab_size": 50,
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
        "use_cache": True,
        "initializer_range": 0.2,
        "output_router_logits": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
    }


def test_what_transformers_saves_again_is_read_here_without_a_warning(tmp_path: Path) -> None:
    """Warnings are errors in these tests."""
    save(tmp_path / "dbrx", init_params(CONFIG, mx.random.key(0)), CONFIG, layout="fused")
    assert read_config(tmp_path / "dbrx") == CONFIG
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dbrx")
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == CONFIG


def test_an_unclamped_model_is_an_error_there(tmp_path: Path) -> None:
    """Neither peer computes it; better an error than other logits."""
    config = replace(CONFIG, attn=replace(CONFIG.attn, clip_qkv=None))
    with pytest.raises(RuntimeError, match="clamp"):
        error_of(tmp_path / "dbrx", config)
