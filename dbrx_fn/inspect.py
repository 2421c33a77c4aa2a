"""`python -m dbrx_fn.inspect`: describes a checkpoint, and says whether it fits this machine. No tensor is read.

python -m dbrx_fn.inspect databricks/dbrx-instruct --context 8192
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.description import PARTS, Description, Part, describe
from dbrx_fn.checkpoints.hub_headers import headers_of
from dbrx_fn.checkpoints.layouts import Layout
from dbrx_fn.checkpoints.surprises import surprises, tokenizer_text
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import print_result, size_text
from dbrx_fn.model.config import Config
from dbrx_fn.runtime.device import Backend

MISFIT = 1
"""The exit status if tensors don't fit the config. The checkpoint is described, but can't be loaded."""

_LAYOUTS: dict[Layout, str] = {
    "fused": "Hugging Face's and MegaBlocks': the experts' rows in one matrix",
    "split": "mlx-lm's: a matrix for each expert",
    "stacked": "this package's own: the experts stacked as in the tree",
    "converted": "LnL-AI's and ModelCloud's converted-v2: a linear for each expert",
    "mlp_experts": "v2ray's: a linear for each expert, under mlp_experts",
    "nxd": "AWS NxD's, for training",
    "nxd_inference": "AWS NxD's, for inference",
    "gguf": "llama.cpp's",
}
_DEVICES: dict[Backend, str] = {"cpu": "CPU", "cuda": "GPU", "metal": "GPU"}
_MOST_SHOWN = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: described, and its tensors fit the config. 1: described, but some don't. 2: it can't be described, and one
    sentence on standard error says why. 130: after Ctrl-C.
    """
    return run(_run, parser(), arguments)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("inspect"),
        description="Describe a DBRX checkpoint of any known layout, and say whether it fits this machine. Only headers"
        " are read.",
        epilog="Exit status: 0 if its tensors fit the config; 1 if some are missing, unexpected or of a wrong shape"
        " (they are listed); 2 if it can't be described.",
    )
    add = options.add_argument
    add("checkpoint", help="folder, GGUF file, or Hugging Face repository as owner/name; only headers are fetched")
    add("--revision", help="branch, tag or commit of the repository")
    add("--context", type=int, metavar="N", help="tokens per sequence (default: the longest that the model supports)")
    add("--batch-size", type=int, default=1, metavar="B", help="number of sequences at once (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table, with sizes in bytes")
    return options


def _run(chosen: argparse.Namespace) -> int:
    with headers_of(chosen.checkpoint, revision=chosen.revision) as path:
        with _noted_warnings(f"{path}/") as noted:
            checkpoint = open_checkpoint(path)
        description = describe(checkpoint, context=chosen.context, batch_size=chosen.batch_size)
        tokenizer, found = tokenizer_text(path), [*noted, *surprises(checkpoint, description)]
    if description.cache.context > description.config.max_seq_len:
        found.append(
            f"A context of {description.cache.context:,} tokens is longer than the {description.config.max_seq_len:,}"
            " that the model supports."
        )
    say = (chosen.checkpoint, description, tokenizer, found)
    print_result(json.dumps(as_json(*say), indent=2) if chosen.json else table(*say))
    return MISFIT if description.problems else 0


def as_json(name: str, description: Description, tokenizer: str | None, found: Sequence[str]) -> dict[str, Any]:
    """The contents of the table and more, under stable keys. Sizes are in bytes."""
    return {
        "checkpoint": name,
        **asdict(description),
        "config": _flat(description.config),
        "tokenizer": tokenizer,
        "surprises": list(found),
    }


def table(name: str, description: Description, tokenizer: str | None, found: Sequence[str]) -> str:
    """The description as text for people."""
    config, cache, memory = description.config, description.cache, description.memory
    files = f"{description.files} file{'s' if description.files != 1 else ''}"
    clip = "no clamp" if config.attn.clip_qkv is None else f"clip_qkv {config.attn.clip_qkv:g}"
    rows = [
        ("layout", f"{description.layout} ({_LAYOUTS[description.layout]})"),
        ("size", f"{size_text(description.file_bytes)} in {files}"),
        ("model", f"{config.n_layers} layers, {config.d_model:,} wide, {config.dtype}"),
        ("attention", f"{config.n_heads} heads of {config.head_dim}, {config.attn.kv_n_heads} for keys and values"),
        ("", f"rope_theta {config.attn.rope_theta:,.10g}, {clip}"),
        (
            "experts",
            f"{config.ffn.moe_num_experts}, {config.ffn.moe_top_k} to a token, {config.ffn.ffn_hidden_size:,} wide",
        ),
        ("vocabulary", f"{config.vocab_size:,} tokens, context {config.max_seq_len:,}"),
        ("parameters", f"{description.parameters:,}"),
        ("active", f"{description.active_parameters:,} to a token"),
        ("tokenizer", tokenizer or "none"),
    ]
    room = "" if cache.capacity == cache.context else f" (room for {cache.capacity:,})"
    verdict = f"{size_text(memory.left)} left" if memory.fits else f"{size_text(-memory.left)} too much"
    takes = [
        ("decoding", f"reads {size_text(description.bytes_per_token)} of weights for each token of one sequence"),
        ("cache", f"{size_text(cache.bytes_per_token)} a token"),
        ("", f"{size_text(cache.bytes)} for {cache.batch_size:,} x {cache.context:,} tokens{room}"),
        ("memory", f"{size_text(memory.needed)} for weights and cache"),
        ("this machine", f"{size_text(memory.bytes)} ({_DEVICES[memory.backend]})"),
        ("fits", f"{'yes' if memory.fits else 'no'}, {verdict}"),
    ]
    blocks = [[name], _aligned(rows), _parts_table(description), _aligned(takes)]
    blocks += [
        _findings(title, texts)
        for title, texts in (
            ("don't fit the config", description.problems),
            ("of another dtype, so that loading needs --dtype", description.mixed),
            ("surprising", found),
        )
        if texts
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:14}{text}" for name, text in rows]


def _parts_table(description: Description) -> list[str]:
    whole = Part(description.parameters, description.weight_bytes, description.bits_per_weight, {})
    lines = [f"{'':10}{'parameters':>18}{'size':>14}{'bits a weight':>16}  stored as"]
    for name, part in [*((name, description.parts[name]) for name in PARTS), ("in all", whole)]:
        bits = "" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}"
        figures = f"{name:10}{part.parameters:>18,}{size_text(part.bytes):>14}{bits:>16}"
        lines.append(f"{figures}  {_formats(part)}".rstrip())
    return lines


def _formats(part: Part) -> str:
    if len(part.formats) == 1:
        return next(iter(part.formats))
    return ", ".join(f"{text} ({count})" for text, count in part.formats.items())


def _findings(title: str, texts: Sequence[str]) -> list[str]:
    more = [f"  and {len(texts) - _MOST_SHOWN} more, which --json lists"] if len(texts) > _MOST_SHOWN else []
    return [f"{title}:", *(f"  {text}" for text in texts[:_MOST_SHOWN]), *more]


def _flat(config: Config) -> dict[str, Any]:
    """A config's fields and `head_dim`, in one flat object."""
    fields = asdict(config)
    attn, ffn = fields.pop("attn"), fields.pop("ffn")
    return {**fields, **attn, **ffn, "head_dim": config.head_dim}


@contextmanager
def _noted_warnings(prefix: str) -> Iterator[list[str]]:
    """Collects warnings' texts, without the prefix."""
    noted: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield noted
    noted += [str(warning.message).removeprefix(prefix) for warning in caught]


if __name__ == "__main__":
    sys.exit(main())
