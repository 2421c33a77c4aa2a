"""Writes a parameter tree as a checkpoint folder: config, tensors, tokenizer; the loader's inverse.

What is written is read by mlx-lm too, and by transformers if it is dense and in the fused layout.
"""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.atomic import new_folder
from dbrx_fn.config import Config, config_to_dict
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.layouts import Layout, sources
from dbrx_fn.params import Format, Params, check_params
from dbrx_fn.quantization import tree_formats

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    # The code of the released model's own tokenizer, which transformers and mlx-lm run.
    "tiktoken.py",
)


def save(
    folder: str | Path,
    params: Params,
    config: Config,
    *,
    layout: Layout | None = None,
    tokenizer_files: Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a new checkpoint folder, which appears when it is complete, or not at all.

    Args:
        folder: to be made; its parents too, where they are missing.
        params: the tree, dense or quantized.
        config: the model's.
        layout: of the tensors; `fused`, or `split` if experts are quantized, if not given.
        tokenizer_files: a checkpoint's folder whose tokenizer is copied, with the stop tokens that belong to it.
        metadata: texts for the header of the tensors' file, beside its `format`.

    Raises:
        InputError: if the folder exists or can't be written, `tokenizer_files` is no folder, or the layout can't hold
            the tree.
        CheckpointError: if the tree doesn't fit the config, or was left in files that can't be read any more.
    """
    with new_folder(Path(folder)) as beside:
        write_checkpoint(beside, params, config, layout=layout, tokenizer_files=tokenizer_files, metadata=metadata)


def write_checkpoint(
    folder: Path,
    params: Params,
    config: Config,
    *,
    layout: Layout | None = None,
    tokenizer_files: Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint's files into a folder that nobody reads yet; arguments and errors are those of `save`."""
    check_params(params, config)
    formats = tree_formats(params, config)
    quantized_experts = [path for path in formats if ".experts." in path]
    if layout is None:
        layout = "split" if quantized_experts else "fused"
    if layout == "fused" and quantized_experts:
        raise InputError(
            f"layout is 'fused', which can't hold quantized experts ({quantized_experts[0]}): take 'split'."
        )
    if tokenizer_files is not None and not tokenizer_files.is_dir():
        raise InputError(
            f"tokenizer_files is {tokenizer_files}, which isn't a folder: give the tokenizer's checkpoint."
        )

    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    tensors: dict[str, mx.array] = {}
    for path, source in sources(config, layout, formats).items():
        tensors |= zip(source.names, source.part(leaves[path]), strict=True)
    settings = config_to_dict(config) | _quantization_settings(config, layout, formats)
    if tokenizer_files is not None:
        copy_tokenizer(tokenizer_files, folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_tensors(folder / "model.safetensors", tensors, {"format": _FRAMEWORKS[layout], **(metadata or {})})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a checkpoint's tokenizer, chat template and stop tokens; the folder is made if it isn't there.

    Stop tokens that only config.json names are written into generation_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    generation, stops = _settings(source / "generation_config.json"), _settings(source / "config.json")
    if generation.get("eos_token_id") is None and stops.get("eos_token_id") is not None:
        generation["eos_token_id"] = stops["eos_token_id"]
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


# transformers refuses a file that doesn't say whose it is.
_FRAMEWORKS: Mapping[Layout, str] = {"fused": "pt", "split": "mlx"}


def write_tensors(file: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Writes one safetensors file, into a folder that nobody reads yet.

    Raises:
        CheckpointError: if the tensors can't be computed.
        OSError: if the file can't be written; on a full disk with that `errno`.
    """
    try:
        mx.eval(tensors)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"The parameters can't be read or computed ({error}): check the files that they come from, and the memory."
        ) from None
    try:
        mx.save_safetensors(str(file), tensors, metadata)
    except RuntimeError as error:
        # MLX doesn't say why it couldn't write.
        full = shutil.disk_usage(file.parent).free < sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.ENOSPC) if full else str(error)) from None


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file's fields; none, if there is no such file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _quantization_settings(config: Config, layout: Layout, formats: Mapping[str, Format]) -> dict[str, Any]:
    """What mlx-lm writes into config.json of a quantized model: one format, and by their paths the linears of others.

    A linear that has no `scales` among the tensors isn't quantized, whatever is said here (`mlx_lm.utils.load_model`).
    """
    if not formats:
        return {}
    linears = {
        name.removesuffix(".weight"): formats[path]
        for path, source in sources(config, layout).items()
        if path in formats
        for name in source.names
    }
    most = Counter(linears.values()).most_common(1)[0][0]
    quantization = _as_settings(most) | {path: _as_settings(form) for path, form in linears.items() if form != most}
    return {"quantization": quantization, "quantization_config": quantization}


def _as_settings(form: Format) -> dict[str, Any]:
    return {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
