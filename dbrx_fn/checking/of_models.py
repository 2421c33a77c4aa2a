"""Checks of whole models: the logits of rows of tokens, for every way of passing tokens to `forward`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.comparison import LIMITS, Comparison, compare
from dbrx_fn.checking.models import Model
from dbrx_fn.checking.reference import expected, kept
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Mode

Rows = Sequence[NDArray[np.int64]]
Way = Callable[[Params, Config, Rows], mx.array]
"""Takes a model and rows of tokens, and returns the logits of some rows, one row after the other, `[token vocab]`."""

FIRST = slice(0, 1)
ALL = slice(None)


def _whole(params: Params, config: Config, rows: Rows) -> mx.array:
    return forward(params, _batch(rows[:1]), init_cache(config, 1, 0))[0][0]


def _into_a_cache(params: Params, config: Config, rows: Rows) -> mx.array:
    return forward(params, _batch(rows[:1]), init_cache(config, 1, 32))[0][0]


def _in_chunks(params: Params, config: Config, rows: Rows) -> mx.array:
    return forward(params, _batch(rows[:1]), init_cache(config, 1, 32), chunk_size=7)[0][0]


def _token_by_token(params: Params, config: Config, rows: Rows) -> mx.array:
    cache, made = init_cache(config, 1, 32), []
    for token in rows[0]:
        logits, cache = forward(params, mx.array([[int(token)]], mx.int32), cache)
        made.append(logits[0])
    return mx.concatenate(made)


def _ragged_batch(params: Params, config: Config, rows: Rows) -> mx.array:
    """Two calls, with rows at different positions in between. The longest row fills the cache completely."""
    firsts = [2 * len(row) // 3 for row in rows]
    cache = init_cache(config, len(rows), max(map(len, rows)))
    made: list[list[mx.array]] = [[] for _ in rows]
    for parts in (
        [row[:first] for row, first in zip(rows, firsts, strict=True)],
        [row[first:] for row, first in zip(rows, firsts, strict=True)],
    ):
        logits, cache = _padded(params, cache, parts)
        for row, part in enumerate(parts):
            made[row].append(logits[row, : len(part)])
    return mx.concatenate([part for row in made for part in row])


WAYS: dict[str, tuple[Way, slice]] = {
    "whole": (_whole, FIRST),
    "into a cache": (_into_a_cache, FIRST),
    "in chunks": (_in_chunks, FIRST),
    "token by token": (_token_by_token, FIRST),
    "ragged batch": (_ragged_batch, ALL),
}
"""The ways, each with the rows whose logits it makes."""


def check_models(
    group: Callable[[Dtype, str], str],
    models: Sequence[Model],
    *,
    dtypes: Sequence[Dtype] = get_args(Dtype),
    ways: Sequence[str] = tuple(WAYS),
    **choices: Any,
) -> Iterator[Check]:
    """Checks of each model in each dtype and way.

    Args:
        group: the report's row for a dtype and a way.
        models: which.
        dtypes: which.
        ways: names in `WAYS`.
        **choices: of `Check`, as for `as_if`.
    """
    for dtype in dtypes:
        for way in ways:
            for model in models:
                case = f"{model.name} (seed {model.seed}), {dtype}, {way}"
                compared = partial(_compared, model, dtype, way)
                # Kernels depend on a model's sizes, and hardly on the way.
                family = f"{model.name}, {dtype}"
                yield Check(group(dtype, way), case, LIMITS[dtype], compared, family=family, **choices)


def format_group(model: Model) -> str:
    """The report's row of a quantized model."""
    assert model.form is not None
    mode: Mode = model.form.mode
    return f"quantized, affine {model.form.bits} bits" if mode == "affine" else f"quantized, {mode}"


def _compared(model: Model, dtype: Dtype, way: str) -> Comparison:
    run, rows = WAYS[way]
    right = [expected(f"{model.name}/{row}") for row in range(len(model.rows))][rows]
    logits = run(*model.params(dtype), model.rows)
    return compare(logits[:, kept(model.config.vocab_size)], np.concatenate(right))


def _padded(params: Params, cache: Cache, parts: Rows) -> tuple[mx.array, Cache]:
    lengths = [len(part) for part in parts]
    # Padding may hold ids other than 0.
    tokens = np.full((len(parts), max(lengths) + 1), 1)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
    return forward(params, mx.array(tokens, mx.int32), cache, lengths=lengths)


def _batch(rows: Rows) -> mx.array:
    return mx.array(np.array(rows), mx.int32)
