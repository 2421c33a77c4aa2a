"""Every form of `config.json` that there is, and what is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.checkpoints.config_file import config_from_dict, config_to_dict, read_config, read_config_file
from dbrx_fn.errors import ConfigError
from dbrx_fn.model.config import DBRX, AttnConfig, Config, FFNConfig

# The released databricks/dbrx-instruct's.
RELEASED: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {
        "AutoConfig": "configuration_dbrx.DbrxConfig",
        "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
    },
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}

# What transformers writes into nested configs when it saves a file again.
RESAVED_JUNK: dict[str, Any] = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "do_sample": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "length_penalty": 1.0,
    "max_length": 20,
    "pruned_heads": {},
    "temperature": 1.0,
    "tie_word_embeddings": True,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
}


def released(**changes: Any) -> dict[str, Any]:
    """The released file with fields set; `attn_config__clip_qkv` is `attn_config.clip_qkv`."""
    raw = copy.deepcopy(RELEASED)
    for name, value in changes.items():
        *parents, last = name.split("__")
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = value
    return raw


def test_the_released_file() -> None:
    assert config_from_dict(RELEASED) == DBRX
    assert (DBRX.head_dim, DBRX.qkv_dim, DBRX.dtype) == (128, 8192, "bfloat16")
    assert DBRX.ffn.moe_normalize_expert_weights == 1
    assert DBRX.ffn.ffn_act_fn == "silu"


def test_absent_fields_mean_the_references_defaults() -> None:
    expected = Config(
        d_model=2048,
        n_heads=16,
        n_layers=24,
        max_seq_len=2048,
        vocab_size=32000,
        attn=AttnConfig(clip_qkv=None, kv_n_heads=1, rope_theta=10000),
        ffn=FFNConfig(
            ffn_hidden_size=3584,
            moe_num_experts=4,
            moe_top_k=1,
            moe_normalize_expert_weights=1,
            ffn_act_fn="silu",
            moe_jitter_eps=None,
            moe_loss_weight=0.01,
        ),
        initializer_range=0.02,
        dtype="bfloat16",
    )
    assert config_from_dict({"model_type": "dbrx"}) == expected
    assert config_from_dict({"model_type": "dbrx", "attn_config": {}, "ffn_config": {}}) == expected
    assert config_from_dict({"model_type": "dbrx", "attn_config": None, "ffn_config": None}) == expected
    assert Config() == expected


def test_files_saved_again_by_transformers() -> None:
    raw = released()
    raw["attn_config"] |= RESAVED_JUNK
    raw["ffn_config"] |= RESAVED_JUNK
    assert config_from_dict(raw) == DBRX


def test_conversions_of_mlx_lm() -> None:
    quantization = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}
    assert config_from_dict(released(quantization=quantization, quantization_config=quantization)) == DBRX


@pytest.mark.parametrize("model_type", [None, "", "dbrx_converted"])
def test_architectures_say_it_too(model_type: str | None) -> None:
    assert config_from_dict(released(model_type=model_type)) == DBRX


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": None, "dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32", "dtype": "float16"}, "float16"),
    ],
)
def test_dtype_by_either_name(changes: dict[str, Any], dtype: str) -> None:
    assert config_from_dict(released(**changes)).dtype == dtype


def test_whole_numbers_may_be_written_as_floats_and_the_other_way_round() -> None:
    raw = released(d_model=6144.0, ffn_config__moe_top_k=4.0, attn_config__clip_qkv=8.0, initializer_range=1)
    raw["ffn_config"]["moe_normalize_expert_weights"] = 1
    config = config_from_dict(raw)
    assert config == replace(DBRX, initializer_range=1.0)
    assert type(config.d_model) is type(config.ffn.moe_top_k) is int
    assert type(config.ffn.moe_normalize_expert_weights) is type(config.attn.rope_theta) is float
    assert type(config.attn.clip_qkv) is type(config.initializer_range) is float


@pytest.mark.parametrize("value", [None, 1, 2, 1.5])
def test_null_is_a_value_where_the_reference_has_it(value: float | None) -> None:
    config = config_from_dict(released(ffn_config__moe_normalize_expert_weights=value, attn_config__clip_qkv=value))
    assert config.ffn.moe_normalize_expert_weights == value
    assert config.attn.clip_qkv == value


@pytest.mark.parametrize(
    ("value", "act"), [({"name": "gelu"}, "gelu"), ({}, "silu"), (None, "silu"), ("gelu_new", "gelu_new")]
)
def test_activations(value: Any, act: str) -> None:
    assert config_from_dict(released(ffn_config__ffn_act_fn=value)).ffn.ffn_act_fn == act


def test_the_attentions_own_rope_theta_wins_with_a_warning() -> None:
    raw = released(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    with pytest.warns(UserWarning, match=r"rope_parameters\.rope_theta 10000 is ignored; .* 500000 counts"):
        assert config_from_dict(raw).attn.rope_theta == 500000
    assert config_from_dict(released(rope_parameters={"rope_theta": 500000})) == DBRX
    del raw["attn_config"]["rope_theta"]
    assert config_from_dict(raw).attn.rope_theta == 10000


@pytest.mark.parametrize("name", ["resid_pdrop", "emb_pdrop", "attn_config__attn_pdrop"])
def test_dropout_is_ignored_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match=name.replace("__", ".") + " is ignored"):
        assert config_from_dict(released(**{name: 0.1})) == DBRX
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_dict(released(**{name: None}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_heads": 47}, "n_heads is 47 where it must be a divisor of d_model, 6144"),
        ({"d_model": 48 * 3}, "n_heads is 48 where it must be such that d_model / n_heads is even"),
        ({"attn_config__kv_n_heads": 7}, "attn_config.kv_n_heads is 7 where it must be a divisor of n_heads, 48"),
        ({"attn_config__kv_n_heads": 96}, "attn_config.kv_n_heads is 96 where"),
        ({"attn_config__kv_n_heads": 0}, "attn_config.kv_n_heads is 0 where it must be a positive integer"),
        ({"ffn_config__moe_top_k": 17}, "ffn_config.moe_top_k is 17 where it must be at most moe_num_experts"),
        ({"ffn_config__moe_top_k": 0}, "ffn_config.moe_top_k is 0 where"),
        ({"ffn_config__moe_num_experts": -1}, "ffn_config.moe_num_experts is -1 where"),
        ({"ffn_config__ffn_hidden_size": 0}, "ffn_config.ffn_hidden_size is 0 where"),
        (
            {"ffn_config__ffn_act_fn": {"name": "laplace"}},
            "ffn_config.ffn_act_fn is 'laplace' where it must be 'silu', 'swish'",
        ),
        ({"ffn_config__ffn_act_fn": {"name": 3}}, "ffn_config.ffn_act_fn is {'name': 3} where"),
        ({"ffn_config__ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "ffn_config.ffn_act_fn is {'name': 'g"),
        ({"ffn_config__moe_normalize_expert_weights": 0}, "ffn_config.moe_normalize_expert_weights is 0.0 where"),
        ({"ffn_config__uniform_expert_assignment": True}, "ffn_config.uniform_expert_assignment is True where"),
        ({"attn_config__clip_qkv": 0}, "attn_config.clip_qkv is 0.0 where it must be a positive number or null"),
        ({"attn_config__rope_theta": -1}, "attn_config.rope_theta is -1.0 where"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True where it must be false"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type is 'linear' where"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn' where"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn' where"),
        ({"n_layers": 0}, "n_layers is 0 where"),
        ({"n_layers": 2.5}, "n_layers is 2.5 where it must be a whole number"),
        ({"n_layers": True}, "n_layers is True where it must be a number"),
        ({"n_layers": "40"}, "n_layers is '40' where it must be a number"),
        ({"n_layers": [40]}, "n_layers is [40] where it must be a number"),
        ({"n_layers": -40}, "n_layers is -40 where"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"d_model": 1e200}, "d_model is 1e+200 where"),
        ({"max_seq_len": float("nan")}, "max_seq_len is nan where it must be a number"),
        ({"max_seq_len": float("inf")}, "max_seq_len is inf where it must be a number"),
        ({"attn_config__clip_qkv": "8"}, "attn_config.clip_qkv is '8' where it must be a number"),
        ({"attn_config__rope_theta": True}, "attn_config.rope_theta is True where it must be a number"),
        ({"ffn_config__moe_loss_weight": False}, "ffn_config.moe_loss_weight is False where"),
        ({"attn_config": "none"}, "attn_config is 'none' where it must be a JSON object"),
        ({"attn_config": []}, "attn_config is [] where it must be a JSON object"),
        ({"ffn_config": False}, "ffn_config is False where it must be a JSON object"),
        ({"initializer_range": -1}, "initializer_range is -1.0 where"),
        ({"ffn_config__moe_jitter_eps": -0.1}, "ffn_config.moe_jitter_eps is -0.1 where"),
        ({"ffn_config__moe_loss_weight": -1}, "ffn_config.moe_loss_weight is -1.0 where"),
        ({"n_layers": 2**31 - 1}, "n_layers is 2147483647 where it must be at most 10000"),
        ({"ffn_config": [16, 4]}, "ffn_config is [16, 4] where it must be a JSON object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta is 'big' where"),
        ({"torch_dtype": "float64"}, "dtype is 'float64' where it must be 'float32', 'bfloat16'"),
        ({"torch_dtype": 16}, "dtype is '16' where"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type 'llama', not 'dbrx'"),
        ({"model_type": None, "architectures": None}, "model_type None, not 'dbrx'"),
    ],
)
def test_refusals_name_the_field_and_its_value(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(released(**changes), source="here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json")
    assert sentence in message
    assert "\n" not in message


def test_configs_are_values() -> None:
    first, second = config_from_dict(RELEASED), config_from_dict(json.loads(json.dumps(RELEASED)))
    assert first == second
    assert first is not second
    assert hash(first) == hash(second)
    assert first != config_from_dict(released(attn_config__clip_qkv=None))
    with pytest.raises(FrozenInstanceError):
        first.d_model = 1  # type: ignore[misc]


def test_configs_are_the_same_values_in_another_process() -> None:
    config = config_from_dict(RELEASED)
    found = {config.layer: 1}
    program = (
        "import pickle, sys; from dbrx_fn.model.config import Config;"
        "config, found = pickle.load(sys.stdin.buffer); fields = Config.__dataclass_fields__;"
        "same = Config(**{name: getattr(config, name) for name in fields});"
        "assert config == same and hash(config) == hash(same) and found[same.layer] == 1"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps((config, found)), env=environment)
    assert done.returncode == 0


def test_configs_made_by_hand_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="n_heads is 5 where"):
        Config(n_heads=5)
    with pytest.raises(ConfigError, match="moe_top_k is 5 where"):
        FFNConfig(moe_top_k=5)
    with pytest.raises(ConfigError, match="kv_n_heads is 3 where"):
        Config(attn=AttnConfig(kv_n_heads=3))


@pytest.mark.parametrize(
    "config",
    [
        DBRX,
        Config(),
        Config(
            d_model=60,
            n_heads=6,
            n_layers=2,
            max_seq_len=77,
            vocab_size=50,
            attn=AttnConfig(clip_qkv=None, kv_n_heads=3, rope_theta=12345.5),
            ffn=FFNConfig(
                ffn_hidden_size=7,
                moe_num_experts=5,
                moe_top_k=2,
                moe_normalize_expert_weights=None,
                ffn_act_fn="gelu",
                moe_jitter_eps=0.1,
                moe_loss_weight=0.2,
            ),
            initializer_range=0.3,
            dtype="float16",
        ),
    ],
)
def test_configs_survive_being_written(config: Config) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_reading_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert read_config(tmp_path) == DBRX


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "can't be read as JSON"),
        (b"{'d_model': 1}", "can't be read as JSON"),
        (b'{"model_type": "dbrx"', "can't be read as JSON"),
        (b"\xff\xfe\x00\x01", "can't be read as JSON"),
        (b"[" * 100_000, "can't be read as JSON"),
        (b'{"a":' * 100_000, "can't be read as JSON"),
        (b"[" + b"1" * 10_000 + b"]", "can't be read as JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"null", "holds null, not an object"),
        (b"{}", "has model_type None, not 'dbrx'"),
        (b'{"model_type": "dbrx", "n_heads": NaN}', "n_heads is nan where it must be a number"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing: a checkpoint folder needs"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="can't be read as JSON"):
        read_config(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my\.json doesn't exist: name a config\.json\.$"):
        read_config_file(tmp_path / "my.json")
    with pytest.raises(ConfigError, match=r"config\.json is missing: a checkpoint folder needs"):
        read_config(tmp_path)
