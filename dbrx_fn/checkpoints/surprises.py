"""Surprising properties of a checkpoint that loads: files that contradict its tensors, and missing files."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dbrx_fn.checkpoints.checkpoint import Checkpoint
from dbrx_fn.checkpoints.description import Description, Part, PartName, format_text, part_of
from dbrx_fn.checkpoints.gguf_tokenizer import gguf_tokenizer_kind
from dbrx_fn.checkpoints.layouts import sources
from dbrx_fn.checkpoints.safetensors_file import PICKLES, is_hidden
from dbrx_fn.errors import TokenizerError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown
from dbrx_fn.model.params import listed

_TIKTOKEN_CLASS = "TiktokenTokenizerWrapper"


def tokenizer_text(path: Path) -> str | None:
    """A description of a checkpoint's tokenizer, or `None` if `generate` won't find one."""
    if path.is_file():
        with contextlib.suppress(TokenizerError):
            return gguf_tokenizer_kind(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file():
        return "tokenizer.json" if folder == path else "tokenizer.json, which lies beside it"
    settings = _fields(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == _TIKTOKEN_CLASS:
        return f"tiktoken's {settings.get('model_name') or 'gpt-4'}, downloaded on first use"
    return None


def surprises(checkpoint: Checkpoint, description: Description) -> list[str]:
    """One sentence for each surprise, in no particular order."""
    found = [*_of_formats(checkpoint, description.parts), *_of_orientation(checkpoint)]
    if checkpoint.path.is_file():
        if tokenizer_text(checkpoint.path) is None:
            found.append(_own_tokenizer_problem(checkpoint.path))
        return found
    config = _fields(checkpoint.path / "config.json")
    found += [*_of_config(checkpoint, config), *_of_stop_tokens(checkpoint, config), *_of_files(checkpoint)]
    if tokenizer_text(checkpoint.path) is None:
        found.append("No tokenizer.json, and no tokenizer_config.json that names tiktoken's: generate needs one.")
    return found


def _own_tokenizer_problem(file: Path) -> str:
    try:
        gguf_tokenizer_kind(file)
    except TokenizerError as error:
        return str(error)
    return ""


def _of_formats(checkpoint: Checkpoint, parts: Mapping[PartName, Part]) -> Iterator[str]:
    quantized = {part_of(path): format_text(form) for path, form in checkpoint.formats.items()}
    for name, part in parts.items():
        if name in quantized and len(part.formats) > 1:
            counts = ", ".join(f"{text} in {count}" for text, count in part.formats.items())
            yield f"{name}: several formats, by numbers of matrices: {counts}."
    if "router" in quantized:
        yield f"The router is quantized ({quantized['router']}): its errors send tokens to other experts."


def _of_orientation(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    if checkpoint.layout in ("converted", "mlp_experts") and config.d_model == config.ffn.ffn_hidden_size:
        yield "w2 is square, so its shape doesn't show whether it is transposed: it is read as not transposed."


def _of_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    said = config.get("dtype") or config.get("torch_dtype")
    if said is not None and str(said).removeprefix("torch.") != checkpoint.config.dtype:
        yield f"config.json says {shown(said)} and most tensors are {checkpoint.config.dtype}: the tensors count."
    first, second = config.get("quantization"), config.get("quantization_config")
    if first is not None and second is not None and first != second:
        yield "config.json's quantization and quantization_config differ: the tensors count."
    settings = first if first is not None else second
    if not settings:
        if checkpoint.formats:
            yield "config.json doesn't say that matrices are quantized, which mlx-lm needs."
        return
    if not isinstance(settings, dict):
        yield f"config.json's quantization is {shown(settings)} where an object is expected: the tensors count."
        return
    if "quant_method" in settings:
        yield (
            f"config.json names the quantization {shown(settings['quant_method'])}, which is ignored here: the tensors"
            " count."
        )
    if not checkpoint.formats:
        yield "config.json says that matrices are quantized, and none is: the tensors count."
        return
    if "quant_method" not in settings:
        yield from _contradictions(checkpoint, settings)


def _contradictions(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on matrices whose format differs from config.json's.

    config.json is read as in mlx-lm (`mlx_lm.utils.load_model`): one format, and by path the linears with another. A
    linear without scales isn't quantized, regardless of config.json.
    """
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    table = sources(checkpoint.config, checkpoint.layout)
    for path, form in checkpoint.formats.items():
        for name in table[path].names:
            own = settings.get(name.removesuffix(".weight"), settings)
            said = _said(own) if isinstance(own, dict) else "none"
            if said != format_text(form):
                text = f"{said} where the tensors are {format_text(form)}"
                examples.setdefault(text, name)
                counts[text] += 1
    for text, count in counts.most_common():
        more = f" and {count - 1} more" if count > 1 else ""
        yield f"config.json's quantization says {text} ({examples[text]}{more}): the tensors count."


def _said(settings: Mapping[str, Any]) -> str:
    return f"{settings.get('mode', 'affine')} {settings.get('bits')}:{settings.get('group_size')}"


def _of_stop_tokens(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the stop tokens of generation_config.json, or else of config.json."""
    generation = _fields(checkpoint.path / "generation_config.json")
    file = "config.json" if generation.get("eos_token_id") is None else "generation_config.json"
    said = (config if file == "config.json" else generation).get("eos_token_id")
    tokens = said if isinstance(said, list) else [said]
    if said is None or not tokens:
        yield "Neither generation_config.json nor config.json names stop tokens (eos_token_id): answers may never end."
    elif not all(type(token) is int and 0 <= token < checkpoint.config.vocab_size for token in tokens):
        yield f"{file}'s eos_token_id is {shown(said)} where tokens below {checkpoint.config.vocab_size} are expected."


def _of_files(checkpoint: Checkpoint) -> Iterator[str]:
    used = {tensor.file.name for tensor in checkpoint.tensors.values()}
    others = sorted(
        file.name
        for file in checkpoint.path.iterdir()
        if file.suffix.lower() in (".safetensors", ".gguf", *PICKLES) and file.name not in used and not is_hidden(file)
    )
    if others:
        size = sum((checkpoint.path / name).stat().st_size for name in others if (checkpoint.path / name).is_file())
        yield f"Files of weights that are not read ({math.ceil(size / 2**20):,} MiB): {listed(others, most=5)}."


def _fields(file: Path) -> Mapping[str, Any]:
    """A JSON file's fields. A missing file has none, nor has one that isn't an object."""
    try:
        content = parse_json(read_bounded(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
