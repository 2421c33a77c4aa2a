"""Tokens chosen at random, without a model, of those that a matcher allows."""

from collections.abc import Iterator

import numpy as np

from dbrx_fn.generation.structured import Matcher


def tokens_allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def followed(matcher: Matcher, seed: int, most: int) -> Iterator[tuple[int, list[int]]]:
    """Tokens chosen at random, and those that were allowed with each."""
    random = np.random.default_rng(seed)
    for _ in range(most):
        if matcher.finished:
            return
        allowed = tokens_allowed(matcher)
        token = int(random.choice(allowed))
        yield token, allowed
        matcher.advance(token)
