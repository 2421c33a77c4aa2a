"""Checkpoints in the layouts whose own writers can't be installed for a test, made from Hugging Face's fused tensors.

Each function takes what `checkpoints.random_config` and `checkpoints.random_tensors` make, and says whose code it
follows. None of them uses the package, so that reading what they write tests its tables.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray

from tests.support.checkpoints import FileDtype, Tensors, write_fused

Array = NDArray[Any]
NxdForm = Literal["apart", "qkv_linear", "inference"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

_EXPERTS = re.compile(r"(?P<ffn>.*\.ffn)\.experts\.mlp\.(?P<w>w1|v1|w2)")
_WQKV = ".attn.Wqkv.weight"


def write_stacked(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], *, dtype: FileDtype = "float32"
) -> None:
    """Our own: the tree's dotted names. `experts.mlp.{w1,v1}.weight` `[E F D]` and `w2.weight` `[E D F]`."""

    def stacked(ffn: str, w: str, experts: Array) -> Tensors:
        return {f"{ffn}.experts.mlp.{w}.weight": experts.swapaxes(1, 2) if w == "w2" else experts}

    write_fused(folder, config, _with_experts(config, tensors, stacked), dtype=dtype)


def write_converted(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    dtype: FileDtype = "float32",
    w2_transposed: bool = True,
) -> None:
    """LnL-AI/dbrx-base-converted-v2 and ModelCloud/dbrx-instruct-converted-v2: every projection is a linear.

    Names are those of https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/models/definitions/dbrx_converted.py.
    `w2_transposed` gives w2 `[D F]`, as a linear from F to D has it; otherwise it is `[F D]`, a slice of the fused one.
    """
    apart = _with_experts(config, _with_qkv_apart(config, tensors), _one_by_one("experts.mlp", w2_transposed))
    write_fused(folder, {**config, "model_type": "dbrx_converted"}, apart, dtype=dtype)


def write_mlp_experts(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    dtype: FileDtype = "float32",
    w2_transposed: bool = True,
    qkv_apart: bool = False,
) -> None:
    """v2ray/dbrx-base-fixed: `experts.mlp_experts.{e}.{w1,v1,w2}.weight`.

    No source at hand says how its w2 lies or whether Wqkv is in one piece, so both can be chosen.
    """
    rest = _with_qkv_apart(config, tensors) if qkv_apart else tensors
    apart = _with_experts(config, rest, _one_by_one("experts.mlp_experts", w2_transposed))
    write_fused(folder, config, apart, dtype=dtype)


def write_nxd(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    dtype: FileDtype = "float32",
    form: NxdForm = "apart",
) -> None:
    """AWS NxD, whole rather than in a shard for each device.

    `apart` is what `CheckpointConverterDbrx` of neuronx-distributed-training makes; `qkv_linear` is the same with the
    names that `CheckpointConverterBase` gives q, k and v for a GQA layer. `inference` is what
    `convert_dbrx_to_neuron_state_dict` makes
    (https://github.com/aws-neuron/neuronx-distributed-inference/blob/main/src/neuronx_distributed_inference/models/dbrx/modeling_dbrx.py).
    """
    if form == "inference":
        write_fused(folder, config, _nxd_inference(config, tensors), dtype=dtype)
        return

    def mlp_op(ffn: str, w: str, experts: Array) -> Tensors:
        name = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[w]
        return {f"{ffn}.expert_mlps.mlp_op.{name}.weight": experts if w == "w2" else experts.swapaxes(1, 2)}

    renames = {".attn.out_proj.": ".attn.o_proj.", ".router.layer.": ".router.linear_router."}
    if form == "qkv_linear":
        renames |= {f".attn.{p}_proj.weight": f".attn.qkv_proj.weight_{p}" for p in "qkv"}
    apart = _with_experts(config, _with_qkv_apart(config, tensors), mlp_op)
    write_fused(folder, config, {_renamed(name, renames): tensor for name, tensor in apart.items()}, dtype=dtype)


def write_megablocks(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    dtype: FileDtype = "float32",
    composer: bool = True,
    fuse_norm_attn_norm: bool = True,
) -> None:
    """llm-foundry's MPT with MegaBlocks' dropless GLU, or its own `torch_dmoe`: `[E*F D]` stacks as Hugging Face's.

    `composer` puts `model.` before every name, as the trainer's `HuggingFaceModel` does. Without `fuse_norm_attn_norm`
    a block's norms and attention aren't in a `norm_attn_norm`
    (https://github.com/mosaicml/llm-foundry/blob/main/llmfoundry/models/layers/blocks.py). MegaBlocks' form with a
    dimension for the experts has no v1, so no DBRX can be in it.
    """
    renames = {} if fuse_norm_attn_norm else {".norm_attn_norm.": "."}
    prefix = "model." if composer else ""
    renamed = {prefix + _renamed(name, renames): tensor for name, tensor in tensors.items()}
    write_fused(folder, config, renamed, dtype=dtype)


