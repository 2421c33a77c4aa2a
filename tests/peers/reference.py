"""transformers' and mlx-lm's DBRX, set up so that they compute what the config says, and where they can't.

transformers is right for every config once `transformers_config` has repaired it. mlx-lm is right only where
`mlx_lm_is_right` says so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.dbrx import Model as MlxLmModel
from mlx_lm.utils import load_model
from numpy.typing import NDArray
from transformers import DbrxConfig, DbrxForCausalLM

TorchDtype = Literal["float32", "float64", "bfloat16"]

UNCLIPPED = 1e9
"""Stands in for a null `clip_qkv`: transformers then calls `torch.clamp(x, None, None)`, which raises, and mlx-lm
negates None. It is far above any activation and finite in every dtype used here."""


def transformers_config(config: Mapping[str, Any]) -> DbrxConfig:
    """`config.json` as transformers 5.23 needs it to compute what the file says.

    It reads RoPE's base only from `rope_parameters` (10000 when that is absent, whatever `attn_config.rope_theta`
    says), refuses an int for `moe_normalize_expert_weights` and `moe_loss_weight`, and can't run a null `clip_qkv`.
    """
    attn, ffn = config["attn_config"], config["ffn_config"]
    clip, p = attn.get("clip_qkv"), ffn.get("moe_normalize_expert_weights", 1)
    return DbrxConfig(
        d_model=config["d_model"],
        n_heads=config["n_heads"],
        n_layers=config["n_layers"],
        max_seq_len=config["max_seq_len"],
        vocab_size=config["vocab_size"],
        attn_config={**attn, "clip_qkv": UNCLIPPED if clip is None else clip},
        ffn_config={
            **ffn,
            "moe_loss_weight": float(ffn.get("moe_loss_weight", 0.0)),
            "moe_normalize_expert_weights": None if p is None else float(p),
        },
        rope_parameters={"rope_type": "default", "rope_theta": float(attn["rope_theta"])},
    )


def transformers_model(
    config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], dtype: TorchDtype = "float32"
) -> DbrxForCausalLM:
    """transformers' model with eager attention, holding the fused `tensors` as `dtype`.

    float64 isn't exact: RoPE's angles, cos and sin and the attention's softmax are computed in float32 whatever the
    dtype. That leaves up to 1.5e-7 of the largest logit at 40 tokens and 4e-7 at 250, because the angles' error grows
    with the position; `in_float64` removes it. In bfloat16 the router's softmax runs in bfloat16, where Databricks'
    code and mlx-lm take float32, and near ties choose other experts.
    """
    # Not .to(dtype): that would also round RoPE's frequencies to bfloat16, which loading a checkpoint doesn't.
    from_config: Callable[..., DbrxForCausalLM] = DbrxForCausalLM._from_config
    model = from_config(transformers_config(config), dtype=getattr(torch, dtype), attn_implementation="eager")
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    model.train(False)
    return model


def transformers_model_from(folder: Path, dtype: TorchDtype = "float32") -> DbrxForCausalLM:
    """The same from a folder in the Hugging Face layout."""
    config = transformers_config(json.loads((folder / "config.json").read_text()))
    from_pretrained: Callable[..., DbrxForCausalLM] = DbrxForCausalLM.from_pretrained
    return from_pretrained(folder, config=config, dtype=getattr(torch, dtype), attn_implementation="eager")


class Float64Rope(torch.nn.Module):  # type: ignore[misc]
    """Stands in for `DbrxRotaryEmbedding`, whose arithmetic is float32 whatever the model's dtype."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` int64 [batch time] -> cos and sin, float64 [batch time head_dim]."""
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def in_float64(model: DbrxForCausalLM) -> DbrxForCausalLM:
    """A float64 transformers model without its float32 parts: RoPE replaced, and torch's own attention for eager."""
    config: Any = model.config
    transformer: Any = model.transformer
    transformer.rotary_emb = Float64Rope(config.d_model // config.n_heads, config.rope_parameters["rope_theta"])
    config._attn_implementation = "sdpa"
    return model


def transformers_logits(model: DbrxForCausalLM, tokens: Sequence[int]) -> NDArray[Any]:
    """`tokens` [time] -> logits [time vocab], float64 from a float64 model and float32 from any other."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return np.asarray(logits if logits.dtype == torch.float64 else logits.float())


def transformers_greedy(model: DbrxForCausalLM, tokens: Sequence[int], n: int) -> list[int]:
    """The `n` likeliest next tokens, through transformers' `generate` and its cache."""
    prompt = torch.tensor([tokens])
    generate: Any = model.generate
    out = generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n, pad_token_id=0)
    return [int(token) for token in out[0, len(tokens) :]]


def mlx_lm_is_right(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm computes what `config` says.

    It ignores `moe_normalize_expert_weights` and always divides by the sum, which is right for 1, and for any norm
    of a single weight; and it ignores `ffn_act_fn`.
    """
    ffn = config["ffn_config"]
    p, act = ffn.get("moe_normalize_expert_weights", 1), ffn.get("ffn_act_fn") or {"name": "silu"}
    return (p == 1 or (p is not None and ffn["moe_top_k"] == 1)) and act["name"] == "silu"


def mlx_lm_model(folder: Path) -> MlxLmModel:
    """mlx-lm's model of a written folder, fused or split, in the files' dtype; see `mlx_lm_is_right`."""
    attn = json.loads((folder / "config.json").read_text())["attn_config"]
    clip = attn.get("clip_qkv")
    model, _ = load_model(
        folder, model_config={"attn_config": {**attn, "clip_qkv": UNCLIPPED if clip is None else clip}}
    )
    assert isinstance(model, MlxLmModel)
    model.eval()
    return model


def mlx_lm_logits(model: MlxLmModel, tokens: Sequence[int]) -> NDArray[np.float32]:
    """`tokens` [time] -> logits float32 [time vocab], whatever the model's dtype."""
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def mlx_lm_greedy(model: MlxLmModel, tokens: Sequence[int], n: int) -> list[int]:
    """The `n` likeliest next tokens, through mlx-lm's cache."""
    cache = make_prompt_cache(model)
    out: list[int] = []
    step = list(tokens)
    for _ in range(n):
        token = int(model(mx.array([step]), cache=cache)[0, -1].argmax().item())
        out.append(token)
        step = [token]
    return out
