"""What a DBRX model is made of, as frozen, hashable values: the static half of everything that is compiled.

A `Config` never enters a traced tree. It comes from a checkpoint's `config.json`, in any of the forms that file has
had since the release: the original (https://huggingface.co/databricks/dbrx-instruct), files saved again by newer
transformers (nested configs full of generation settings, a top-level `rope_parameters`), mlx-lm's conversions.
Defaults of absent fields are the reference's
(https://github.com/huggingface/transformers/blob/main/src/transformers/models/dbrx/configuration_dbrx.py).
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from dbrx_fn.errors import ConfigError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown
from dbrx_fn.runtime.arguments import check_fields

Activation = Literal[
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "sigmoid", "tanh", "mish"
]
Dtype = Literal["float32", "bfloat16", "float16"]

_LARGEST = 2**31
# The tree is a description per layer, and split checkpoints have names per expert of each, so a file that lies about
# their number would cost memory before it is found out.
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 2**15
_ROTARY = "since the rotary embedding turns halves of a head against each other"


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {shown(value)} where it must be {expected}.")


def _require_size(name: str, value: int) -> None:
    _require(value > 0, name, value, "a positive integer")
    _require(value < _LARGEST, name, value, "below 2**31")


@dataclass(frozen=True)
class AttnConfig:
    """The attention's part: `attn_config` of `config.json`.

    `clip_qkv`: q, k and v are clamped to ± this; `None` means no clamp.
    `kv_n_heads`: key and value heads, each shared by `n_heads / kv_n_heads` query heads.
    `rope_theta`: base of the rotary embedding's frequencies.
    """

    clip_qkv: float | None = None
    kv_n_heads: int = 1
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, prefix="attn_config.")
        if self.clip_qkv is not None:
            _require(self.clip_qkv > 0, "attn_config.clip_qkv", self.clip_qkv, "a positive number or null")
        _require_size("attn_config.kv_n_heads", self.kv_n_heads)
        _require(self.rope_theta > 0, "attn_config.rope_theta", self.rope_theta, "a positive number")


@dataclass(frozen=True)
class FFNConfig:
    """The experts' part: `ffn_config` of `config.json`.

    `ffn_hidden_size`: width of one expert.
    `moe_num_experts`, `moe_top_k`: how many experts there are, and how many of them a token goes to.
    `moe_normalize_expert_weights`: p of the norm that the chosen experts' weights are divided by; `None` divides by
    nothing.
    `ffn_act_fn`: name of the gate's activation.
    `moe_jitter_eps`, `moe_loss_weight`: for training only.
    """

    ffn_hidden_size: int = 3584
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_normalize_expert_weights: float | None = 1.0
    ffn_act_fn: Activation = "silu"
    moe_jitter_eps: float | None = None
    moe_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, prefix="ffn_config.")
        for name in ("ffn_hidden_size", "moe_num_experts", "moe_top_k"):
            _require_size(f"ffn_config.{name}", getattr(self, name))
        _require(
            self.moe_top_k <= self.moe_num_experts,
            "ffn_config.moe_top_k",
            self.moe_top_k,
            f"at most moe_num_experts, which is {self.moe_num_experts}",
        )
        p = self.moe_normalize_expert_weights
        if p is not None:
            _require(p > 0, "ffn_config.moe_normalize_expert_weights", p, "a positive number or null")
        eps = self.moe_jitter_eps
        _require(eps is None or 0 <= eps < 1, "ffn_config.moe_jitter_eps", eps, "null, or from 0 to below 1")
        weight = self.moe_loss_weight
        _require(weight >= 0, "ffn_config.moe_loss_weight", weight, "0 or a positive number")


@dataclass(frozen=True)
class Config:
    """A DBRX model's sizes and constants.

    `dtype` is that of the parameters, the activations and the cache. `initializer_range` is the standard deviation of
    freshly drawn weights.

    Raises:
        ConfigError: if the fields describe a model that can't exist; it names the field and its value.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    max_seq_len: int = 2048
    vocab_size: int = 32_000
    attn: AttnConfig = field(default_factory=AttnConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    initializer_range: float = 0.02
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"):
            _require_size(name, getattr(self, name))
        _require(self.d_model % self.n_heads == 0, "n_heads", self.n_heads, f"a divisor of d_model, {self.d_model}")
        _require(self.head_dim % 2 == 0, "n_heads", self.n_heads, f"such that d_model / n_heads is even, {_ROTARY}")
        kv_n_heads = self.attn.kv_n_heads
        _require(
            self.n_heads % kv_n_heads == 0,
            "attn_config.kv_n_heads",
            kv_n_heads,
            f"a divisor of n_heads, {self.n_heads}",
        )
        _require(self.n_layers <= _MOST_LAYERS, "n_layers", self.n_layers, f"at most {_MOST_LAYERS}")
        most = _MOST_EXPERTS // self.n_layers
        experts = self.ffn.moe_num_experts
        _require(experts <= most, "ffn_config.moe_num_experts", experts, f"at most {most} in {self.n_layers} layers")
        scale = self.initializer_range
        _require(scale >= 0, "initializer_range", scale, "0 or a positive number")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    def __hash__(self) -> int:
        """As of any frozen dataclass, but made once: each layer of each token asks for it."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings to other numbers.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def layer(self) -> "Config":
        """What one layer's numbers depend on: the same for models that differ in depth or context only.

        Compiled layers take this as their static value, so that such models share them.
        """
        return replace(self, n_layers=1, max_seq_len=1, initializer_range=0.0)

    @property
    def qkv_dim(self) -> int:
        """Rows of `Wqkv`: every query head, then every key head, then every value head."""
        return (self.n_heads + 2 * self.attn.kv_n_heads) * self.head_dim


DBRX = Config(
    d_model=6144,
    n_heads=48,
    n_layers=40,
    max_seq_len=32_768,
    vocab_size=100_352,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=8, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=10_752, moe_num_experts=16, moe_top_k=4, moe_jitter_eps=0.0, moe_loss_weight=0.05),
)
"""The released model, 132B parameters (https://huggingface.co/databricks/dbrx-instruct/blob/main/config.json)."""


def read_config(folder: Path) -> Config:
    """Reads `config.json` of a checkpoint folder.

    Raises:
        ConfigError: if the file is missing, isn't JSON, isn't DBRX's, or describes a model that can't exist.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: a checkpoint folder needs the config.json that came with its weights.")
    return read_config_file(path)


def read_config_file(path: Path) -> Config:
    """Reads a file with the content of a `config.json`; errors are those of `read_config`."""
    try:
        raw = parse_json(read_bounded(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} doesn't exist: name a config.json.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as JSON ({error}): fetch it again from where it came.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__} where an object with the model's fields is due.")
    return config_from_dict(raw, source=str(path))


def config_from_dict(raw: Mapping[str, Any], *, source: str = "config.json") -> Config:
    """Makes a `Config` of a `config.json`'s content.

    Keys that don't change the numbers are ignored. `attn_config.rope_theta` wins over `rope_parameters.rope_theta`,
    with a warning where they differ: transformers 5 writes 10000 there whatever the model was trained with.

    Raises:
        ConfigError: as `read_config`; `source` names the file in the sentence.
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
    """A `config.json`'s content for `config`, under the released file's names; `config_from_dict` is its inverse.

    The base of the rotary embedding is there twice: mlx-lm reads `attn_config.rope_theta`, as the released code does,
    and transformers 5 `rope_parameters` alone, without which it takes 10000.
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
    """Refuses settings under which the reference computes something that is not built here."""
    _require(not raw.get("tie_word_embeddings"), "tie_word_embeddings", True, "false, since DBRX's head is its own")
    for name in ("rope_parameters", "rope_scaling"):
        scaling = raw.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        _require(kind == "default", f"{name}.rope_type", kind, "'default', the only one DBRX was made with")
    uniform = ffn.raw.get("uniform_expert_assignment")
    _require(not uniform, "ffn_config.uniform_expert_assignment", True, "false, since it replaces the router")


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
    _require(isinstance(name, str), "ffn_config.ffn_act_fn", value, 'an object with one key, "name"')
    return cast(Activation, name)


def _dtype(raw: Mapping[str, Any]) -> Dtype:
    value = raw.get("dtype") or raw.get("torch_dtype") or Config.dtype
    return cast(Dtype, str(value).removeprefix("torch."))


@dataclass(frozen=True)
class _Section:
    """One JSON object of a config file, read with types checked."""

    raw: Mapping[str, Any]
    prefix: str

    def __post_init__(self) -> None:
        _require(isinstance(self.raw, Mapping), self.prefix.rstrip("."), self.raw, "a JSON object")

    def optional_number(self, name: str, default: float | None) -> float | None:
        return None if self.raw.get(name, default) is None else self.number(name, default)

    def number(self, name: str, default: float | None) -> float:
        value = self.raw.get(name, default)
        value = default if value is None else value
        # Neither NaN nor an integer past float's range passes the comparison.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise ConfigError(f"{self.prefix}{name} is {shown(value)} where it must be a number.")
        return float(value)

    def integer(self, name: str, default: int) -> int:
        value = self.number(name, default)
        whole = value.is_integer() and value < _LARGEST
        _require(whole, self.prefix + name, value, "a whole number below 2**31")
        return int(value)
