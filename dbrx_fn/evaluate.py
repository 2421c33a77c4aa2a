"""`python -m dbrx_fn.evaluate perplexity`: how well checkpoints of one model predict a text, and how they differ.

It shows what quantization costs: name the original first, then its quantized forms.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.cli.adapter_option import add_adapter_option
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import byte_progress, pass_progress, print_result, size_text
from dbrx_fn.data.corpus import read_documents
from dbrx_fn.data.token_file import TokenFile, check_vocabulary, write_token_file
from dbrx_fn.drawing.figure import check_new_picture, write_picture
from dbrx_fn.errors import InputError, TokenizerError
from dbrx_fn.evaluation.comparison import Comparison, Model, check_same_model, compare
from dbrx_fn.evaluation.perplexity import Evaluation, check_targets
from dbrx_fn.evaluation.picture import QuantizedModel, draw_quantizations, short_names
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.params import param_count
from dbrx_fn.model.quantization import dequantize
from dbrx_fn.model.shard import own_shard
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import backend, memory_size
from dbrx_fn.runtime.group import group


@dataclass(frozen=True)
class Subject:
    """A checkpoint's properties before any computation. Sizes are in bytes.

    `name`: as the user gave it.
    `parameters`: the model's number of parameters, independent of how they are stored.
    `stored_bytes`: size of all its tensors, including scales and biases of quantized matrices.
    `file_bytes`: size of the files that hold the tensors.
    `loaded_bytes`: size of the parameters in this process's memory.
    `adapters`: the folder of adapters beside it, if any.
    `quantized_router`: whether any layer's router is quantized.
    """

    name: str
    path: Path
    adapters: Path | None
    parameters: int
    stored_bytes: int
    file_bytes: int
    loaded_bytes: int
    quantized_router: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, averaged over the model."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True)
class Row:
    """A checkpoint's results on the text. `comparison` is with the first checkpoint; the first has none."""

    subject: Subject
    evaluation: Evaluation
    comparison: Comparison | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        _perplexity,
        parser(),
        arguments,
        smaller="take a smaller --batch-size or --sequence-length",
        together=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(prog=program("evaluate"), description="Measure how good checkpoints are.")
    perplexity = options.add_subparsers(metavar="perplexity", required=True).add_parser(
        "perplexity",
        description="Measure how well checkpoints of one model predict a text, and how far each is from the first: the"
        " KL divergence of its predictions, how often its most likely token is the same, and how many of its routers'"
        " choices are the same.",
        epilog="On a CPU, quantized matrices are turned back into floats first, which makes long texts several times as"
        " fast and gives the same numbers. On a GPU they are multiplied as stored.",
    )
    add_adapter_option(perplexity, "the first MODEL with them becomes one more row")
    add = perplexity.add_argument
    add(
        "model",
        nargs="+",
        metavar="MODEL",
        help="checkpoint: folder, GGUF file, or Hugging Face repository as owner/name",
    )
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="files of text (.txt, .md), of rows (.jsonl, .json: text, prompt and completion, or messages), or folders",
    )
    add(
        "--control-tokens",
        action="store_true",
        help="encode control tokens in texts, such as <|im_end|> (default: they are plain text)",
    )
    add("--sequence-length", type=int, default=512, help="tokens per window (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="windows computed at once (default: %(default)s)")
    add(
        "--dtype",
        choices=get_args(Dtype),
        help="dtype to compute in (default: float32 on a CPU, else the dtype of each checkpoint)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add(
        "--picture", type=Path, metavar="FILE", help="draw KL divergence and perplexity over size to a new .png or .svg"
    )
    return options


def _perplexity(chosen: argparse.Namespace) -> None:
    for name in ("batch_size", "sequence_length"):
        if getattr(chosen, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(chosen, name)} where it must be at least 1.")
    if chosen.picture is not None:
        check_new_picture(chosen.picture)
        if len(chosen.model) < 2 and chosen.adapter_path is None:
            raise InputError(
                "--picture shows how far models are from the first, and only one is given: name at least two."
            )
    dtype: Dtype | None = chosen.dtype or ("float32" if backend() == "cpu" else None)
    subjects = _subjects(chosen.model, chosen.adapter_path, dtype)
    with tempfile.TemporaryDirectory(prefix="dbrx_fn-") as folder:
        text = _tokens(subjects[0], chosen, Path(folder) / "tokens")
        rows = _rows(subjects, text, dtype, chosen.batch_size, chosen.sequence_length)
        text_bytes = text.bytes
        del text
    if chosen.json:
        print_result(json.dumps(_as_json(rows, text_bytes, chosen.sequence_length), indent=2))
    else:
        print_result(_as_table(rows, text_bytes, chosen.sequence_length))
    # The picture comes after the results, which must not be lost if it can't be written.
    if chosen.picture is not None:
        _draw(rows, chosen.picture)


def _subjects(names: Sequence[str], adapters: Path | None, dtype: Dtype | None) -> list[Subject]:
    """Checks all checkpoints' files first, so an error in the last one is reported before the first is loaded."""
    models: list[tuple[str, Checkpoint, Path | None]] = [(name, open_checkpoint(name), None) for name in names]
    first = models[0][1]
    tokenizer = load_tokenizer(first.path)
    check_vocabulary(tokenizer, first.config)
    if adapters is not None:
        models.append((f"{names[0]} with {adapters}", first, adapters))
    subjects = []
    for name, checkpoint, beside in models:
        check_same_model(first.config, checkpoint.config, names[0], name)
        if _fingerprint(checkpoint.path) not in (None, tokenizer.fingerprint()):
            raise InputError(
                f"{name} has another tokenizer than {names[0]}: compare checkpoints of one model, with its tokenizer."
            )
        params, config = load(checkpoint.path, dtype=dtype, lazy=True, adapter_path=beside)
        subjects.append(
            Subject(
                name=name,
                path=checkpoint.path,
                adapters=beside,
                parameters=param_count(config),
                stored_bytes=_stored_bytes(checkpoint),
                file_bytes=sum(file.stat().st_size for file in {tensor.file for tensor in checkpoint.tensors.values()}),
                loaded_bytes=_bytes(_as_computed(params, config)) // group().size,
                quantized_router=any(".router." in path for path in checkpoint.formats),
            )
        )
    return subjects


def _stored_bytes(checkpoint: Checkpoint) -> int:
    """The size of the tensors that make up the parameters. Some layouts hold other tensors too."""
    names = {checkpoint.prefix + name for source in checkpoint.sources.values() for name in source.names}
    tensors = [checkpoint.tensors[name] for name in names]
    return sum(math.prod(tensor.shape) * getattr(mx, tensor.dtype).size for tensor in tensors)


def _fingerprint(path: Path) -> str | None:
    """The tokenizer's fingerprint, or `None` for a checkpoint without a tokenizer."""
    try:
        return load_tokenizer(path).fingerprint()
    except TokenizerError:
        return None


def _tokens(first: Subject, chosen: argparse.Namespace, folder: Path) -> TokenFile:
    tokenizer = load_tokenizer(first.path)
    documents = read_documents(chosen.data, tokenizer.chat_format, control_tokens=chosen.control_tokens)
    with byte_progress("tokenizing") as progress:
        text = write_token_file(folder, documents, tokenizer, progress)
    check_targets(text)
    return text


def _rows(
    subjects: Sequence[Subject], text: TokenFile, dtype: Dtype | None, batch_size: int, sequence_length: int
) -> list[Row]:
    first, *others = subjects
    groups = _groups(first, others)
    rows: list[Row] = []
    try:
        loaded = _load(first, dtype)
        for number, members in enumerate(groups, start=1):
            name = f"measuring, part {number} of {len(groups)}" if len(groups) > 1 else "measuring"
            models = [_load(subject, dtype) for subject in members]
            with pass_progress(name) as passed:
                evaluation, comparisons = compare(
                    loaded, models, text, batch_size=batch_size, sequence_length=sequence_length, progress=passed
                )
            # Frees the models before the next ones are loaded.
            del models
            if not rows:
                rows.append(Row(first, evaluation, None))
            rows += [Row(subject, found.evaluation, found) for subject, found in zip(members, comparisons, strict=True)]
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"The computation failed ({shorten(str(error), 200, placeholder='…')}), most likely for lack of memory:"
            " take a smaller --batch-size or --sequence-length."
        ) from None
    for row in rows:
        if not math.isfinite(row.evaluation.nats_per_token):
            raise InputError(
                f"The predictions of {row.subject.name} aren't finite: try --dtype float32, and if that doesn't help,"
                " its weights are damaged."
            )
    return rows


