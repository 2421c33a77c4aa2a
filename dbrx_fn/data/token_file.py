"""Token files: documents are tokenized once, into files that training maps into memory."""

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.data.corpus import Document
from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import new_folder
from dbrx_fn.files.checksums import SEAL, disagreement, file_sum, read_note, sealed
from dbrx_fn.files.json_file import shown
from dbrx_fn.files.regular_file import open_regular
from dbrx_fn.model.config import Config
from dbrx_fn.text.literal_text import clipped
from dbrx_fn.text.text_pieces import text_pieces
from dbrx_fn.text.tokenizer import Tokenizer

_FORM = 3
"""The version of the files' content. Files of an older version are made again."""

_OLD_KINDS = {"tokens": int, "target_count": int, "bytes": int, "documents": int, "masked": bool, "fingerprint": str}
_KINDS = {**_OLD_KINDS, "files": dict, SEAL: str}
"""The keys of `meta.json`. Earlier versions have no checksums."""

# The header of a one-dimensional array, as NumPy writes it. It isn't read by NumPy, which evaluates its text.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][ub]\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)
_LONGEST_HEADER = 256
_DTYPES = {b"<u2": "uint16", b"<u4": "uint32", b"|b1": "bool"}
_AT_ONCE = 2**24

Progress = Callable[[int, int], None]
"""Called with bytes of text done so far and bytes in all."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of documents, in files of a folder.

    An end-of-text token comes before each document, so its first token is predicted from something. Another one ends
    the last document.

    Attributes:
        tokens: `[tokens]`, uint16 or uint32.
        targets: `[tokens]`, bool, true for tokens to predict; `None` if all are. An end-of-text token is a target if
            the part before it is. The first token never is.
        target_count: number of tokens to predict.
        bytes: UTF-8 bytes of the parts to predict. A loss in bits per byte is the sum of the targets' losses in bits,
            divided by this.
        documents: number of documents.
        fingerprint: SHA-256 of the documents and the tokenizer.
    """

    tokens: np.memmap[Any, np.dtype[Any]]
    targets: np.memmap[Any, np.dtype[np.bool_]] | None
    target_count: int
    bytes: int
    documents: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def highest(self) -> int:
        """The highest token id. A model needs a larger vocabulary size."""
        return max(int(part.max()) for part in _parts(self.tokens))


def write_token_file(
    folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenFile:
    """Writes the tokens of documents into a folder, or reuses the files there.

    Files of the same documents and tokenizer are reused, others are replaced. The text is tokenized piece by piece, so
    only the documents themselves need memory.

    Args:
        folder: the folder of `tokens.npy`, `meta.json` and, if some parts are only read, `targets.npy`. It appears when
            it is complete, and replaces one with only these files.
        documents: at least one, from `dbrx_fn.data.corpus.read_documents`.
        tokenizer: the model's.
        progress: called as the text is tokenized.

    Raises:
        InputError: if there are no documents, if the tokenizer has no end-of-text token, or if the folder holds other
            files or can't be written.
    """
    if not documents:
        raise InputError("There are no documents to make tokens of; give at least one.")
    if tokenizer.end_of_text is None:
        raise InputError(
            "The tokenizer has no <|endoftext|>, and its tokenizer_config.json names no 'eos_token' to put between "
            "documents: add 'eos_token' there."
        )
    fingerprint = _fingerprint(documents, tokenizer)
    try:
        found = read_token_file(folder)
        if found.fingerprint == fingerprint:
            return found
    except InputError:
        # The rest of this function replaces missing and damaged files.
        pass

    with new_folder(folder, replacing=("tokens.npy", "targets.npy", "meta.json")) as beside:
        meta = _write(beside, documents, tokenizer, tokenizer.end_of_text, progress)
        files = {file.name: file_sum(file) for file in sorted(beside.iterdir())}
        note = sealed({**meta, "fingerprint": fingerprint, "files": files})
        (beside / "meta.json").write_text(json.dumps(note, indent=2) + "\n")
    return read_token_file(folder)


def read_token_file(folder: Path) -> TokenFile:
    """Maps the files of `write_token_file` into memory, after a comparison with their checksums.

    Files of earlier versions have no checksums, which gives a warning.

    Raises:
        InputError: if files are missing, damaged or cut short, or don't belong together.
    """
    meta = _read_meta(folder / "meta.json")
    length, target_count = meta["tokens"], meta["target_count"]
    tokens = _map(folder / "tokens.npy", meta, ("uint16", "uint32"))
    targets = _map(folder / "targets.npy", meta, ("bool",)) if meta["masked"] else None
    counted = length - 1
    if targets is not None:
        # A byte other than 0 and 1 would be true in a mask, but count more than 1 in a sum.
        values = targets.view(np.uint8)
        if any(part.max() > 1 for part in _parts(values)):
            raise _damaged(folder / "targets.npy", "it holds other bytes than 0 and 1")
        counted = sum(int(part.sum(dtype=np.int64)) for part in _parts(values))
    if counted != target_count:
        raise _damaged(folder / "meta.json", f"it counts {shown(target_count)} targets where there are {counted}")
    return TokenFile(tokens, targets, target_count, meta["bytes"], meta["documents"], meta["fingerprint"])


def check_ids(token_file: TokenFile, config: Config) -> None:
    """Checks that the model's vocabulary holds each token of a file.

    Raises:
        InputError: if it doesn't.
    """
    if token_file.highest >= config.vocab_size:
        raise InputError(
            f"{getattr(token_file.tokens, 'filename', 'The text')} holds the token {token_file.highest} where the"
            f" model's vocabulary ends at {config.vocab_size - 1}: take the tokens of this model's tokenizer."
        )


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Checks that the model's vocabulary holds each of the tokenizer's tokens.

    Raises:
        InputError: if it doesn't.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer's tokens go up to {tokenizer.vocab_size - 1} where the model's vocab_size is "
            f"{config.vocab_size}: take the tokenizer that belongs to the model, or a vocab_size of at least "
            f"{tokenizer.vocab_size}."
        )


