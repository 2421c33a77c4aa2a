"""`python -m dbrx_fn.evaluate perplexity`: how well checkpoints of one model predict a text, and how they differ.

It shows what a quantization costs: name the original first, then what was made of it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from dbrx_fn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dbrx_fn.checkpoints.hub import tokenizer_folder
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import byte_progress, print_message, print_result, size_text
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
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import backend, memory_size
from dbrx_fn.text.tokenizer import read_tokenizer

_SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Subject:
    """What is known of a checkpoint before anything is computed with it. Sizes in bytes.

    `name`: as it was given.
    `parameters`: how many numbers the model has, each counted once however it is stored.
    `stored_bytes`: of all its tensors, scales and biases of quantized matrices among them.
    `file_bytes`: of the files that hold them.
    `loaded_bytes`: of the parameters that are computed with here.
    `quantized_router`: whether any layer's router is quantized.
    """

    name: str
    path: Path
    parameters: int
    stored_bytes: int
    file_bytes: int
    loaded_bytes: int
    quantized_router: bool

    @property
    def bits_per_weight(self) -> float:
        """Bits that are stored for each parameter, on average over the whole model."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True)
class Row:
    """A checkpoint and what it made of the text; `comparison` with the first, which has none."""

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
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(prog=program("evaluate"), description="Measure how good checkpoints are.")
    perplexity = options.add_subparsers(metavar="perplexity", required=True).add_parser(
        "perplexity",
        description="Measure how well checkpoints of one model predict a text, and how far each is from the first: the"
        " KL divergence of what it predicts, how often it holds the same token for the likeliest, and how many experts"
        " its routers choose in common.",
        epilog="On a CPU quantized matrices are turned back into floats first: the numbers are those that they stand"
        " for, and long texts go through several times as fast. Elsewhere they are multiplied as they are.",
    )
    add = perplexity.add_argument
    add(
        "model",
        nargs="+",
        metavar="MODEL",
        help="a checkpoint's folder, a GGUF file, or a Hugging Face repository as owner/name",
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
        help="let texts spell control tokens, such as <|im_end|>; if not given they are plain text",
    )
    add("--sequence-length", type=int, default=512, help="tokens of a window; %(default)s")
    add("--batch-size", type=int, default=8, help="windows at a time; %(default)s")
    add(
        "--dtype",
        choices=get_args(Dtype),
        help="to compute in; if not given, float32 on a CPU, elsewhere what each checkpoint is stored in",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--picture", type=Path, metavar="FILE", help="new .png or .svg of KL divergence and perplexity over size")
    return options


def _perplexity(chosen: argparse.Namespace) -> None:
    for name in ("batch_size", "sequence_length"):
        if getattr(chosen, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(chosen, name)} where it must be at least 1.")
    if chosen.picture is not None:
        check_new_picture(chosen.picture)
        if len(chosen.model) < 2:
            raise InputError(
                "--picture shows how far models are from the first, and only one is given: name others too."
            )
    dtype: Dtype | None = chosen.dtype or ("float32" if backend() == "cpu" else None)
    subjects = _subjects(chosen.model, dtype)
    with tempfile.TemporaryDirectory(prefix="dbrx_fn-") as folder:
        text = _tokens(subjects[0], chosen, Path(folder) / "tokens")
        rows = _rows(subjects, text, dtype, chosen.batch_size, chosen.sequence_length)
        text_bytes = text.bytes
        del text
    if chosen.json:
        print_result(json.dumps(_as_json(rows, text_bytes, chosen.sequence_length), indent=2))
    else:
        print_result(_as_table(rows, text_bytes, chosen.sequence_length))
    # After what was measured, which no picture that can't be written shall take along.
    if chosen.picture is not None:
        _draw(rows, chosen.picture)


def _subjects(names: Sequence[str], dtype: Dtype | None) -> list[Subject]:
    """Looks at all checkpoints' files, so that what is wrong with the last is said before the first is read."""
    checkpoints = [open_checkpoint(name) for name in names]
    first = checkpoints[0]
    tokenizer = read_tokenizer(tokenizer_folder(first.path))
    check_vocabulary(tokenizer, first.config)
    subjects = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        check_same_model(first.config, checkpoint.config, names[0], name)
        if _fingerprint(checkpoint.path) not in (None, tokenizer.fingerprint()):
            raise InputError(
                f"{name} makes other tokens of a text than {names[0]}: compare checkpoints of one model, with its"
                " tokenizer."
            )
        params, config = load(checkpoint.path, dtype=dtype, lazy=True)
        subjects.append(
            Subject(
                name=name,
                path=checkpoint.path,
                parameters=param_count(config),
                stored_bytes=_stored_bytes(checkpoint),
                file_bytes=sum(file.stat().st_size for file in {tensor.file for tensor in checkpoint.tensors.values()}),
                loaded_bytes=_bytes(_as_computed(params, config)),
                quantized_router=any(".router." in path for path in checkpoint.formats),
            )
        )
    return subjects


def _stored_bytes(checkpoint: Checkpoint) -> int:
    """Of the tensors that the parameters are made of; some layouts hold others beside them."""
    names = {checkpoint.prefix + name for source in checkpoint.sources.values() for name in source.names}
    tensors = [checkpoint.tensors[name] for name in names]
    return sum(math.prod(tensor.shape) * getattr(mx, tensor.dtype).size for tensor in tensors)


def _fingerprint(path: Path) -> str | None:
    """The tokenizer's; a checkpoint without one has none to differ from."""
    try:
        return read_tokenizer(tokenizer_folder(path)).fingerprint()
    except TokenizerError:
        return None


def _tokens(first: Subject, chosen: argparse.Namespace, folder: Path) -> TokenFile:
    tokenizer = read_tokenizer(tokenizer_folder(first.path))
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
        for number, group in enumerate(groups, start=1):
            name = f"measuring, part {number} of {len(groups)}" if len(groups) > 1 else "measuring"
            models = [_load(subject, dtype) for subject in group]
            with _progress(name) as passed:
                evaluation, comparisons = compare(
                    loaded, models, text, batch_size=batch_size, sequence_length=sequence_length, progress=passed
                )
            # Before the next ones are loaded.
            del models
            if not rows:
                rows.append(Row(first, evaluation, None))
            rows += [Row(subject, found.evaluation, found) for subject, found in zip(group, comparisons, strict=True)]
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"The text can't be computed ({shorten(str(error), 200, placeholder='…')}), most likely for want of memory:"
            " take a smaller --batch-size or --sequence-length."
        ) from None
    for row in rows:
        if not math.isfinite(row.evaluation.nats_per_token):
            raise InputError(
                f"{row.subject.name} predicts with numbers that aren't finite: try --dtype float32, and if that"
                " doesn't help, its weights are damaged."
            )
    return rows


