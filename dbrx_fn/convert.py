"""`python -m dbrx_fn.convert`: writes any checkpoint in mlx-lm's, Hugging Face's or our layout, quantized or not.

python -m dbrx_fn.convert databricks/dbrx-instruct dbrx-4bit --quantize 4
python -m dbrx_fn.convert databricks/dbrx-instruct dbrx.gguf --layout gguf --type q8_0
python -m dbrx_fn.convert databricks/dbrx-instruct for-peft --adapter-path run/adapters --layout peft
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dbrx_fn.checkpoints.adapter_files import convert_adapters
from dbrx_fn.checkpoints.adapter_names import TENSORS
from dbrx_fn.checkpoints.checkpoint import config_of, open_checkpoint
from dbrx_fn.checkpoints.conversion import Conversion, Request, convert, plan_conversion, require_free
from dbrx_fn.checkpoints.gguf_conversion import (
    GGUF_TYPES,
    GgufPlan,
    GgufRequest,
    plan_gguf,
    require_free_file,
    write_gguf,
)
from dbrx_fn.checkpoints.hub import checkpoint_path
from dbrx_fn.checkpoints.layouts import WRITTEN
from dbrx_fn.checkpoints.shards import SHARD_BYTES
from dbrx_fn.checkpoints.tokenizer_files import readable_tokenizer
from dbrx_fn.cli.adapter_option import OneFolder
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.quantize_options import FORMAT_HELP, add_quantize_options, chosen_quantization
from dbrx_fn.cli.terminal import byte_progress, print_message, print_result, size_text
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Dtype

GGUF = "gguf"
_NOT_OF_ADAPTERS = ("type", "dequantize", "dtype", "shard_size", "tokenizer", "check", "dry_run", "json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(_run, parser(), arguments, kept=_kept)


def _kept(chosen: argparse.Namespace) -> str:
    if chosen.layout == GGUF:
        return "nothing is left of the file"
    return "nothing is left" if chosen.layout in TENSORS else "the same command goes on where it was"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("convert"),
        description=f"Convert a DBRX checkpoint of any known layout. {FORMAT_HELP}",
    )
    add = options.add_argument
    add("source", help="folder, GGUF file, or Hugging Face repository as owner/name")
    add("folder", type=Path, help="new folder to write; with --layout gguf a new file, NAME.gguf")
    add("--revision", help="branch, tag or commit of the repository")
    add(
        "--layout",
        choices=(*WRITTEN, GGUF, *TENSORS),
        default="split",
        help="split is mlx-lm's layout, fused is Hugging Face's, stacked is this package's own, gguf is llama.cpp's;"
        " of adapters: mlx-lm or peft; each can be loaded here (default: %(default)s)",
    )
    add(
        "--adapter-path",
        action=OneFolder,
        type=Path,
        metavar="FOLDER",
        help="convert the source's adapters in this folder, and not the source, with --layout mlx-lm or peft",
    )
    add(
        "--type",
        choices=GGUF_TYPES,
        help="with --layout gguf, the type of all matrices but the routers (default: as stored, where that is exactly"
        " one of these)",
    )
    add_quantize_options(options)
    add("--dequantize", action="store_true", help="turn quantized matrices into floats first")
    add("--dtype", choices=get_args(Dtype), help="dtype of all floats (default: as stored)")
    add(
        "--shard-size",
        type=float,
        metavar="GB",
        help=f"the largest size of a file (default: {SHARD_BYTES / 10**9:g})",
    )
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="folder or repository with the tokenizer to copy (default: the source's)",
    )
    add("--check", action="store_true", help="refuse NaN and infinite weights")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add("--json", action="store_true", help="print JSON instead of a table")
    return options


def _run(chosen: argparse.Namespace) -> None:
    if chosen.adapter_path is not None or chosen.layout in TENSORS:
        _run_adapters(chosen)
        return
    if chosen.layout == GGUF:
        _run_gguf(chosen)
        return
    if chosen.type is not None:
        raise InputError("--type is for GGUF files: give --layout gguf too, or --quantize for the other layouts.")
    if chosen.folder.suffix == ".gguf":
        raise InputError(f"{chosen.folder} is the name of a GGUF file: give --layout gguf too, or name a folder.")
    if chosen.shard_size is not None and not 0 < chosen.shard_size < math.inf:
        raise InputError(f"--shard-size is {chosen.shard_size:g} where a number of GB above 0 is expected.")
    request = Request(
        layout=chosen.layout,
        quantization=chosen_quantization(chosen),
        dequantize=chosen.dequantize,
        dtype=chosen.dtype,
        shard_bytes=SHARD_BYTES if chosen.shard_size is None else int(chosen.shard_size * 10**9),
        check=chosen.check,
        tokenizer=None if chosen.tokenizer is None else str(readable_tokenizer(chosen.tokenizer)),
    )
    if not chosen.dry_run:
        # Before a checkpoint is downloaded.
        require_free(chosen.folder)
    conversion = plan_conversion(open_checkpoint(chosen.source, revision=chosen.revision), request)
    if not chosen.dry_run:

        def resumed(finished: int) -> None:
            print_message(f"going on after {finished} of {len(conversion.shards)} shards")

        with byte_progress("converting") as progress:
            convert(conversion, chosen.folder, progress=progress, resumed=resumed)
    text = _table(conversion) if chosen.dry_run else f"{chosen.folder}\n{_table(conversion)}"
    print_result(json.dumps(described(conversion), indent=2) if chosen.json else text)


def _run_gguf(chosen: argparse.Namespace) -> None:
    if chosen_quantization(chosen) is not None:
        raise InputError("--quantize and its kin make formats of MLX, which a GGUF file doesn't have: give --type.")
    if chosen.shard_size is not None:
        raise InputError("--shard-size is for the other layouts: a GGUF file is written in one piece.")
    if chosen.type is not None and chosen.dtype is not None:
        raise InputError("--type and --dtype both say what floats become: give one of them.")
    request = GgufRequest(
        kind=chosen.type,
        dequantize=chosen.dequantize,
        dtype=chosen.dtype,
        check=chosen.check,
        tokenizer=None if chosen.tokenizer is None else readable_tokenizer(chosen.tokenizer),
    )
    if not chosen.dry_run:
        require_free_file(chosen.folder)
    plan = plan_gguf(open_checkpoint(chosen.source, revision=chosen.revision), request)
    if not chosen.dry_run:
        with byte_progress("converting") as progress:
            write_gguf(plan, chosen.folder, progress=progress)
    text = _gguf_table(plan) if chosen.dry_run else f"{chosen.folder}\n{_gguf_table(plan)}"
    print_result(json.dumps(described_gguf(plan), indent=2) if chosen.json else text)


def _run_adapters(chosen: argparse.Namespace) -> None:
    if chosen.adapter_path is None:
        raise InputError(
            f"--layout {chosen.layout} is for adapters: give their folder with --adapter-path, and their model as the"
            " source."
        )
    if chosen.layout not in TENSORS:
        raise InputError(
            f"--adapter-path needs --layout {' or '.join(TENSORS)}, which write adapters without their model: python -m"
            " dbrx_fn.fuse merges them."
        )
    if chosen.folder.suffix == ".gguf":
        raise InputError(
            f"{chosen.folder} is the name of a GGUF file, and --layout {chosen.layout} writes a folder: name a folder."
        )
    given = [
        name for name in _NOT_OF_ADAPTERS if getattr(chosen, name) is not None and getattr(chosen, name) is not False
    ]
    if given or chosen_quantization(chosen) is not None:
        option = f"--{given[0].replace('_', '-')}" if given else "--quantize or its kin"
        raise InputError(f"--adapter-path can't be combined with {option}: adapters are written as they are.")
    config = config_of(checkpoint_path(chosen.source, weights=False, revision=chosen.revision))
    settings = convert_adapters(chosen.adapter_path, chosen.folder, config, chosen.layout)
    print_result(f"{chosen.folder}\nadapters of rank {settings.rank} and scale {settings.scale:g}, for {chosen.layout}")


def described_gguf(plan: GgufPlan) -> dict[str, Any]:
    """What a GGUF file holds, as an object for JSON. Sizes are in bytes."""
    return {
        "from": plan.source.layout,
        "layout": GGUF,
        "bytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "tensors": [
            {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.kind.name, "exact": path in plan.same}
            for path, tensor in plan.tensors.items()
        ],
    }


def _gguf_table(plan: GgufPlan) -> str:
    kinds = Counter(
        (re.sub(r"\.\d+\.", ".*.", tensor.name), " x ".join(map(str, tensor.shape)), tensor.kind.name)
        for tensor in plan.tensors.values()
    )
    return "\n".join(
        [
            *_aligned([(f"{count:,}", *kind) for kind, count in kinds.items()]),
            f"{plan.source.layout} to gguf: {size_text(plan.nbytes)}, {plan.bits_per_weight:.2f} bits a weight",
        ]
    )


def described(conversion: Conversion) -> dict[str, Any]:
    """What a conversion writes, as an object for JSON. Sizes are in bytes."""
    config, formats = conversion.config, conversion.formats
    tensors = [
        {
            "name": stored.name,
            "shape": list(stored.shape),
            "dtype": source.leaf.dtype or config.dtype,
            "file": next(shard.file for shard in conversion.shards if stored.name in shard.starts),
        }
        for source in conversion.table.values()
        for stored in source.stored
    ]
    return {
        "from": conversion.source.layout,
        "layout": conversion.request.layout,
        "dtype": config.dtype,
        "bytes": conversion.nbytes,
        "bits_per_weight": conversion.bits_per_weight,
        "memory": conversion.peak_memory,
        "formats": {path: f"{form.mode} {form.bits}:{form.group_size}" for path, form in formats.items()},
        "files": [{"file": shard.file, "bytes": shard.nbytes} for shard in conversion.shards],
        "tensors": tensors,
    }


def _table(conversion: Conversion) -> str:
    kinds: Counter[tuple[str, str, str]] = Counter()
    for path, source in conversion.table.items():
        form = conversion.formats.get(f"{path.rpartition('.')[0]}.weight")
        stored = source.stored[0]
        name = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", stored.name))
        shape = " x ".join(map(str, stored.shape))
        dtype = source.leaf.dtype or conversion.config.dtype
        words = f"{dtype}, {form.mode} {form.bits} bits, groups of {form.group_size}" if form else dtype
        kinds[name, shape, words] += len(source.stored)
    rows = [(f"{count:,}", name, shape, words) for (name, shape, words), count in kinds.items()]
    lines = _aligned(rows)
    files = len(conversion.shards)
    lines += [
        f"{conversion.source.layout} to {conversion.request.layout}: {size_text(conversion.nbytes)} in"
        f" {files} file{'s' if files > 1 else ''}, {conversion.bits_per_weight:.2f} bits a weight",
        f"converting needs about {size_text(conversion.peak_memory)} of memory",
    ]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Rows of number, name, shape and type as lines."""
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    return [f"{row[0]:>{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
