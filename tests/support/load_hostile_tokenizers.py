"""Reads many hostile tokenizer folders, one after the other, and prints what came of each as a line of JSON.

    python -m tests.support.load_hostile_tokenizers COUNT FOLDER [WAY …]

It is a process of its own, as `tests.support.load_damaged` is.
"""

import faulthandler
import itertools
import json
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dbrx_fn.errors import DbrxError
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support import hostile_tokenizers
from tests.support.load_damaged import SECONDS, forget_peak, limit_memory, peak_memory

MOST_MEMORY = 2**31
TEXTS = [
    *(
        "To be, or not <|endoftext|> <|im_start|>user\n",
        "",
        "a",
        "ab a  b ",
        "日本 é e\u0301 \u0130 😀\x00\n\r\n",
        "<|x|>",
    ),
    *("a" * 4_000, " " * 4_000, "a " * 2_000, "Ab1! " * 800, "\n" * 2_000, "é" * 2_000, "a" * 200 + "b" * 200 + "!"),
]


def check(tokenizer: Tokenizer) -> None:
    """Encodes and decodes, and makes sure that what comes out can be."""
    control = set(tokenizer.control_tokens.values())
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert not control & set(tokenizer.encode(text, add_special_tokens=False, literal=[(0, len(text))]))
        tokenizer.decode(tokens)


def same_as_library(tokenizer: Tokenizer, file: Path) -> bool:
    """Whether the library, given the file alone, makes the same tokens."""
    library = tokenizers.Tokenizer.from_file(str(file))
    library.no_truncation()
    library.no_padding()
    return all(tokenizer.encode(text) == library.encode(text).ids for text in TEXTS)


def read_one(way: str, number: int, folder: Path) -> dict[str, Any]:
    chooser = random.Random(f"{way} {number}")
    getattr(hostile_tokenizers, way)(chooser, folder, hostile_tokenizers.sound())
    forget_peak()
    memory, start = peak_memory(), time.process_time()
    result = {"outcome": "read", "text": ""}
    try:
        tokenizer = read_tokenizer(folder)
        check(tokenizer)
    except DbrxError as error:
        result = {"outcome": "refused", "text": str(error)}
    # Whatever it is, and PanicException of Rust's libraries is no Exception.
    except BaseException:
        result = {"outcome": "traceback", "text": traceback.format_exc()}
    grown, seconds = peak_memory() - memory, time.process_time() - start
    if result["outcome"] == "read" and way in hostile_tokenizers.ONE_FILE:
        result["outcome"] = "read" if same_as_library(tokenizer, folder / "tokenizer.json") else "other tokens"
    return result | {"grown": grown, "seconds": seconds}


def main(count: int, root: Path, ways: Sequence[str]) -> None:
    """Makes and reads folders of each way, each in a place that is removed again."""
    warnings.simplefilter("ignore")
    limit_memory(MOST_MEMORY)
    for way, number in itertools.product(ways, range(count)):
        folder = root / "case"
        folder.mkdir()
        about = {"way": way, "number": number}
        print(json.dumps(about), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        result = read_one(way, number, folder)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(about | result), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or [way.__name__ for way in hostile_tokenizers.WAYS])
