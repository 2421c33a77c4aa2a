"""Loads many damaged checkpoints, one after the other, and prints what came of each as a line of JSON.

    python -m tests.support.load_damaged WAY COUNT FOLDER [convert]

With `convert`, each is converted first, and what that made is loaded.

It is a process of its own, so that one that crashes, hangs or takes all memory tells which case it was: before each it
prints the case's number, and ends itself when a case takes too long.
"""

import contextlib
import faulthandler
import io
import json
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.finite import not_finite
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.convert import main as convert
from dbrx_fn.errors import DbrxError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.quantization import tree_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.text.tokenizer import Tokenizer
from tests.support.damage import BASES, WAYS, Base, Damage, write_base

SECONDS = 20
TEXT = "To be, or not <|endoftext|>"
_ADDRESS_SPACE = 2**30
_LONGEST_FILE = 2**27
_STATUS = Path("/proc/self/status")


class Loaded:
    """What a checkpoint gives, in forms that can be compared."""

    def __init__(self, folder: Path) -> None:
        params, self.config = load(folder)
        leaves: dict[str, mx.array] = dict(tree_flatten(params))
        self.leaves = {path: _bits(leaf) for path, leaf in leaves.items()}
        self.logits = _bits(_logits(params, self.config))
        self.spoilt = tuple(sorted(not_finite(leaves.items(), tree_formats(params, self.config))))

    def outcome(self, whole: "Loaded") -> str:
        if self.leaves != whole.leaves:
            return "other weights"
        if self.config != whole.config:
            return "other config"
        return "same" if self.logits == whole.logits else "other logits"


def _logits(params: Any, config: Config) -> mx.array:
    return forward(params, mx.array([[3, 1, 4, 1, 5]]), init_cache(config, 1, 0))[0]


def _bits(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, np.array(array.view(mx.uint8)).tobytes()


def _text(tokenizer: Tokenizer) -> tuple[object, ...]:
    tokens = tokenizer.encode(TEXT)
    chat = tokenizer.chat_format.template, tokenizer.chat_format.special_tokens
    return tokens, tokenizer.decode(tokens), tokenizer.stop_tokens, tokenizer.end_of_text, chat


def _snapshot(root: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.lstat() for path in root.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def peak_memory() -> int:
    """Bytes of the process's largest resident set since `forget_peak`; 0 where the system doesn't say."""
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def limit_memory(more: int = _ADDRESS_SPACE) -> None:
    """No more address space than the process has and a bit, so that nothing can take the machine's memory."""
    if _STATUS.exists():
        size = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _convert(folder: Path, *options: str) -> Path:
    """What the command makes of a checkpoint; its error as an exception."""
    made = folder.parent / "made"
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(io.StringIO()):
        status = convert([str(folder), str(made), *options])
    if status:
        assert status == 2
        assert not made.exists()
        raise DbrxError(printed.getvalue().strip().splitlines()[-1].removeprefix("error: "))
    return made


@contextlib.contextmanager
def limited_files() -> Iterator[None]:
    """Nothing can fill the disk meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LONGEST_FILE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@limited_files()
def _load_one(
    way: str, root: Path, damage: Damage, whole: Loaded, tokenizer: tuple[object, ...], *, converting: bool
) -> dict[str, Any]:
    folder = root / "dbrx"
    before = _snapshot(root)
    forget_peak()
    memory = peak_memory()
    result: dict[str, Any] = {"text": "", "spoilt": []}
    try:
        if converting:
            folder = _convert(folder, *(["--check"] if damage.spoilt else []))
        if way == "wrong_tokenizers":
            result["outcome"] = "same" if _text(load_tokenizer(folder)) == tokenizer else "other tokenizer"
        else:
            loaded = Loaded(folder)
            result["outcome"] = loaded.outcome(whole)
            result["spoilt"] = loaded.spoilt
    except DbrxError as error:
        result |= {"outcome": "refused", "text": str(error)}
    # Whatever it is, and PanicException of Rust's libraries is no Exception.
    except BaseException:
        result |= {"outcome": "traceback", "text": traceback.format_exc()}
    result["grown"] = peak_memory() - memory
    made = (str(root / "made"), str(root / ".made.converting"))
    result["wrote"] = sorted(name for name, _ in _snapshot(root).items() ^ before.items() if not name.startswith(made))
    return result


def main(way: str, count: int, root: Path, *, converting: bool) -> None:
    """Damages and loads checkpoints, of each base in turn, in a folder that is made for each and removed again."""
    warnings.simplefilter("ignore")
    originals: dict[Base, Path] = {base: root / base for base in BASES}
    for base, original in originals.items():
        write_base(original, base)
    whole = {base: Loaded(original) for base, original in originals.items()}
    tokenizer = _text(load_tokenizer(originals["fused"]))
    limit_memory()
    for number in range(count):
        base = BASES[number % len(BASES)]
        case = root / "case"
        shutil.copytree(originals[base], case / "dbrx")
        rng = np.random.default_rng([sum(way.encode()), number])
        damage = WAYS[way](case / "dbrx", rng)
        if converting and damage.spoilt:
            damage = replace(damage, culprits=damage.spoilt, outcomes=("refused",))
        about = {"number": number, "base": base, "what": damage.what}
        print(json.dumps(about), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        result = _load_one(way, case, damage, whole[base], tokenizer, converting=converting)
        faulthandler.cancel_dump_traceback_later()
        expected = {"culprits": damage.culprits, "allowed": damage.outcomes, "expected_spoilt": damage.spoilt}
        print(json.dumps(about | expected | result), flush=True)
        shutil.rmtree(case)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), converting="convert" in sys.argv[4:])
