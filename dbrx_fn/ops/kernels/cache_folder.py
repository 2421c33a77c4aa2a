"""The user's cache folder for compiled kernels: only files that nobody else can have written are taken from it."""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> tuple[Path | None, str]:
    """`dbrx_fn` in the user's cache folder, made if it is missing; else `None`, and the reason."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification has relative paths ignored.
        folder = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "dbrx_fn"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Who may write to the folder above could put another in this one's place, unless it is sticky, as /tmp is.
        above, found = folder.parent.stat(), folder.lstat()
    except (OSError, RuntimeError) as error:
        return None, f"there is no cache folder ({error})"
    if above.st_uid not in (0, os.geteuid()) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        return None, f"{folder.parent} can be written by others"
    problem = _problem(found, stat.S_ISDIR)
    return (None, f"{folder} {problem}") if problem else (folder, "")


def cached(key: str, suffix: str, make: Callable[[], bytes]) -> bytes:
    """What is kept under this key, else what `make` returns, which is then kept if it can be."""
    folder, _ = cache_folder()
    if folder is None:
        return make()
    path = kept(folder, key, suffix)
    if path is not None:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    made = make()
    keep(made, folder, key, suffix)
    return made


def kept(folder: Path, key: str, suffix: str) -> Path | None:
    """What `keep` kept under this key, if it is there, is undamaged, and is the user's own."""
    for path in folder.glob(f"{key}-*{suffix}"):
        with contextlib.suppress(OSError):
            if not _problem(path.lstat(), stat.S_ISREG) and path.name == _name(key, path.read_bytes(), suffix):
                return path
    return None


def keep(contents: bytes, folder: Path, key: str, suffix: str) -> tuple[Path | None, str]:
    """Writes a file into the folder, beside its name and then renamed, so that other processes see all or nothing.

    Returns:
        its path; or `None`, and the reason.
    """
    beside = None
    try:
        to_be = folder / _name(key, contents, suffix)
        descriptor, beside = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(descriptor, "wb") as to:
            to.write(contents)
            to.flush()
            os.fsync(descriptor)
        os.rename(beside, to_be)
        return to_be, ""
    except OSError as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        return None, f"{folder} can't be written ({error.strerror})"


def _name(key: str, contents: bytes, suffix: str) -> str:
    # Truncated machine code can kill the process that loads it, so the name tells its digest.
    return f"{key}-{hashlib.sha256(contents).hexdigest()[:24]}{suffix}"


def _problem(found: os.stat_result, is_kind: Callable[[int], bool]) -> str:
    """What makes a file or folder unsafe, as a phrase that follows its name; empty, if nothing does."""
    if not is_kind(found.st_mode):
        return "is a link or of another kind"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    return "can be written by others" if found.st_mode & 0o022 else ""
