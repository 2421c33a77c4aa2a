"""A DBRX model's configuration as frozen, hashable values, which compiled functions take as static arguments.

A `Config` never enters a traced tree. `dbrx_fn.checkpoints.config_file` reads one from a checkpoint's `config.json`.
Absent fields have the reference's defaults
(https://github.com/huggingface/transformers/blob/main/src/transformers/models/dbrx/configuration_dbrx.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from dbrx_fn.errors import ConfigError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.shard import WHOLE, Shard, in_words, working_sizes
from dbrx_fn.runtime.arguments import check_fields

Activation = Literal[
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "sigmoid", "tanh", "mish"
]
Dtype = Literal["float32", "bfloat16", "float16"]

_LARGEST = 2**31
# Descriptions of the tree take memory for each layer, and those of split checkpoints for each expert too. These limits
# bound that memory for a config.json that gives absurd numbers.
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 2**15
_ROTARY = "since the rotary embedding rotates pairs of a head's entries"


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises `ConfigError` unless a field's value is `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {shown(value)} where it must be {expected}.")


def _require_size(name: str, value: int) -> None:
    require(value > 0, name, value, "a positive integer")
    require(value < _LARGEST, name, value, "below 2**31")


@dataclass(frozen=True)
class AttnConfig:
    """Attention settings: `attn_config` of `config.json`.

    `clip_qkv`: q, k and v are clamped to ± this; `None` means no clamp.
    `kv_n_heads`: number of key and value heads, each shared by `n_heads / kv_n_heads` query heads.
    `rope_theta`: base of the rotary embedding's frequencies.
    """

    clip_qkv: float | None = None
    kv_n_heads: int = 1
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, prefix="attn_config.")
        if self.clip_qkv is not None:
            require(self.clip_qkv > 0, "attn_config.clip_qkv", self.clip_qkv, "a positive number or null")
        _require_size("attn_config.kv_n_heads", self.kv_n_heads)
        require(self.rope_theta > 0, "attn_config.rope_theta", self.rope_theta, "a positive number")


@dataclass(frozen=True)
class FFNConfig:
    """Mixture-of-experts settings: `ffn_config` of `config.json`.

    `ffn_hidden_size`: width of one expert.
    `moe_num_experts`: number of experts.
    `moe_top_k`: number of experts that each token goes to.
    `moe_normalize_expert_weights`: the chosen experts' weights are divided by their p-norm with this p; `None` means no
        division.
    `ffn_act_fn`: name of the gate's activation.
    `moe_jitter_eps`, `moe_loss_weight`: used in training only.
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
        require(
            self.moe_top_k <= self.moe_num_experts,
            "ffn_config.moe_top_k",
            self.moe_top_k,
            f"at most moe_num_experts, which is {self.moe_num_experts}",
        )
        p = self.moe_normalize_expert_weights
        if p is not None:
            require(p > 0, "ffn_config.moe_normalize_expert_weights", p, "a positive number or null")
        eps = self.moe_jitter_eps
        require(eps is None or 0 <= eps < 1, "ffn_config.moe_jitter_eps", eps, "null, or from 0 to below 1")
        weight = self.moe_loss_weight
        require(weight >= 0, "ffn_config.moe_loss_weight", weight, "0 or a positive number")


def _hashed_once(value: Any) -> int:
    """A frozen dataclass's hash, computed once, since each layer of each token asks for it."""
    known: int | None = vars(value).get("_hash")
    if known is None:
        known = vars(value)["_hash"] = hash(tuple(getattr(value, each.name) for each in fields(value)))
    return known


def _fields_alone(value: Any) -> dict[str, Any]:
    """The state to pickle, without the cached hash: string hashes differ between processes."""
    return {each.name: getattr(value, each.name) for each in fields(value)}


NORM_EPS = 1e-5
"""Epsilon of every LayerNorm. The reference uses `torch.nn.LayerNorm`'s default."""


@dataclass(frozen=True)
class LayerConfig:
    """The part of a `Config` that one layer's results depend on. `Config.layer` makes it.

    Compiled layers take this as their static argument, so models that differ only in depth or context share traces.
    """

    d_model: int
    n_heads: int
    vocab_size: int
    attn: AttnConfig
    ffn: FFNConfig
    dtype: Dtype
    shard: Shard = WHOLE

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def local_heads(self) -> int:
        """Number of this process's query heads."""
        return self.n_heads // self.shard.size

    @property
    def local_kv_heads(self) -> int:
        """Number of this process's key and value heads."""
        return self.attn.kv_n_heads // self.shard.size

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of this process's axes, by their names in `dbrx_fn.model.params`."""
        return {
            "vocab": self.vocab_size // self.shard.size,
            "d_model": self.d_model,
            "qkv": (self.local_heads + 2 * self.local_kv_heads) * self.head_dim,
            "heads": self.local_heads * self.head_dim,
            "expert": self.ffn.moe_num_experts,
            "ffn_hidden": self.ffn.ffn_hidden_size // self.shard.size,
        }

    __hash__ = _hashed_once
    __getstate__ = _fields_alone


@dataclass(frozen=True)
class Config:
    """A DBRX model's sizes and constants.

    `dtype`: of the parameters, the activations and the cache.
    `initializer_range`: standard deviation of freshly drawn weights.
    `shard`: this process's place, if several share the model. All other fields describe the whole model.

    Raises:
        ConfigError: if the fields describe an impossible model. The error names the field and its value.
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
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"):
            _require_size(name, getattr(self, name))
        require(self.d_model % self.n_heads == 0, "n_heads", self.n_heads, f"a divisor of d_model, {self.d_model}")
        require(self.head_dim % 2 == 0, "n_heads", self.n_heads, f"such that d_model / n_heads is even, {_ROTARY}")
        kv_n_heads = self.attn.kv_n_heads
        require(
            self.n_heads % kv_n_heads == 0,
            "attn_config.kv_n_heads",
            kv_n_heads,
            f"a divisor of n_heads, {self.n_heads}",
        )
        require(self.n_layers <= _MOST_LAYERS, "n_layers", self.n_layers, f"at most {_MOST_LAYERS}")
        most = _MOST_EXPERTS // self.n_layers
        experts = self.ffn.moe_num_experts
        require(experts <= most, "ffn_config.moe_num_experts", experts, f"at most {most} in {self.n_layers} layers")
        scale = self.initializer_range
        require(scale >= 0, "initializer_range", scale, "0 or a positive number")
        sizes = working_sizes(kv_n_heads, self.ffn.ffn_hidden_size, self.vocab_size)
        if self.shard.size not in sizes:
            raise ConfigError(
                f"{self.shard.size} processes can't share this model evenly, since it has {kv_n_heads} key heads, an"
                f" ffn_hidden_size of {self.ffn.ffn_hidden_size} and a vocab_size of {self.vocab_size}: start"
                f" {in_words(sizes)}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @cached_property
    def layer(self) -> LayerConfig:
        """The part that one layer's results depend on."""
        return LayerConfig(self.d_model, self.n_heads, self.vocab_size, self.attn, self.ffn, self.dtype, self.shard)

    __hash__ = _hashed_once
    __getstate__ = _fields_alone

    @property
    def qkv_dim(self) -> int:
        """Rows of this process's `Wqkv`: every query head, then every key head, then every value head."""
        return self.layer.sizes["qkv"]


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
