"""The files of a checkpoint's tokenizer: those in its folder, or those that a GGUF file's metadata describe."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dbrx_fn.checkpoints.gguf_tokenizer import gguf_tokenizer
from dbrx_fn.checkpoints.hub import checkpoint_folder
from dbrx_fn.errors import DbrxError, TokenizerError
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with a tokenizer's files.

    `folder`: holds tokenizer.json or tokenizer_config.json, and perhaps generation_config.json.
    `checkpoint`: the checkpoint's folder, or its GGUF file.
    """

    folder: Path
    checkpoint: Path

    def read(self) -> Tokenizer:
        """The tokenizer. Raises `TokenizerError` as `read_tokenizer` does."""
        tokenizer = read_tokenizer(self.folder)
        if self.folder in (self.checkpoint, self.checkpoint.parent):
            return tokenizer
        source = f"The chat template in {self.checkpoint}"
        return replace(tokenizer, chat_format=replace(tokenizer.chat_format, source=source))


def readable_tokenizer(path_or_repo: str) -> Path:
    """The folder of a tokenizer to copy. It is read once, so that a bad one is reported before hours of work.

    Raises:
        CheckpointError: as in `checkpoint_folder`.
        TokenizerError: as in `read_tokenizer`.
    """
    folder = checkpoint_folder(path_or_repo, weights=False).resolve()
    read_tokenizer(folder)
    return folder


def fitting_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a folder, for a model with a vocabulary of `vocab_size`.

    Raises:
        TokenizerError: as in `read_tokenizer`; or if it has more tokens than the model.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens and the model has {vocab_size}: take its own."
        )
    return tokenizer


@contextlib.contextmanager
def tokenizer_files(path: Path) -> Iterator[TokenizerFiles]:
    """Yields a checkpoint's tokenizer files.

    Those of a GGUF file are made from its metadata, in a temporary folder, and errors name the file instead. If it has
    no tokenizer that can be followed, the files beside it are taken.

    Args:
        path: from `checkpoint_path`.

    Raises:
        CheckpointError: if a GGUF file can't be read.
        TokenizerError: if it has no tokenizer that can be followed, and none lies beside it.
    """
    if path.is_dir():
        yield TokenizerFiles(path, path)
        return
    try:
        contents = gguf_tokenizer(path)
    except TokenizerError:
        if not _are_beside(path):
            raise
        yield TokenizerFiles(path.parent, path)
        return
    with tempfile.TemporaryDirectory() as name:
        try:
            for file, content in contents.items():
                Path(name, file).write_bytes(content)
        except OSError as error:
            raise TokenizerError(
                f"{path}'s tokenizer can't be written to {name} ({error.strerror or error}): make room there, or choose"
                " another folder with TMPDIR."
            ) from None
        try:
            yield TokenizerFiles(Path(name), path)
        except DbrxError as error:
            named = re.sub(rf"{re.escape(name)}(/\w+\.json)?", lambda _: str(path), str(error))
            raise type(error)(named) from None


def _are_beside(file: Path) -> bool:
    return any((file.parent / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
