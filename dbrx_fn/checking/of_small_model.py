"""Checks of the small model: its logits, and its generated text."""

from collections.abc import Iterator
from functools import cache, partial

import mlx.core as mx

from dbrx_fn.checking.checks import Check
from dbrx_fn.checking.comparison import LIMITS, Comparison, compare, compare_tokens
from dbrx_fn.checking.reference import MADE, PROMPT, expected, kept
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params

_FAMILY = "the small model"


def check_small_model() -> Iterator[Check]:
    """Checks of a prompt and its continuation, in float32."""
    for capacity in (0, 64):
        case = f"{len(PROMPT) + MADE} tokens, {'into a cache' if capacity else 'no cache'}"
        yield Check("the small model, logits", case, LIMITS["float32"], partial(_logits, capacity), family=_FAMILY)
    ways = {"the likeliest token": Sampling(), "one of the likeliest, drawn": Sampling(temperature=1.0, top_k=1)}
    for case, sampling in ways.items():
        yield Check("the small model, its text", case, 0.0, partial(_text, sampling), family=_FAMILY)


@cache
def _model() -> tuple[Params, Config]:
    return load(SMALL, dtype="float32")


def _logits(capacity: int) -> Comparison:
    params, config = _model()
    tokens = [*PROMPT, *map(int, expected("small/made"))]
    logits, _ = forward(params, mx.array([tokens], mx.int32), init_cache(config, 1, capacity))
    return compare(logits[0, :, kept(config.vocab_size)], expected("small/logits"))


def _text(sampling: Sampling) -> Comparison:
    made = stream_tokens(*_model(), PROMPT, max_tokens=MADE, sampling=sampling, key=mx.random.key(0))
    return compare_tokens(list(made), expected("small/made"))
