"""Reads and writes config.json.

The file has had several forms since the release: the original (https://huggingface.co/databricks/dbrx-instruct), files
saved again by newer transformers (nested configs full of generation settings, a top-level `rope_parameters`), and
mlx-lm's conversions. All are read. Absent fields have the reference's defaults
(https://github.com/huggingface/transformers/blob/main/src/transformers/models/dbrx/configuration_dbrx.py).
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from dbrx_fn.errors import ConfigError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown
from dbrx_fn.model.config import Activation, AttnConfig, Config, Dtype, FFNConfig, require

_LARGEST = 2**31


def read_config(folder: Path) -> Config:
    """Reads `config.json` of a checkpoint folder.

    Raises:
        ConfigError: if the file is missing, isn't JSON, isn't DBRX's, or describes an impossible model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: a checkpoint folder needs the config.json that came with its weights.")
    return read_config_file(path)


def read_config_file(path: Path) -> Config:
    """Reads a file with the content of a `config.json`. Errors are those of `read_config`."""
    try:
        raw = parse_json(read_bounded(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} doesn't exist: name a config.json.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as JSON ({error}): fetch it again from where it came.") from None
    if not isinstance(raw, dict):
        found = "null" if raw is None else f"a JSON {type(raw).__name__}"
        raise ConfigError(f"{path} holds {found}, not an object with the fields of the model.")
    return config_from_dict(raw, source=str(path))


def config_from_dict(raw: Mapping[str, Any], *, source: str = "config.json") -> Config:
    """Makes a `Config` from a `config.json`'s content.

    Keys that don't affect results are ignored. `attn_config.rope_theta` wins over `rope_parameters.rope_theta`, with a
    warning if they differ: transformers 5 always writes 10000 there.

    Raises:
        ConfigError: as in `read_config`. The error names the file as `source`.
    """
    model_type = raw.get("model_type")
    if model_type != "dbrx" and raw.get("architectures") != ["DbrxForCausalLM"]:
        raise ConfigError(
            f"{source} has model_type {shown(model_type)}, not 'dbrx': only DBRX checkpoints can be loaded here."
        )
    try:
        return _config(raw, source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """The content of `config.json` for a config, under the released file's names. `config_from_dict` is its inverse.

    The base of the rotary embedding is written twice. mlx-lm and the released code read `attn_config.rope_theta`.
    transformers 5 reads only `rope_parameters`, and without it uses 10000.
    """
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": asdict(config.attn),
        "ffn_config": asdict(config.ffn) | {"ffn_act_fn": {"name": config.ffn.ffn_act_fn}},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.attn.rope_theta},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
    }


def _config(raw: Mapping[str, Any], source: str) -> Config:
    attn, ffn = (_Section({} if raw.get(n) is None else raw[n], f"{n}.") for n in ("attn_config", "ffn_config"))
    top = _Section(raw, "")
    _refuse_other_models(raw, ffn)
    for section, name in ((attn, "attn_pdrop"), (top, "resid_pdrop"), (top, "emb_pdrop")):
        if section.number(name, 0.0):
            warnings.warn(f"{source}: {section.prefix}{name} is ignored, since no dropout is applied.", stacklevel=4)
    return Config(
        d_model=top.integer("d_model", Config.d_model),
        n_heads=top.integer("n_heads", Config.n_heads),
        n_layers=top.integer("n_layers", Config.n_layers),
        max_seq_len=top.integer("max_seq_len", Config.max_seq_len),
        vocab_size=top.integer("vocab_size", Config.vocab_size),
        attn=AttnConfig(
            clip_qkv=attn.optional_number("clip_qkv", AttnConfig.clip_qkv),
            kv_n_heads=attn.integer("kv_n_heads", AttnConfig.kv_n_heads),
            rope_theta=_rope_theta(attn, raw.get("rope_parameters"), source),
        ),
        ffn=FFNConfig(
            ffn_hidden_size=ffn.integer("ffn_hidden_size", FFNConfig.ffn_hidden_size),
            moe_num_experts=ffn.integer("moe_num_experts", FFNConfig.moe_num_experts),
            moe_top_k=ffn.integer("moe_top_k", FFNConfig.moe_top_k),
            moe_normalize_expert_weights=ffn.optional_number(
                "moe_normalize_expert_weights", FFNConfig.moe_normalize_expert_weights
            ),
            ffn_act_fn=_activation(ffn.raw.get("ffn_act_fn")),
            moe_jitter_eps=ffn.optional_number("moe_jitter_eps", FFNConfig.moe_jitter_eps),
            moe_loss_weight=ffn.number("moe_loss_weight", FFNConfig.moe_loss_weight),
        ),
        initializer_range=top.number("initializer_range", Config.initializer_range),
        dtype=_dtype(raw),
    )


def _refuse_other_models(raw: Mapping[str, Any], ffn: "_Section") -> None:
    """Refuses settings whose computation in the reference isn't implemented here."""
    require(not raw.get("tie_word_embeddings"), "tie_word_embeddings", True, "false, since DBRX's head is its own")
    for name in ("rope_parameters", "rope_scaling"):
        scaling = raw.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        require(kind == "default", f"{name}.rope_type", kind, "'default', the only one DBRX was made with")
    uniform = ffn.raw.get("uniform_expert_assignment")
    require(not uniform, "ffn_config.uniform_expert_assignment", True, "false, since it replaces the router")


def _rope_theta(attn: "_Section", rope_parameters: Any, source: str) -> float:
    elsewhere = _Section(rope_parameters or {}, "rope_parameters.").optional_number("rope_theta", None)
    theta = attn.optional_number("rope_theta", None)
    if theta is None:
        return AttnConfig.rope_theta if elsewhere is None else elsewhere
    if elsewhere is not None and elsewhere != theta:
        warnings.warn(
            f"{source}: rope_parameters.rope_theta {elsewhere:g} is ignored; attn_config.rope_theta {theta:g} counts.",
            stacklevel=5,
        )
    return theta


def _activation(value: Any) -> Activation:
    if value is None:
        return FFNConfig.ffn_act_fn
    name = value.get("name", FFNConfig.ffn_act_fn) if isinstance(value, dict) and set(value) <= {"name"} else value
    require(isinstance(name, str), "ffn_config.ffn_act_fn", value, 'an object with one key, "name"')
    return cast(Activation, name)


def _dtype(raw: Mapping[str, Any]) -> Dtype:
    value = raw.get("dtype") or raw.get("torch_dtype") or Config.dtype
    return cast(Dtype, str(value).removeprefix("torch."))


@dataclass(frozen=True)
class _Section:
    """One JSON object of a config file. Its methods check types."""

    raw: Mapping[str, Any]
    prefix: str

    def __post_init__(self) -> None:
        require(isinstance(self.raw, Mapping), self.prefix.rstrip("."), self.raw, "a JSON object")

    def optional_number(self, name: str, default: float | None) -> float | None:
        return None if self.raw.get(name, default) is None else self.number(name, default)

    def number(self, name: str, default: float | None) -> float:
        value = self.raw.get(name, default)
        value = default if value is None else value
        # NaN and integers beyond float's range fail the comparison.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise ConfigError(f"{self.prefix}{name} is {shown(value)} where it must be a number.")
        return float(value)

    def integer(self, name: str, default: int) -> int:
        value = self.number(name, default)
        whole = value.is_integer() and value < _LARGEST
        require(whole, self.prefix + name, value, "a whole number below 2**31")
        return int(value)
