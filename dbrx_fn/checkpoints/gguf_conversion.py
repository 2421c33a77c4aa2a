"""Writes a checkpoint as a GGUF file that llama.cpp runs, one matrix at a time.

Names and metadata are those of `DbrxModel` in llama.cpp's converter (conversion/dbrx.py).
"""

import contextlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from dbrx_fn.checkpoints.checkpoint import Checkpoint, LeafReader, require_fit
from dbrx_fn.checkpoints.finite import not_finite
from dbrx_fn.checkpoints.gguf_quantize import blocks_of_floats, blocks_of_leaves, same_type
from dbrx_fn.checkpoints.gguf_types import TYPES, BlockType
from dbrx_fn.checkpoints.gguf_vocabulary import vocabulary_metadata
from dbrx_fn.checkpoints.gguf_writer import TensorInfo, Value, header
from dbrx_fn.checkpoints.layouts import sources
from dbrx_fn.checkpoints.raw import Raw, of_raw, raw
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.errors import CheckpointError, InputError, TokenizerError
from dbrx_fn.files.atomic import new_file
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import companions, listed, param_count
from dbrx_fn.ops.formats import Format, dequantize_matrix

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
"""The types that can be written."""

_KINDS = {kind.name: kind for kind in TYPES.values()}
_OF_DTYPE = {"float32": _KINDS["F32"], "float16": _KINDS["F16"], "bfloat16": _KINDS["BF16"]}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""`llama_ftype` of llama.cpp's include/llama.h."""


@dataclass(frozen=True)
class GgufRequest:
    """The options of a GGUF file.

    `kind`: the type of all matrices but the routers. `None` keeps what is stored, if GGUF has it exactly.
    `dequantize`: turn quantized matrices into floats first.
    `dtype`: of floats, if `kind` is `None`. As stored, if not given.
    `check`: refuse weights that are NaN or infinite.
    `tokenizer`: folder with the tokenizer files. The source's own, if `None`.
    """

    kind: GgufType | None = None
    dequantize: bool = False
    dtype: Dtype | None = None
    check: bool = False
    tokenizer: Path | None = None


@dataclass(frozen=True, eq=False)
class GgufPlan:
    """A checked plan of a GGUF file.

    `tensors`: the tensors by the paths of their leaves, in the file's order.
    `same`: the paths of the quantized matrices that are written bit for bit.
    """

    source: Checkpoint
    request: GgufRequest
    config: Config
    tensors: Mapping[str, TensorInfo]
    same: frozenset[str]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes + tensor.padding for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Written bits per parameter."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / param_count(self.config)


def plan_gguf(source: Checkpoint, request: GgufRequest) -> GgufPlan:
    """Plans a GGUF file and checks that it is possible. Of tensors only scales and biases are read.

    Raises:
        InputError: if llama.cpp would compute another model, or a matrix's format isn't GGUF's and no type is given.
        CheckpointError: if the checkpoint's tensors don't fit its config.
        TokenizerError: if llama.cpp would make other tokens than the tokenizer.
    """
    require_fit(source, one_dtype=request.dtype is None and request.kind is None)
    config = replace(source.config, dtype=request.dtype or source.config.dtype)
    check_llama_cpp_model(config)
    reader = LeafReader(source)
    tensors: dict[str, TensorInfo] = {}
    same: set[str] = set()
    for path, target in sources(config, "gguf").items():
        (stored,) = target.stored
        kind = _wanted_kind(request, config, path, stored.shape)
        is_quantized = path in source.formats and not request.dequantize
        if is_quantized and (kind.is_quantized or request.kind is None) and ".router." not in path:
            exact = _same_type(source, reader, path)
            if exact is None and request.kind is None:
                raise _without_type(path, source.formats[path])
            if exact is not None and request.kind in (None, exact.name.lower()):
                kind = exact
                same.add(path)
        tensors[path] = TensorInfo(stored.name, stored.shape, kind)
    metadata = _metadata(config, source.path, tensors) | _vocabulary(source, request, config)
    return GgufPlan(source, request, config, tensors, frozenset(same), header(metadata, list(tensors.values())))


