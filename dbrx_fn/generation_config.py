"""Reads how a checkpoint's authors would have its tokens chosen: `generation_config.json`, in transformers' terms."""

from pathlib import Path
from typing import Any

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.json_file import parse_json, read_bounded, shown
from dbrx_fn.sampling import Sampling

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_sampling(folder: Path) -> Sampling:
    """The sampling that a checkpoint folder asks for: the likeliest token, unless it says `do_sample`.

    Raises:
        CheckpointError: if the file can't be read, or gives something other than a number of the right range.
    """
    file = folder / "generation_config.json"
    try:
        settings = parse_json(read_bounded(file)) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON ({error}): fetch it again, or remove it.") from None
    if not isinstance(settings, dict) or not settings.get("do_sample"):
        return Sampling()
    chosen: dict[str, Any] = {"temperature": 1.0}
    for name in _FIELDS:
        value = settings.get(name)
        if value is None:
            continue
        whole = name == "top_k"
        usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not usable or (whole and not float(value).is_integer()):
            expected = "whole number" if whole else "number"
            raise CheckpointError(
                f"{file}: {name} is {shown(value)} where a {expected} is expected: mend or remove it."
            )
        chosen[name] = int(value) if whole else value
    try:
        return Sampling(**chosen)
    except InputError as error:
        raise CheckpointError(f"{file} can't be followed ({str(error).rstrip('.')}): mend or remove it.") from None
