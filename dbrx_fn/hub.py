"""Finds a checkpoint's folder: a local one, or a Hugging Face repository's, downloaded and cached."""

import contextlib
import re
from pathlib import Path
from textwrap import shorten

from dbrx_fn.errors import CheckpointError

SMALL = Path(__file__).parent / "small"
"""The checkpoint of the small model that ships with the package."""

_TEXT_FILES = ["*.json", "*.jinja", "*.txt"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_path(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """`checkpoint_folder` with its weights, or the GGUF file that was named."""
    # What can't be a name is refused below, in a sentence.
    with contextlib.suppress(OSError, RuntimeError):
        path = Path(path_or_repo).expanduser()
        if path.suffix.lower() == ".gguf" and path.is_file():
            return path
    return checkpoint_folder(path_or_repo, revision=revision)


def checkpoint_folder(path_or_repo: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
        path_or_repo: a folder, or a repository of the Hugging Face Hub such as `databricks/dbrx-instruct`, which is
            downloaded into the Hub's own cache (resumed if it was interrupted, reused offline).
        weights: whether the weights are needed too, or only config and tokenizer.
        revision: of the repository: a branch, tag or commit; its main branch, if not given.

    Raises:
        CheckpointError: if there is neither such a folder nor such a repository, or it can't be downloaded.
    """
    try:
        folder = Path(path_or_repo).expanduser()
        # MLX takes UTF-8 names only.
        str(folder).encode()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, RuntimeError, UnicodeError) as error:
        name = shorten(str(path_or_repo).encode(errors="replace").decode(), 200, placeholder="…")
        raise CheckpointError(
            f"{name} can't be a folder's name ({getattr(error, 'strerror', error)}): give a folder that holds a DBRX"
            " checkpoint."
        ) from None
    if exists:
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the weights.")
    if isinstance(path_or_repo, Path) or not _REPOSITORY.fullmatch(path_or_repo):
        raise CheckpointError(
            f"{folder} doesn't exist: give a folder that holds a DBRX checkpoint, or a Hugging Face repository as"
            " owner/name."
        )
    return _download(path_or_repo, [*_TEXT_FILES, "*.safetensors"] if weights else _TEXT_FILES, revision)


def _download(repository: str, patterns: list[str], revision: str | None) -> Path:
    # Imported here because it takes as long as all the rest, and local folders don't need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    # Besides the Hub's own errors, a connection that breaks raises those of an HTTP library or of hf-xet.
    except Exception as error:
        reason = shorten(str(error), 200, placeholder="…")
        raise CheckpointError(
            f"{repository} is no folder here and can't be had from the Hugging Face Hub ({reason}): check the name, the"
            " network and your access to it."
        ) from None
