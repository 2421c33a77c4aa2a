"""Finds checkpoints: local folders, GGUF files, and Hugging Face repositories, which are downloaded and cached."""

import re
from pathlib import Path
from textwrap import shorten

from dbrx_fn.errors import CheckpointError
from dbrx_fn.files.json_file import shown, shown_path

SMALL = Path(__file__).parents[1] / "small"
"""The folder of the small model that is part of this package."""

_TEXT_FILES = ["*.json", "*.jinja", "*.txt"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_path(path_or_repo: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, or its GGUF file.

    Args:
        path_or_repo: a folder, a GGUF file, or a repository of the Hugging Face Hub such as `databricks/dbrx-instruct`.
            A repository is downloaded into the Hub's own cache. An interrupted download is resumed, a finished one
            works offline.
        weights: whether the weights are needed too, or only config and tokenizer.
        revision: branch, tag or commit of the repository. The main branch, if not given.

    Raises:
        CheckpointError: if neither a checkpoint nor a repository of this name exists, or the download fails. With
            `weights`, if it holds adapters in place of a model.
    """
    path = _path(path_or_repo, weights, revision)
    if weights:
        refuse_adapters(path)
    return path


def refuse_adapters(folder: Path) -> None:
    """Raises `CheckpointError` if a folder holds adapters in place of a model."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds adapters and no model: give their model, and this folder with --adapter-path."
        )


def _path(path_or_repo: str | Path, weights: bool, revision: str | None) -> Path:
    found = local_path(path_or_repo)
    if found is not None:
        if found.is_dir() or found.suffix.lower() == ".gguf":
            return found
        raise CheckpointError(f"{found} is a file: give the folder that holds config.json and the weights.")
    name = str(path_or_repo)
    if isinstance(path_or_repo, Path) or not _REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"{shown_path(name)} doesn't exist: give a folder that holds a DBRX checkpoint, or a Hugging Face"
            " repository as owner/name."
        )
    return _download(name, [*_TEXT_FILES, "*.safetensors"] if weights else _TEXT_FILES, revision)


def checkpoint_folder(path_or_repo: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """`checkpoint_path` for a checkpoint that must be a folder.

    Raises:
        CheckpointError: as in `checkpoint_path`, or if it is a GGUF file.
    """
    path = checkpoint_path(path_or_repo, weights=weights, revision=revision)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a GGUF file where a checkpoint's folder is needed: python -m dbrx_fn.convert makes one of it."
        )
    return path


def local_path(path_or_repo: str | Path) -> Path | None:
    """The file or folder of this name, or `None` if there is none.

    Raises:
        CheckpointError: if the name is impossible.
    """
    try:
        path = Path(path_or_repo).expanduser()
        # MLX accepts only UTF-8 names.
        str(path).encode()
        if not str(path_or_repo):
            raise ValueError("it is empty")
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        name = shorten(str(path_or_repo).encode(errors="replace").decode(), 200, placeholder="…")
        raise CheckpointError(
            f"{shown(name)} can't be a folder's name ({getattr(error, 'strerror', error)}): give a folder that holds a"
            " DBRX checkpoint."
        ) from None


def model_name(path_or_repo: str, path: Path) -> str:
    """What a model is called: its repository's name, or its folder's or file's.

    Args:
        path_or_repo: what the user gave.
        path: what `checkpoint_path` returned for it.
    """
    if local_path(path_or_repo) is None:
        return path_or_repo
    return path.resolve().stem if path.is_file() else path.resolve().name


def refusal(repository: str, revision: str | None, error: Exception) -> CheckpointError:
    """The error for an exception of the Hugging Face Hub's library, as one short sentence."""
    from huggingface_hub import errors

    text = shorten(str(error.__cause__ or error), 100, placeholder="…")
    match error:
        case errors.GatedRepoError():
            said = f"is gated: ask for access at https://huggingface.co/{repository}, and log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            said = "is not a folder here and no repository that you may see: check it, or log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            said = f"has no revision {shown(revision)}: name a branch, tag or commit of it"
        case errors.HFValidationError():
            said = "is not a folder here and can't be a repository's name: check it"
        case errors.LocalEntryNotFoundError(__cause__=errors.OfflineModeIsEnabled()):
            said = "is not a folder here or in the Hub's cache, and HF_HUB_OFFLINE forbids a download: check the name"
        case errors.LocalEntryNotFoundError():
            said = f"is not a folder here, and the Hugging Face Hub can't be reached ({text}): check name and network"
        case _:
            said = f"can't be had from the Hugging Face Hub ({text}): check the network and your access to it"
    return CheckpointError(f"{repository} {said}.")


def _download(repository: str, patterns: list[str], revision: str | None) -> Path:
    # Imported here, since the import is slow and local folders don't need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    # A broken connection raises errors of an HTTP library or of hf-xet.
    except Exception as error:
        raise refusal(repository, revision, error) from None