def _groups(first: Subject, others: Sequence[Subject]) -> list[list[Subject]]:
    """Which models are in memory at a time beside the first: one, or more while all of them fill at most half of it.

    The first runs over the text once for each group, so many small models take half of the time together.
    """
    largest = max((other.loaded_bytes for other in others), default=0)
    if first.loaded_bytes + largest > memory_size():
        raise InputError(
            f"{first.name} and the largest of the others take {size_text(first.loaded_bytes + largest)} and this"
            f" machine has {size_text(memory_size())}: take a larger machine."
        )
    groups: list[list[Subject]] = [[]]
    for other in others:
        together = first.loaded_bytes + other.loaded_bytes + sum(subject.loaded_bytes for subject in groups[-1])
        if groups[-1] and 2 * together > memory_size():
            groups.append([])
        groups[-1].append(other)
    return groups


def _load(subject: Subject, dtype: Dtype | None) -> Model:
    with byte_progress(f"reading {subject.name}") as progress:
        params, config = load(subject.path, dtype=dtype, progress=progress)
    params = _as_computed(params, config)
    mx.eval(params)
    return Model(params, config)


def _as_computed(params: Params, config: Config) -> Params:
    # The CPU's quantized products take minutes for what dense ones do in seconds.
    return dequantize(params, config) if backend() == "cpu" else params


def _bytes(params: Params) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(params))
    return sum(array.nbytes for array in arrays.values())


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows passes of batches through models: a bar on a terminal, elsewhere a line each half minute."""
    with tqdm(desc=name, unit="batch", disable=None, leave=False, smoothing=0.05) as bar:
        start = said = time.perf_counter()

        def passed(done: int, total: int) -> None:
            nonlocal said
            bar.total = total
            bar.update(done - bar.n)
            now = time.perf_counter()
            if bar.disable and now - said >= _SECONDS_BETWEEN_LINES:
                said = now
                left = tqdm.format_interval((now - start) * (total - done) / done)
                print_message(f"{name}: {done:,} of {total:,} batches, {left} left")

        yield passed


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
    """Rows with their columns under each other, the column of names to the left."""
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