def _groups(first: Subject, others: Sequence[Subject]) -> list[list[Subject]]:
    """Groups of models that are in memory at once, beside the first: single ones, or several if all fit half of memory.

    The first model runs over the text once for each group, so large groups save time.
    """
    largest = max((other.loaded_bytes for other in others), default=0)
    memory = group().share(memory_size())
    if first.loaded_bytes + largest > memory:
        raise InputError(
            f"{first.name} and the largest of the others need {size_text(first.loaded_bytes + largest)}, and this"
            f" machine has {size_text(memory)}: take a larger machine."
        )
    groups: list[list[Subject]] = [[]]
    for other in others:
        together = first.loaded_bytes + other.loaded_bytes + sum(subject.loaded_bytes for subject in groups[-1])
        if groups[-1] and 2 * together > memory:
            groups.append([])
        groups[-1].append(other)
    return groups


def _load(subject: Subject, dtype: Dtype | None) -> Model:
    with byte_progress(f"reading {subject.name}") as progress:
        params, config = load(
            subject.path, dtype=dtype, progress=progress, shard=own_shard(), adapter_path=subject.adapters
        )
    params = _as_computed(params, config)
    mx.eval(params)
    return Model(params, config)


def _as_computed(params: Params, config: Config) -> Params:
    # On a CPU quantized products are many times slower than dense ones.
    return dequantize(params, config) if backend() == "cpu" else params