def write_gguf(plan: GgufPlan, file: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the file. It appears when it is complete, or not at all.

    Args:
        plan: from `plan_gguf`.
        file: the new file. Missing parents of it are made.
        progress: called with bytes written and bytes in all.

    Raises:
        InputError: if the file exists or can't be written.
        CheckpointError: if a tensor can't be read, or with `check` isn't finite.
    """
    require_free_file(file)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as out:
        _check_space(plan.nbytes, file)
        out.write(plan.header)
        done = len(plan.header)
        reader = LeafReader(plan.source)
        for path, tensor in plan.tensors.items():
            for piece in _pieces(plan, reader, path, tensor.kind):
                out.write(np.ascontiguousarray(piece).data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, plan.nbytes)
            out.write(bytes(tensor.padding))
            done += tensor.padding
        # Somebody may have made it in the hours that this took.
        require_free_file(file)


def require_free_file(file: Path) -> None:
    """Raises `InputError` if a new file's name is taken or isn't a GGUF file's."""
    if file.suffix != ".gguf":
        raise InputError(f"{file} is the name of a folder where a GGUF file is written: name it {file.name}.gguf.")
    if os.path.lexists(file):
        raise InputError(f"{file} exists already: choose another name, or remove it.")


def check_llama_cpp_model(config: Config) -> None:
    """Raises `InputError` for a model that llama.cpp would compute in another way."""
    ffn = config.ffn
    for name, value, ok in (
        (
            "ffn_config.moe_normalize_expert_weights",
            ffn.moe_normalize_expert_weights,
            ffn.moe_normalize_expert_weights == 1,
        ),
        ("ffn_config.ffn_act_fn", ffn.ffn_act_fn, ffn.ffn_act_fn in ("silu", "swish")),
    ):
        if not ok:
            raise InputError(f"{name} is {value!r}, and llama.cpp computes DBRX only with the released model's.")
    attn = config.attn
    for name, number in ("clip_qkv", attn.clip_qkv), ("rope_theta", attn.rope_theta):
        # In the file 0 would mean no clamp, and a larger number doesn't fit.
        if number is not None and not 2.0**-126 <= number < 2.0**127:
            raise InputError(
                f"attn_config.{name} is {number:g}, and float32, as GGUF has it, can't hold that: mend config.json."
            )


def _wanted_kind(request: GgufRequest, config: Config, path: str, shape: tuple[int, ...]) -> BlockType:
    """The type of a tensor that is written from floats."""
    # llama.cpp's converter keeps these in float32, too.
    if len(shape) == 1 or ".router." in path:
        return _KINDS["F32"]
    if request.kind is None:
        return _OF_DTYPE[config.dtype]
    kind = _KINDS[request.kind.upper()]
    # As there, rows that aren't whole blocks stay floats.
    return kind if shape[-1] % kind.items == 0 else _KINDS["F16"]


def _without_type(path: str, form: Format) -> InputError:
    return InputError(
        f"{path} has {form.mode} {form.bits} bits in groups of {form.group_size}, which no type of GGUF that is written"
        " holds exactly: choose one with --type, such as q8_0, or take --dequantize."
    )


def _same_type(source: Checkpoint, reader: LeafReader, path: str) -> BlockType | None:
    form, base = source.formats[path], path.removesuffix("weight")
    if f"{base}biases" not in source.sources:
        return None
    found: set[str | None] = set()
    for scales, biases in zip(*(_floats(reader, f"{base}{leaf}") for leaf in ("scales", "biases")), strict=True):
        found.add(same_type(form, scales, biases))
    # Every matrix with zeros alone is of each type.
    if found == {"Q4_0", "Q4_1"}:
        found = {"Q4_1"}
    (name,) = found if len(found) == 1 else {None}
    return None if name is None else _KINDS[name]


def _floats(reader: LeafReader, path: str) -> Iterator[mx.array]:
    for matrix in reader.matrices(path, "float32"):
        yield of_raw(matrix, mx.float32)


def _pieces(plan: GgufPlan, reader: LeafReader, path: str, kind: BlockType) -> Iterator[Raw]:
    """Yields a tensor's bytes: one matrix after the other."""
    source, form = plan.source, plan.source.formats.get(path)
    paths = [name for name in companions(path) if name in source.sources] if form else [path]
    for parts in zip(*(reader.matrices(name, "float32") for name in paths), strict=True):
        leaves = {
            name: of_raw(part, source.sources[name].leaf.stored_as("float32"))
            for name, part in zip(paths, parts, strict=True)
        }
        if plan.request.check and (bad := not_finite(leaves.items(), source.formats)):
            raise CheckpointError(
                f"{source.path} holds weights that are NaN or infinite ({listed(bad)}): repair it, or take another"
                " checkpoint."
            )
        if path in plan.same:
            yield blocks_of_leaves(kind, *leaves.values())
            continue
        matrix = leaves[path] if form is None else dequantize_matrix(list(leaves.values()), form, mx.float32)
        if kind.is_quantized:
            yield blocks_of_floats(np.array(matrix), kind)
        else:
            yield raw(matrix.astype(getattr(mx, kind.dtype)))


def _metadata(config: Config, path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Value]:
    counts = Counter(tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1)
    return {
        "general.architecture": "dbrx",
        "general.type": "model",
        "general.name": path.resolve().stem if path.is_file() else path.resolve().name,
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[counts.most_common(1)[0][0]],
        "dbrx.block_count": config.n_layers,
        "dbrx.context_length": config.max_seq_len,
        "dbrx.embedding_length": config.d_model,
        "dbrx.feed_forward_length": config.ffn.ffn_hidden_size,
        "dbrx.attention.head_count": config.n_heads,
        "dbrx.attention.head_count_kv": config.attn.kv_n_heads,
        "dbrx.attention.layer_norm_epsilon": 1e-5,
        "dbrx.attention.clamp_kqv": config.attn.clip_qkv or 0.0,
        "dbrx.rope.freq_base": config.attn.rope_theta,
        "dbrx.expert_count": config.ffn.moe_num_experts,
        "dbrx.expert_used_count": config.ffn.moe_top_k,
        "dbrx.vocab_size": config.vocab_size,
    }


def _vocabulary(source: Checkpoint, request: GgufRequest, config: Config) -> dict[str, Value]:
    if request.tokenizer is not None:
        return vocabulary_metadata(request.tokenizer, config.vocab_size)
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(tokenizer_files(source.path))
            files.read()
        except TokenizerError as error:
            warnings.warn(f"The new file has no tokenizer: {error}", stacklevel=3)
            # With this kind llama.cpp takes and gives ids.
            return {"tokenizer.ggml.model": "no_vocab"}
        return vocabulary_metadata(files.folder, config.vocab_size)


def _check_space(needed: int, file: Path) -> None:
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise InputError(
            f"{file.parent} has {free / 2**30:.1f} GiB free where {needed / 2**30:.1f} GiB are to be written: make"
            " room, or choose another place."
        )