def _fingerprint(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{_FORM} {tokenizer.fingerprint()} {tokenizer.end_of_text}".encode())
    for document in documents:
        digest.update(f"\n{len(document.spans)}".encode())
        digest.update(repr(document.literal).encode())
        for text, target in document.spans:
            content = text.encode()
            digest.update(f" {len(content)} {int(target)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _write(
    folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, separator: int, progress: Progress | None
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    masked = any(not target for document in documents for _, target in document.spans)
    sizes = [[len(text.encode()) for text, _ in document.spans] for document in documents]
    total, done, count, target_count = sum(map(sum, sizes)), 0, 0, 0

    with open(folder / "tokens.npy", "wb") as tokens_file, open(folder / "targets.npy", "wb") as targets_file:
        _write_header(tokens_file, dtype, 0)
        _write_header(targets_file, np.dtype(np.bool_), 0)

        def add(tokens: list[int], target: bool) -> None:
            nonlocal count, target_count
            tokens_file.write(np.array(tokens, dtype).tobytes())
            if masked:
                targets_file.write(np.full(len(tokens), target).tobytes())
            count += len(tokens)
            target_count += len(tokens) * target

        add([separator], False)
        for document in documents:
            place = 0
            for text, target in document.spans:
                for piece in text_pieces(text, whole=tokenizer.added_tokens):
                    literal = clipped(document.literal, place, place + len(piece))
                    add(tokenizer.encode(piece, add_special_tokens=False, literal=literal), target)
                    place += len(piece)
                    done += len(piece.encode())
                    if progress is not None:
                        progress(done, total)
            add([separator], document.spans[-1][1])

        for file, kind in ((tokens_file, dtype), (targets_file, np.dtype(np.bool_))):
            file.seek(0)
            _write_header(file, kind, count)
    if not masked:
        (folder / "targets.npy").unlink()
    learned = sum(
        size
        for document, parts in zip(documents, sizes, strict=True)
        for (_, target), size in zip(document.spans, parts, strict=True)
        if target
    )
    return {
        "tokens": count,
        "target_count": target_count,
        "bytes": learned,
        "documents": len(documents),
        "masked": masked,
    }


def _write_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    # NumPy leaves room in a header for any length, so the final header fits in place of the first.
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + _AT_ONCE] for start in range(0, len(array), _AT_ONCE))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = read_note(path, _KINDS, _OLD_KINDS)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    wrong = [name for name, value in meta.items() if type(value) is not _KINDS[name]]
    wrong += [name for name, value in meta.items() if type(value) is int and not 0 <= value < 2**62]
    if wrong:
        raise _damaged(path, f"{wrong[0]} is {shown(meta[wrong[0]])}")
    if meta["tokens"] < 2:
        raise _damaged(path, f"it counts {meta['tokens']} tokens where two ends of text are the least")
    if SEAL not in meta:
        warnings.warn(f"{path} has no checksums, as an earlier version wrote it: damage isn't seen.", stacklevel=3)
    return meta


def _map(path: Path, meta: dict[str, Any], dtypes: tuple[str, ...]) -> np.memmap[Any, np.dtype[Any]]:
    length = meta["tokens"]
    try:
        dtype, found, start = _read_header(path)
        if (dtype, found) not in [(name, length) for name in dtypes]:
            raise ValueError(f"{dtype} [{found}] where {' or '.join(dtypes)} [{length}] is expected")
        size = start + length * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes where {size} are expected")
        if SEAL in meta and (reason := disagreement(file_sum(path), meta["files"].get(path.name))):
            raise ValueError(reason)
        return np.memmap(path, dtype, mode="r", offset=start, shape=(length,))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _read_header(path: Path) -> tuple[str, int, int]:
    """Dtype, length, and the offset of the entries. Raises ValueError if the file isn't such an array."""
    with open_regular(path) as file:
        header = _HEADER.match(file.read(_LONGEST_HEADER))
    if header is None or 10 + int.from_bytes(header[1], "little") != header.end() or header[2] not in _DTYPES:
        raise ValueError("its header isn't that of tokens")
    return _DTYPES[header[2]], int(header[3]), header.end()


def _damaged(path: Path, reason: object) -> InputError:
    said = getattr(reason, "strerror", None) or reason
    return InputError(
        f"{path} isn't a whole file of tokens ({said}): copy its folder from where it is whole, or make it again from"
        " its text."
    )
