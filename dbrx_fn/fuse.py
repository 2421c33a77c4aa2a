"""`python -m dbrx_fn.fuse`: merges adapters into the weights of their model, one matrix at a time."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dbrx_fn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion, require_free
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.layouts import WRITTEN, Written
from dbrx_fn.checkpoints.tokenizer_files import readable_tokenizer
from dbrx_fn.cli.adapter_option import OneFolder
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import byte_progress, print_message, print_result, size_text
from dbrx_fn.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(_run, parser(), arguments, kept=lambda _: "the same command goes on where it was")


def parser() -> argparse.ArgumentParser:
    """The command's options. Those that mlx-lm has too have its names."""
    options = Parser(
        prog=program("fuse"),
        description="Merge adapters into the weights of their model. Quantized matrices are quantized again, in their"
        " format. `evaluate perplexity MODEL FUSED --data TEXT` measures the quality before and after.",
    )
    add = options.add_argument
    add(
        "--model",
        default=str(SMALL),
        help="a checkpoint's folder, a GGUF file, or a Hugging Face repository as"
        " owner/name (default: the small model of this package)",
    )
    add(
        "--adapter-path",
        action=OneFolder,
        type=Path,
        required=True,
        metavar="FOLDER",
        help="adapters to merge, written by train --lora, mlx-lm or PEFT",
    )
    add("--out", "--save-path", dest="out", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    add("--layout", choices=WRITTEN, help="layout of the tensors (default: the model's, or split)")
    add("--dequantize", action="store_true", help="turn quantized matrices into floats")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="folder or repository with the tokenizer to copy, such as a run's, which has the chat template that it was"
        " trained with (default: the model's)",
    )
    return options


def _run(chosen: argparse.Namespace) -> None:
    if chosen.out.suffix == ".gguf":
        raise InputError(
            f"{chosen.out} is the name of a GGUF file, and fuse writes a folder: name a folder for --out, and then"
            f" `python -m dbrx_fn.convert FOLDER {chosen.out} --layout gguf` makes the file."
        )
    require_free(chosen.out)
    source = open_checkpoint(chosen.model)
    request = Request(
        layout=chosen.layout or _layout(source, chosen.dequantize),
        dequantize=chosen.dequantize,
        tokenizer=None if chosen.tokenizer is None else str(readable_tokenizer(chosen.tokenizer)),
        adapters=str(chosen.adapter_path.resolve()),
    )
    conversion = plan_conversion(source, request)

    def resumed(finished: int) -> None:
        print_message(f"going on after {finished} of {len(conversion.shards)} shards")

    with byte_progress("merging") as progress:
        convert(conversion, chosen.out, progress=progress, resumed=resumed)
    merged = sum(path.endswith(".lora_a") for path in conversion.adapters)
    print_result(
        f"{chosen.out}\nadapters of {merged} linears merged: {size_text(conversion.nbytes)},"
        f" {conversion.bits_per_weight:.2f} bits a weight, {request.layout} layout"
    )


def _layout(source: Checkpoint, dequantize: bool) -> Written:
    """The model's own layout, if it can be written and hold the result."""
    for layout in WRITTEN:
        if layout == source.layout and (layout != "fused" or dequantize or not source.formats):
            return layout
    return "split"


if __name__ == "__main__":
    sys.exit(main())
