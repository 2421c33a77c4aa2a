"""A Hugging Face repository's checkpoint without its weights: small files are complete, weights' files sparse.

The sparse files have true headers and holes in place of tensors. For the released model that is a few MB instead of
264 GB.
"""

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from dbrx_fn.checkpoints.hub import checkpoint_folder, checkpoint_path, local_path
from dbrx_fn.checkpoints.safetensors_file import read_headers
from dbrx_fn.errors import CheckpointError, DbrxError
from dbrx_fn.files.json_file import is_plain_name


@contextlib.contextmanager
def headers_of(path_or_repo: str | Path, *, revision: str | None = None) -> Iterator[Path]:
    """Yields a folder or GGUF file with the checkpoint's headers, for `open_checkpoint`. No weights are downloaded.

    For a local checkpoint, or a repository whose weights are all in the Hub's cache, it is the checkpoint itself. For
    another repository it is a temporary folder, and errors name the repository instead of the folder.

    Raises:
        CheckpointError: if the checkpoint doesn't exist, or the repository's headers can't be fetched.
    """
    if local_path(path_or_repo) is not None or isinstance(path_or_repo, Path):
        yield checkpoint_path(path_or_repo, revision=revision)
        return
    small = checkpoint_folder(path_or_repo, weights=False, revision=revision)
    if _has_weights(small):
        yield small
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for file in small.iterdir():
                if file.is_file():
                    (folder / file.name).symlink_to(file.resolve())
            # The snapshot's folder has the name of its commit.
            _write_headers(folder, path_or_repo, small.name)
            yield folder
        except DbrxError as error:
            raise type(error)(str(error).replace(str(folder), path_or_repo)) from None


def _has_weights(folder: Path) -> bool:
    try:
        return bool(read_headers(folder))
    except CheckpointError:
        return False


def _write_headers(folder: Path, repository: str, commit: str) -> None:
    # Imported here, since the import is slow and local folders don't need it.
    from huggingface_hub import HfApi

    try:
        found = HfApi().get_safetensors_metadata(repository, revision=commit)
    # A broken connection raises errors of an HTTP library.
    except Exception as error:
        reason = shorten(str(error), 200, placeholder="…")
        raise CheckpointError(
            f"The headers of {repository}'s weights can't be had from the Hugging Face Hub ({reason}): check that it"
            " holds safetensors, and the network."
        ) from None
    for name, file in found.files_metadata.items():
        if not is_plain_name(name, 255) or Path(name).name != name:
            raise CheckpointError(f"{repository}'s index names {name!r}, which can't be a file beside it.")
        tensors = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in file.tensors.items()
        }
        content = json.dumps({"__metadata__": file.metadata or {}} | tensors, separators=(",", ":"))
        header = content.encode()
        # The safetensors library can't write a header without tensors. The padding is the library's.
        header += b" " * (-len(header) % 8)
        end = max((info.data_offsets[1] for info in file.tensors.values()), default=0)
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(folder / name, 8 + len(header) + end)
