"""Saves a parameter tree as a checkpoint folder with config, tensors and tokenizer: the loader's inverse.

mlx-lm can read the result too, and so can transformers if it is dense and in the fused layout.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.checkpoints.layouts import Written, holds_quantized, sources
from dbrx_fn.checkpoints.raw import Raw, raw
from dbrx_fn.checkpoints.safetensors_file import INDEX
from dbrx_fn.checkpoints.shards import SHARD_BYTES, Shard, index_content, plan_shards, write_shard
from dbrx_fn.errors import CheckpointError, InputError, TokenizerError
from dbrx_fn.files.atomic import new_folder
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, parse_json, read_bounded, shown, shown_path
from dbrx_fn.model.adapters import adapted
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import check_params, companions
from dbrx_fn.model.quantization import tree_formats
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.arguments import checked

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    # The released model's own tokenizer code, which transformers and mlx-lm run.
    "tiktoken.py",
)


CHECKPOINT_FILES = (*TOKENIZER_FILES, "config.json", INDEX, "model.safetensors", "model-*-of-*.safetensors")
"""Patterns of the names of all files of a written checkpoint."""


@checked
def save(
    folder: str | Path,
    params: Params,
    config: Config,
    *,
    layout: Written | None = None,
    tokenizer_files: str | Path | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a new checkpoint folder, which appears when it is complete, or not at all.

    Hidden leftovers of a process that was killed while writing this folder are removed first.

    Args:
        folder: the new folder. Missing parents are made too.
        params: the tree, dense or quantized.
        config: the model's.
        layout: the tensors' layout. If not given, `fused`, or `split` for quantized experts.
        tokenizer_files: a checkpoint's folder whose tokenizer and stop tokens are copied.
        metadata: texts for the headers of the tensors' files, beside `format`.
        shard_bytes: the largest size of a file's tensors. Only a single linear may be larger.

    Raises:
        InputError: if the folder exists or can't be written, if `tokenizer_files` isn't a folder, if the layout can't
            hold the tree, or if an argument has another type.
        CheckpointError: if the tree doesn't fit the config, or its lazy tensors can't be read any more.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes} where it must be at least 1.")
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise InputError(f"metadata is {shown(metadata)} where texts under texts are expected.")
    with new_folder(Path(folder), files=CHECKPOINT_FILES) as beside:
        write_checkpoint(
            beside,
            params,
            config,
            layout=layout,
            tokenizer_files=None if tokenizer_files is None else Path(tokenizer_files),
            metadata=metadata,
            shard_bytes=shard_bytes,
        )


def write_checkpoint(
    folder: Path,
    params: Params,
    config: Config,
    *,
    layout: Written | None = None,
    tokenizer_files: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint's files into a folder that nobody reads yet. Arguments and errors are those of `save`."""
    check_params(params, config)
    if with_adapters := adapted(params):
        raise InputError(
            f"{with_adapters[0]} has an adapter, which no layout holds: merge them with fuse_adapters first."
        )
    formats = tree_formats(params, config)
    if layout is None:
        layout = "split" if any(".experts." in path for path in formats) else "fused"
    check_layout(layout, formats)
    if tokenizer_files is not None and not tokenizer_files.is_dir():
        raise InputError(
            f"tokenizer_files is {shown_path(tokenizer_files)}, which isn't a folder: give the tokenizer's checkpoint."
        )

    table = sources(config, layout, formats)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))

    def matrices(linear: str) -> Iterator[Mapping[str, Raw]]:
        paths = [path for path in companions(f"{linear}.weight") if path in table]
        parts = [raw(leaves[path]) for path in paths]
        for matrix in zip(*parts, strict=True) if table[paths[0]].leaf.is_expert else [parts]:
            yield dict(zip(paths, matrix, strict=True))

    shards = plan_shards(
        table, config.dtype, shard_bytes=shard_bytes, metadata=header_texts(layout) | dict(metadata or {})
    )
    contents = small_files(config, layout, formats, shards, tokenizer_files)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for shard in shards:
        with (folder / shard.file).open("xb") as out:
            write_shard(out, shard, table, matrices, lambda *_: None)


def check_layout(layout: Written, formats: Mapping[str, Format]) -> None:
    """Raises `InputError` if a layout can't hold matrices of these formats."""
    for path in formats:
        if not holds_quantized(layout, path):
            raise InputError(
                f"layout is {layout!r}, which can't hold quantized experts ({path}): take 'split' or 'stacked', or"
                " dequantize them."
            )


def small_files(
    config: Config,
    layout: Written,
    formats: Mapping[str, Format],
    shards: Sequence[Shard],
    tokenizer_files: Path | None,
) -> dict[str, bytes]:
    """The contents of all files of a checkpoint except its shards, by their names.

    Raises:
        TokenizerError: as in `copy_tokenizer`.
    """
    contents = {} if tokenizer_files is None else tokenizer_contents(tokenizer_files)
    index = index_content(shards)
    if index is not None:
        contents[INDEX] = index
    # mlx-lm needs the quantization settings of a quantized model.
    settings = config_to_dict(config) | _quantization_settings(config, layout, formats)
    contents["config.json"] = _text(settings)
    return contents


def header_texts(layout: Written) -> dict[str, str]:
    """The metadata of a safetensors header. transformers refuses a file without `format`."""
    return {"format": "pt" if layout == "fused" else "mlx"}


def copy_tokenizer(source: Path, folder: Path, stop_tokens: Collection[int] = ()) -> None:
    """Copies a checkpoint's tokenizer, chat template and stop tokens. A missing folder is made.

    If generation_config.json names no stop tokens, those of config.json, or else `stop_tokens`, are written into it.

    Raises:
        TokenizerError: if a file can't be read, or is far larger than any tokenizer's.
    """
    contents = tokenizer_contents(source, stop_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def tokenizer_contents(source: Path, stop_tokens: Collection[int] = ()) -> dict[str, bytes]:
    """The contents of the files that `copy_tokenizer` writes, by their names. Errors are its own."""
    contents: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            try:
                contents[name] = read_bounded(source / name, LARGEST_VOCABULARY)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise TokenizerError(
                    f"{source / name} can't be copied ({reason}): copy it again, or remove it."
                ) from None
    generation, stops = _settings(source / "generation_config.json"), _settings(source / "config.json")
    ids = stops.get("eos_token_id")
    if ids is None and stop_tokens:
        ids = sorted(stop_tokens)
    if generation.get("eos_token_id") is None and ids is not None:
        contents["generation_config.json"] = _text(generation | {"eos_token_id": ids})
    return contents


def write_tensors(file: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Writes a new safetensors file, into a folder that nobody reads yet.

    MLX writes the file. The safetensors library would make it readable for its owner only, and its errors have no
    `errno`.

    Raises:
        CheckpointError: if the tensors can't be computed.
        OSError: if the file can't be written.
    """
    try:
        mx.eval(tensors)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"The parameters can't be read or computed ({error}): check the files that they come from, and the memory."
        ) from None
    # MLX gets an open file, since with a name its errors don't say why writing failed.
    with file.open("xb") as out:
        mx.save_safetensors(out, tensors, metadata)


def _text(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file's fields. A missing file has none."""
    try:
        content = parse_json(read_bounded(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _quantization_settings(config: Config, layout: Written, formats: Mapping[str, Format]) -> dict[str, Any]:
    """mlx-lm's settings in config.json for a quantized model: one format, and by path the linears with another.

    A linear without `scales` isn't quantized, regardless of these settings (`mlx_lm.utils.load_model`).
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
