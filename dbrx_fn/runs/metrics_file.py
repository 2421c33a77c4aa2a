"""`metrics.jsonl`: a run's log, with one JSON object per line. This module writes and reads it."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import mlx.core as mx

from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.perplexity import Evaluation
from dbrx_fn.files.atomic import write_file
from dbrx_fn.files.json_file import parse_json, shown
from dbrx_fn.files.regular_file import open_regular
from dbrx_fn.model.config import Config
from dbrx_fn.training.losses import busiest_expert
from dbrx_fn.training.step import Measured

_STEP_KEYS = {
    *("step", "epoch", "loss", "cross_entropy", "load_balance", "router_z"),
    *("gradient_norm", "learning_rate", "busiest_expert", "tokens_per_second"),
}
_SHARES = "expert_share"
_EVALUATION_KEYS = {
    *("step", "held_out_nats_per_token", "held_out_bits_per_byte", "held_out_busiest_expert"),
    _SHARES,
}
# An evaluation's line has a figure for each expert of each layer. There are at most 2**15 of these.
_LONGEST_LINE = 2**20
_LARGEST = 2**28
"""The most bytes of the file: about a million lines."""


def step_line(measured: Measured, step: int, epoch: float, rate: float) -> dict[str, float]:
    """A step's line. `rate` is in tokens per second."""
    parts = measured.parts
    return {
        "step": step,
        "epoch": round(epoch, 4),
        "loss": number(measured.loss),
        "cross_entropy": number(parts.cross_entropy),
        "load_balance": number(parts.load_balance),
        "router_z": number(parts.router_z),
        "gradient_norm": number(measured.gradient_norm),
        "learning_rate": number(measured.learning_rate),
        "busiest_expert": busiest_expert(parts.expert_share),
        "tokens_per_second": round(rate, 1),
    }


def evaluation_line(evaluation: Evaluation, step: int) -> dict[str, Any]:
    """An evaluation's line."""
    return {
        "step": step,
        "held_out_nats_per_token": evaluation.nats_per_token,
        "held_out_bits_per_byte": evaluation.bits_per_byte,
        "held_out_busiest_expert": evaluation.busiest_expert,
        _SHARES: evaluation.expert_share.tolist(),
    }


def number(array: mx.array) -> float:
    """The value of a scalar array. Waits until it is computed."""
    return cast(float, array.item())


def write_line(file: TextIO, line: dict[str, Any]) -> None:
    """Appends a line, which readers see at once."""
    file.write(json.dumps(line) + "\n")
    file.flush()


def read_metrics(path: Path, config: Config) -> list[dict[str, Any]]:
    """The lines of the file. An incomplete last line is ignored, and a missing file has no lines.

    Raises:
        InputError: if another line isn't a valid one of this model, or the file can't be read.
    """
    return [noted for _, noted in _lines(path, config)]


def cut_metrics(path: Path, step: int, config: Config) -> None:
    """Removes the lines after `step`, which a resumed run writes again. Errors are those of `read_metrics`."""
    write_file(path, b"".join(line for line, noted in _lines(path, config) if noted["step"] <= step))


def _lines(path: Path, config: Config) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each complete line, as bytes and as its value."""
    size = before = 0
    try:
        with open_regular(path) as file:
            for place in itertools.count(1):
                line = file.readline(_LONGEST_LINE)
                size += len(line)
                if size > _LARGEST:
                    raise _unreadable(path, f"it has more than the {_LARGEST} bytes that are read")
                if len(line) == _LONGEST_LINE:
                    raise _unreadable(path, f"line {place} has {_LONGEST_LINE} bytes and more")
                if not line.endswith(b"\n"):
                    return
                try:
                    noted = _checked(line, config)
                    if noted["step"] < before:
                        raise ValueError(f"step {noted['step']} comes after step {before}")
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {place}: this isn't what a run notes there ({error}): mend it, or move the file."
                    ) from None
                before = noted["step"]
                yield line, noted
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or error) from None


def _unreadable(path: Path, reason: object) -> InputError:
    return InputError(f"{path} can't be read ({reason}): move it elsewhere, and a new one is begun.")


def _checked(line: bytes, config: Config) -> dict[str, Any]:
    """A line's value. Raises ValueError if it isn't a valid line of this model."""
    noted = parse_json(line, unique=True)
    if not isinstance(noted, dict) or noted.keys() not in (_STEP_KEYS, _EVALUATION_KEYS):
        raise ValueError(f"{shown(noted)} hasn't the keys of a step or an evaluation")
    for key, value in noted.items():
        if key == "step":
            fits = type(value) is int and 0 < value < 2**63
        elif key == _SHARES:
            fits = _is_matrix(value, config.n_layers, config.ffn.moe_num_experts)
        else:
            fits = _is_finite(value)
        if not fits:
            raise ValueError(f"{key} is {shown(value)}")
    return noted


def _is_matrix(value: object, rows: int, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns and all(map(_is_finite, row)) for row in value)
    )


def _is_finite(value: object) -> bool:
    # An integer may be too large for a float.
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300 and math.isfinite(cast(float, value))