def write_gguf(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], *, quantization: GgufType = "f32"
) -> None:
    """llama.cpp's: what `DbrxModel` of its converter writes, with the package `gguf` that it writes with.

    Norms and routers stay float32. A matrix whose rows aren't whole blocks of 32 becomes float16, as there.

    Raises:
        ValueError: if the config normalizes the experts' weights otherwise than llama.cpp, by their sum.
    """
    if config["ffn_config"].get("moe_normalize_expert_weights", 1) != 1:
        raise ValueError("GGUF has no moe_normalize_expert_weights, and llama.cpp takes it for 1.")
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, "dbrx")
    add_metadata(writer, config)
    for name, tensor in gguf_tensors(config, tensors).items():
        kind = gguf_type(name, tensor, quantization)
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Tensors:
    """Under GGUF's names and in its shapes: experts `[E F D]`, and `ffn_down_exps` `[E D F]`."""

    def exps(ffn: str, w: str, experts: Array) -> Tensors:
        name = {"w1": "ffn_gate_exps", "v1": "ffn_up_exps", "w2": "ffn_down_exps"}[w]
        return {f"{ffn.removesuffix('.ffn')}.{name}.weight": experts.swapaxes(1, 2) if w == "w2" else experts}

    renames = {
        "transformer.wte.": "token_embd.",
        "transformer.norm_f.": "output_norm.",
        "lm_head.": "output.",
        "transformer.blocks.": "blk.",
        "norm_attn_norm.norm_1.": "attn_norm.",
        "norm_attn_norm.norm_2.": "attn_output_norm.",
        "norm_attn_norm.attn.Wqkv.": "attn_qkv.",
        "norm_attn_norm.attn.out_proj.": "attn_output.",
        "ffn.router.layer.": "ffn_gate_inp.",
    }
    stacked = _with_experts(config, tensors, exps)
    return {_renamed(name, renames): np.ascontiguousarray(tensor) for name, tensor in stacked.items()}


def gguf_type(name: str, tensor: Array, quantization: GgufType) -> GGMLQuantizationType:
    """What `write_gguf` stores a tensor as."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if quantization.startswith("q") and tensor.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[quantization.upper()]


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """What `DbrxModel` writes of the config, and a vocabulary that nobody can use."""
    attn, ffn = config["attn_config"], config["ffn_config"]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(ffn["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attn["kv_n_heads"])
    writer.add_rope_freq_base(attn["rope_theta"])
    # The converter fails without a clamp, and llama.cpp applies none that is 0.
    writer.add_clamp_kqv(attn["clip_qkv"] or 0.0)
    writer.add_expert_count(ffn["moe_num_experts"])
    writer.add_expert_used_count(ffn["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])


def _with_experts(
    config: Mapping[str, Any], tensors: Mapping[str, Array], write: Callable[[str, str, Array], Tensors]
) -> Tensors:
    """`tensors` with each stack of experts replaced by what `write` makes of `….ffn`, its name and `[E F D]`."""
    experts = config["ffn_config"]["moe_num_experts"]
    written: Tensors = {}
    for name, tensor in tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match is None:
            written[name] = tensor
        else:
            written |= write(match["ffn"], match["w"], tensor.reshape(experts, -1, tensor.shape[-1]))
    return written


def _one_by_one(module: str, w2_transposed: bool) -> Callable[[str, str, Array], Tensors]:
    def write(ffn: str, w: str, experts: Array) -> Tensors:
        if w == "w2" and w2_transposed:
            experts = experts.swapaxes(1, 2)
        return {f"{ffn}.{module}.{e}.{w}.weight": expert for e, expert in enumerate(experts)}

    return write


def _with_qkv_apart(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Tensors:
    d_model = config["d_model"]
    kv_rows = d_model // config["n_heads"] * config["attn_config"]["kv_n_heads"]
    apart: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(_WQKV):
            apart[name] = tensor
            continue
        parts = np.split(tensor, [d_model, d_model + kv_rows])
        apart |= {name.replace(".Wqkv.", f".{p}_proj."): part for p, part in zip("qkv", parts, strict=True)}
    return apart


def _nxd_inference(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Tensors:
    gates: Tensors = {}

    def mlp_op(ffn: str, w: str, experts: Array) -> Tensors:
        if w == "w2":
            return {f"{ffn}.expert_mlps.mlp_op.down_proj.weight": experts}
        gates[f"{ffn}.{w}"] = experts
        return {}

    written = _with_experts(config, tensors, mlp_op)
    for i in range(config["n_layers"]):
        ffn = f"transformer.blocks.{i}.ffn"
        gate_up = np.concatenate([gates[f"{ffn}.w1"], gates[f"{ffn}.v1"]], axis=1).swapaxes(1, 2)
        written[f"{ffn}.expert_mlps.mlp_op.gate_up_proj.weight"] = gate_up
    renames = {
        "transformer.wte.": "embed_tokens.",
        "transformer.norm_f.": "norm.",
        "transformer.blocks.": "layers.",
        "norm_attn_norm.norm_1.": "input_layernorm.",
        "norm_attn_norm.norm_2.": "post_attention_layernorm.",
        "norm_attn_norm.attn.Wqkv.": "self_attn.Wqkv.",
        "norm_attn_norm.attn.out_proj.": "self_attn.o_proj.",
        "ffn.router.layer.": "ffn.router.linear_router.",
    }
    return {_renamed(name, renames): tensor for name, tensor in written.items()}


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        name = name.replace(old, new)
    return name