def _bytes(params: Params) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(params))
    return sum(array.nbytes for array in arrays.values())


def _draw(rows: Sequence[Row], file: Path) -> None:
    labels = short_names([row.subject.name for row in rows])
    models = [
        QuantizedModel(
            label=label,
            bits_per_weight=row.subject.bits_per_weight,
            kl_divergence=row.comparison.kl_divergence,
            perplexity=row.evaluation.perplexity,
            quantized_router=row.subject.quantized_router,
        )
        for label, row in zip(labels, rows, strict=True)
        if row.comparison is not None
    ]
    write_picture(draw_quantizations(models, labels[0], rows[0].evaluation.perplexity), file)


def _as_json(rows: Sequence[Row], text_bytes: int, sequence_length: int) -> dict[str, Any]:
    return {
        "text_bytes": text_bytes,
        "tokens": rows[0].evaluation.tokens,
        "sequence_length": sequence_length,
        "processes": group().size,
        "models": [_fields(row) for row in rows],
    }


def _fields(row: Row) -> dict[str, Any]:
    subject, evaluation, comparison = row.subject, row.evaluation, row.comparison
    agreement = None if comparison is None else comparison.router_agreement
    return {
        "model": subject.name,
        "parameters": subject.parameters,
        "bits_per_weight": subject.bits_per_weight,
        "file_bytes": subject.file_bytes,
        "quantized_router": subject.quantized_router,
        "nats_per_token": evaluation.nats_per_token,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "kl_divergence": None if comparison is None else comparison.kl_divergence,
        "top1_agreement": None if comparison is None else comparison.top1_agreement,
        "router_agreement": None if agreement is None else float(agreement.mean()),
        "router_agreement_by_layer": None if agreement is None else agreement.tolist(),
    }


def _as_table(rows: Sequence[Row], text_bytes: int, sequence_length: int) -> str:
    tokens = rows[0].evaluation.tokens
    lines = [f"{text_bytes:,} bytes of text, {tokens:,} tokens to predict, windows of {sequence_length:,}", ""]
    names = ["", "model", "bits/weight", "size", "nats/token", "perplexity", "bits/byte"]
    table = [[*names, "KL to 1", "top-1", "routers", "worst layer"][: None if len(rows) > 1 else len(names)]]
    for number, row in enumerate(rows, start=1):
        subject, evaluation, comparison = row.subject, row.evaluation, row.comparison
        cells = [
            str(number),
            subject.name,
            f"{subject.bits_per_weight:.2f}",
            size_text(subject.file_bytes),
            f"{evaluation.nats_per_token:.4f}",
            f"{evaluation.perplexity:,.3f}",
            f"{evaluation.bits_per_byte:.4f}",
        ]
        if comparison is not None:
            routers = comparison.router_agreement
            shares = (comparison.top1_agreement, routers.mean(), routers.min())
            cells += [f"{comparison.kl_divergence:.6f}", *(f"{100 * share:.2f}%" for share in shares)]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    lines += _aligned(table)
    compared = {number: row.comparison for number, row in enumerate(rows, start=1) if row.comparison is not None}
    if compared:
        layers = [["layer", *map(str, compared)]]
        agreement = np.array([comparison.router_agreement for comparison in compared.values()])
        layers += [[str(layer), *(f"{100 * share:.2f}%" for share in row)] for layer, row in enumerate(agreement.T)]
        lines += ["", "experts that the routers choose in common with model 1, by layer and model", *_aligned(layers)]
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows with aligned columns. The column of names is left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [column[0] == "model" for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if is_name else cell.rjust(width)
            for cell, width, is_name in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in table
    ]


if __name__ == "__main__":
    sys.exit(main())
