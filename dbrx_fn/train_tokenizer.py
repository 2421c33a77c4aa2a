"""`python -m dbrx_fn.train_tokenizer`: trains a tokenizer of DBRX's kind on texts, with a vocabulary of any size.

`dbrx_fn.text.bpe` describes this kind of tokenizer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import print_result
from dbrx_fn.data.corpus import read_documents
from dbrx_fn.errors import InputError
from dbrx_fn.files.file_lock import folder_claimed
from dbrx_fn.text.bpe import SMALLEST_VOCABULARY, save_tokenizer, train_bpe
from dbrx_fn.text.chat import ChatFormat


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(_run, parser(), arguments)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("train_tokenizer"),
        description="Train a byte-level BPE tokenizer of DBRX's kind on text files, JSONL files or folders of them.",
    )
    options.add_argument("--data", nargs="+", required=True, metavar="PATH", help="files or folders to train on")
    options.add_argument(
        "--vocab-size", type=int, required=True, help=f"number of tokens, at least {SMALLEST_VOCABULARY}"
    )
    options.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer's files into")
    return options


def _run(chosen: argparse.Namespace) -> None:
    out = chosen.out.resolve()
    with folder_claimed(out, f"{chosen.out} is being written by another process: wait until it ends."):
        if os.path.lexists(out / "tokenizer.json"):
            raise InputError(f"{chosen.out} holds a tokenizer already: name another folder.")
        # A tokenizer is trained on characters, so control tokens need no care.
        documents = read_documents(chosen.data, ChatFormat(default_system=False), control_tokens=True)
        tokenizer = train_bpe((text for document in documents for text, _ in document.spans), chosen.vocab_size)
        save_tokenizer(tokenizer, out)
    print_result(f"{chosen.out}: a tokenizer of {chosen.vocab_size} tokens from {len(documents)} documents")


if __name__ == "__main__":
    sys.exit(main())
