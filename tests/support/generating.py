"""A small random model for the tests of `generate`, and the command as a process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.model.config import AttnConfig, Config, FFNConfig

CONFIG = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=1500,
    vocab_size=320,
    attn=AttnConfig(clip_qkv=2.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    # So large that the text varies, which with the usual 0.02 it doesn't.
    initializer_range=0.5,
    dtype="float32",
)
ROUTER = "transformer.blocks.1.ffn.router.layer.weight"
# What never ends a text: every id from the byte tokenizer's special ones on.
NO_SPECIAL = [f"--logit-bias={token}:-1e9" for token in range(256, CONFIG.vocab_size)]

Command = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def process(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.generate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        **more,
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = str(folder / "model.safetensors")
    tensors: Any = mx.load(path)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(path, tensors, {"format": "pt"})
