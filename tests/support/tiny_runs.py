"""Texts and options for runs of `python -m dbrx_fn.train` that take seconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.loader import load

TINY: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 300,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000},
    "ffn_config": {
        "ffn_hidden_size": 32,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_loss_weight": 0.05,
        "moe_jitter_eps": 0.01,
    },
    "torch_dtype": "float32",
}

_WORDS = ["the", "witch", "and", "a", "king", "of", "night", "came", "when", "shall", "we", "three", "meet", "again"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of few words, always the same for a seed."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(4, 12))).capitalize() + "." for _ in range(count)]


def write_config(file: Path, **changes: Any) -> Path:
    """Writes the tiny model's config.json."""
    file.write_text(json.dumps({**TINY, **changes}))
    return file


def write_text(file: Path, count: int = 400, seed: int = 0) -> Path:
    """Writes sentences, one a line."""
    file.write_text("\n".join(sentences(count, seed)) + "\n")
    return file


def write_conversations(file: Path, count: int = 120, seed: int = 1) -> Path:
    """Writes a JSONL file of conversations, and of prompts with their completions."""
    said = sentences(2 * count, seed)
    lines: list[dict[str, Any]] = []
    for prompt, answer in zip(said[::2], said[1::2], strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        lines.append({"messages": messages} if len(lines) % 2 else {"prompt": prompt, "completion": " " + answer})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def arguments(out: Path, config: Path | None, data: Sequence[Path], **options: Any) -> list[str]:
    """The command's arguments; `options` go over those of a short run."""
    given: dict[str, Any] = {"steps": 6, "batch_size": 4, "sequence_length": 16, "log_every": 1} | options
    named = {"out": out, **({} if config is None else {"config": config}), **given}
    flags = [text for name, value in named.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [*flags, "--data", *map(str, data)]


def metrics(run: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """A run's lines, but for what the clock says unless that is asked for."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if clock:
        return lines
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def parameters(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint's parameters in float32, by their paths."""
    leaves: dict[str, mx.array] = dict(tree_flatten(load(checkpoint)[0]))
    return {path: np.array(array.astype(mx.float32)) for path, array in leaves.items()}


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(entry.name for entry in folder.iterdir())
