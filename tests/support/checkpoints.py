"""Small random DBRX checkpoints, in memory and on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike, NDArray

Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]
FileDtype = Literal["float32", "float16", "bfloat16"]

CLIPS = (0.5, 2, None)
"""Wqkv's outputs have a standard deviation near 1, so both values clip: 0.5 most entries, 2 one in twenty.
No more than these two, because every value costs the compiled model a kernel of its own."""


QUANTIZABLE: Config = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 40,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
}
"""A `config.json` whose widths every group size divides."""


def random_config(rng: np.random.Generator) -> Config:
    """A `config.json` of odd shapes: heads, head sizes, experts and widths that aren't powers of two."""
    n_heads = int(rng.integers(1, 9))
    head_dim = 2 * int(rng.integers(2, 13))
    kv_n_heads = int(rng.choice([n for n in range(1, n_heads + 1) if n_heads % n == 0]))
    experts = int(rng.integers(1, 17))
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": n_heads * head_dim,
        "n_heads": n_heads,
        "n_layers": int(rng.integers(1, 4)),
        "max_seq_len": 256,
        "vocab_size": int(rng.integers(40, 201)),
        "tie_word_embeddings": False,
        "attn_config": {
            "clip_qkv": CLIPS[rng.integers(len(CLIPS))],
            "kv_n_heads": kv_n_heads,
            "rope_theta": (10000, 500000)[rng.integers(2)],
        },
        "ffn_config": {
            "ffn_hidden_size": int(rng.integers(5, 65)),
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
            "moe_num_experts": experts,
            "moe_top_k": int(rng.integers(1, experts + 1)),
            "moe_normalize_expert_weights": (1, 2, None)[rng.integers(3)],
        },
    }


def random_tensors(config: Mapping[str, Any], rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Tensors:
    """The tensors of a Hugging Face fused checkpoint: linears N(0, 1 / fan_in), norms near 1, embeddings N(0, 1)."""
    d_model, vocab = config["d_model"], config["vocab_size"]
    head_dim = d_model // config["n_heads"]
    ffn, experts = config["ffn_config"]["ffn_hidden_size"], config["ffn_config"]["moe_num_experts"]
    qkv = (config["n_heads"] + 2 * config["attn_config"]["kv_n_heads"]) * head_dim

    def normal(rows: int, columns: int, fan_in: int) -> NDArray[Any]:
        weight: NDArray[Any] = rng.standard_normal((rows, columns)) / np.sqrt(fan_in)
        return weight.astype(dtype)

    def norm() -> NDArray[Any]:
        weight: NDArray[Any] = 1.0 + 0.1 * rng.standard_normal(d_model)
        return weight.astype(dtype)

    tensors = {"transformer.wte.weight": normal(vocab, d_model, 1)}
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        tensors |= {
            f"{block}.norm_attn_norm.norm_1.weight": norm(),
            f"{block}.norm_attn_norm.attn.Wqkv.weight": normal(qkv, d_model, d_model),
            f"{block}.norm_attn_norm.attn.out_proj.weight": normal(d_model, d_model, d_model),
            f"{block}.norm_attn_norm.norm_2.weight": norm(),
            f"{block}.ffn.router.layer.weight": normal(experts, d_model, d_model),
            f"{block}.ffn.experts.mlp.w1": normal(experts * ffn, d_model, d_model),
            f"{block}.ffn.experts.mlp.v1": normal(experts * ffn, d_model, d_model),
            f"{block}.ffn.experts.mlp.w2": normal(experts * ffn, d_model, ffn),
        }
    return tensors | {"transformer.norm_f.weight": norm(), "lm_head.weight": normal(vocab, d_model, d_model)}


def rounded(tensors: Mapping[str, NDArray[Any]], dtype: FileDtype) -> Tensors:
    """The float32 values that remain after writing `tensors` as `dtype`: what a reference must be given."""
    return {name: np.array(_cast(tensor, dtype).astype(mx.float32)) for name, tensor in tensors.items()}


def split_tensors(config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Fused `tensors` in mlx-lm's layout: `experts.N.{w1,v1,w2}.weight`, w1 and v1 [ffn d_model], w2 [d_model ffn]."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts.mlp." not in name:
            split[name] = tensor
            continue
        for e, expert in enumerate(np.split(tensor, config["ffn_config"]["moe_num_experts"])):
            expert_name = name.replace(".experts.mlp.", f".experts.{e}.") + ".weight"
            split[expert_name] = expert.T if name.endswith(".w2") else expert
    return split


def write_fused(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    *,
    shards: int = 1,
    dtype: FileDtype = "float32",
) -> None:
    """Writes a Hugging Face checkpoint of fused `tensors` that transformers and mlx-lm load."""
    _write(folder, config, tensors, shards=shards, dtype=dtype, framework="pt")


def write_split(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    *,
    shards: int = 1,
    dtype: FileDtype = "float32",
) -> None:
    """Writes fused `tensors` as the dense checkpoint that mlx-lm's converter would write."""
    _write(folder, config, split_tensors(config, tensors), shards=shards, dtype=dtype, framework="mlx")


def _cast(tensor: NDArray[Any], dtype: FileDtype) -> mx.array:
    # NumPy has no bfloat16, and MLX on the CPU is what casts to it.
    return mx.array(np.ascontiguousarray(tensor, dtype=np.float32)).astype(getattr(mx, dtype))


def _write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    *,
    shards: int,
    dtype: FileDtype,
    framework: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2))

    arrays = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    # transformers refuses a file whose metadata doesn't name a framework.
    metadata = {"format": framework}
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata)
        return

    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(list(arrays), shards), start=1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), {str(name): arrays[str(name)] for name in names}, metadata)
        weight_map |= dict.fromkeys(map(str, names), file)
    total_size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
