"""Measures speculation on texts that are known beforehand.

Random weights copy nothing. So the two ends of the model are changed: the head's row for one token is the embedding's
row for another, and the embedding is so large that no layer can change the choice. Greedy text then follows a
permutation of the vocabulary, while each pass reads all that it reads otherwise. A short cycle of the permutation is a
text that copies itself. A long one never repeats.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.benchmarks.tables import table
from dbrx_fn.errors import InputError
from dbrx_fn.generation.speculation import Speculation
from dbrx_fn.generation.stream import stream_tokens, warm_up
from dbrx_fn.model.config import Config
from dbrx_fn.model.costs import Formats
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import LEAVES, Format, Linear, quantize_matrix

_CYCLE = 300
"""The number of tokens after which a text that copies itself begins again."""
_LOUDNESS = 1000
"""How much larger the embedding is than other weights."""


@dataclass(frozen=True)
class SpeculationSpeed:
    """The speed of one text without and with speculation.

    `prompt`, `tokens`: numbers of tokens before the text, and of it.
    `off`, `on`: tokens per second behind the first token, of each repetition.
    `passes`: how often the model ran for `tokens - 1` tokens, with speculation.
    `other_tokens`: tokens of the last repetition that the text doesn't have. Rounding may cause some in narrow models.
    """

    text: str
    prompt: int
    tokens: int
    off: tuple[float, ...]
    on: tuple[float, ...]
    passes: int
    other_tokens: int

    @property
    def gain(self) -> float:
        """The median speed with speculation over that without."""
        return statistics.median(self.on) / statistics.median(self.off)


def check_texts(config: Config, prompt: int, tokens: int) -> None:
    """Raises `InputError` if a vocabulary or a context is too small for such texts, or a prompt is too short."""
    longest = min(config.vocab_size - _CYCLE, config.max_seq_len)
    if prompt + tokens > longest:
        raise InputError(
            f"--prompt and --tokens come to {prompt + tokens} tokens, and the longest text of this model that never"
            f" repeats has {max(0, longest)}: ask for fewer."
        )
    if tokens < 2:
        raise InputError(f"--tokens is {tokens} where it must be at least 2: the first one isn't timed.")
    if prompt < _CYCLE:
        raise InputError(
            f"--prompt is {prompt} where it must be at least {_CYCLE}: the text that copies itself begins again after"
            " that many tokens."
        )


def following(params: Params, config: Config, formats: Formats, after: NDArray[np.integer]) -> Params:
    """The tree with ends for which greedy text is a permutation: `after[t]` follows token t.

    Args:
        params: random weights.
        config: the model's.
        formats: formats of the quantized matrices, by their paths.
        after: a permutation of the vocabulary.
    """
    shape = (config.vocab_size, config.d_model)
    rows = mx.random.normal(shape, getattr(mx, config.dtype), scale=config.initializer_range, key=mx.random.key(3))
    before = mx.array(np.argsort(after).astype(np.int32))
    return {
        "transformer": {
            **params["transformer"],
            "wte": _stored(_LOUDNESS * rows, formats.get("transformer.wte.weight")),
        },
        "lm_head": _stored(rows[before], formats.get("lm_head.weight")),
    }


def measure_speculation(
    params: Params, config: Config, formats: Formats, prompt: int, tokens: int, repeats: int
) -> list[SpeculationSpeed]:
    """Generates each text without and with speculation, in turns.

    Args:
        params: random weights.
        config: the model's.
        formats: formats of the quantized matrices, by their paths.
        prompt: number of tokens before a text.
        tokens: number of tokens of it.
        repeats: repetitions of each.
    """
    order = np.random.default_rng(0).permutation(config.vocab_size)
    after = np.empty_like(order)
    cycles = {"copies itself": order[:_CYCLE], "never repeats": order[_CYCLE:]}
    for cycle in cycles.values():
        after[cycle] = np.roll(cycle, -1)
    params = following(params, config, formats, after)
    mx.eval(params)
    warm_up(params, config, prompt, max_tokens=tokens, speculation=Speculation())
    speeds = []
    for name, cycle in cycles.items():
        text = np.resize(cycle, prompt + tokens).tolist()
        runs = [
            [_run(params, config, text[:prompt], tokens, speculation) for speculation in (None, Speculation())]
            for _ in range(repeats)
        ]
        off, on = (tuple(run.rate for run in of_all) for of_all in zip(*runs, strict=True))
        last = runs[-1][1]
        other = sum(made != meant for made, meant in zip(last.made, text[prompt:], strict=True))
        speeds.append(SpeculationSpeed(name, prompt, tokens, off, on, last.passes, other))
    return speeds


def speculation_table(speeds: Sequence[SpeculationSpeed]) -> str:
    """The measurements as a table, a line each."""
    columns: dict[str, Callable[[SpeculationSpeed], str]] = {
        "text": lambda s: s.text,
        "prompt": lambda s: f"{s.prompt:,}",
        "tokens": lambda s: f"{s.tokens:,}",
        "tokens/s off": lambda s: _spread(s.off),
        "tokens/s on": lambda s: _spread(s.on),
        "gain": lambda s: f"{s.gain:.3f}",
        "passes": lambda s: f"{s.passes:,}",
        "other tokens": lambda s: f"{s.other_tokens:,}",
    }
    return table(columns, speeds)


class _Run(NamedTuple):
    rate: float
    passes: int
    made: list[int]


def _run(params: Params, config: Config, prompt: list[int], tokens: int, speculation: Speculation | None) -> _Run:
    stream = stream_tokens(params, config, prompt, max_tokens=tokens, speculation=speculation)
    made = [next(stream)]
    start = time.perf_counter()
    made += stream
    return _Run((tokens - 1) / (time.perf_counter() - start), stream.passes, made)


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.1f} ({min(rates):,.1f} - {max(rates):,.1f})"


def _stored(matrix: mx.array, form: Format | None) -> Linear:
    leaves = [matrix] if form is None else quantize_matrix(matrix, form)
    return cast(Linear, dict(zip(LEAVES, leaves, strict=False)))
