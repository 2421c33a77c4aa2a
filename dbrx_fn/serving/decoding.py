"""The batches that decode, and how requests move between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dbrx_fn.generation.row_sampling import Choice
from dbrx_fn.model.config import Config
from dbrx_fn.serving.batch import Batch, arranged, one_row
from dbrx_fn.serving.reading import experts_of, in_words
from dbrx_fn.serving.request import MOST_TOP_LOGPROBS, Experts, TokenLogprobs
from dbrx_fn.serving.schedule import Group
from dbrx_fn.serving.served import Served


@dataclass(eq=False)
class Decoding:
    """A batch that decodes, and the request of each row; `None` for idle rows."""

    batch: Batch
    rows: tuple[Served | None, ...]

    def held(self) -> list[tuple[Served, int, int]]:
        """Each request in the batch, its row, and how many of its tokens the cache holds."""
        lengths = self.batch.cache.lengths
        return [
            (served, row, length)
            for row, (served, length) in enumerate(zip(self.rows, lengths, strict=True))
            if served is not None
        ]


@dataclass(frozen=True, eq=False)
class Launched:
    """Tokens that the device is computing: the choice, the request of each row, and the experts as in `Rows`."""

    choice: Choice
    rows: tuple[Served | None, ...]
    experts: mx.array | None

    def tokens(self) -> Iterator[tuple[Served | None, int, TokenLogprobs | None, Experts | None]]:
        """Each row's request, token, log-probabilities and experts. This waits for the device."""
        choice = self.choice
        tokens = np.array(choice.tokens).tolist()
        logprobs = [None] * len(tokens) if choice.logprobs is None else in_words(choice.logprobs, MOST_TOP_LOGPROBS)
        experts = [None] * len(tokens) if self.experts is None else experts_of(self.experts)
        return zip(self.rows, tokens, logprobs, experts, strict=True)


def rearranged(
    old: Sequence[Decoding],
    joining: Mapping[Served, Batch],
    groups: Sequence[tuple[Group, Sequence[Served]]],
    config: Config,
) -> list[Decoding]:
    """Batches that hold exactly the members of each group.

    Args:
        old: the batches before. Each goes on as the batch that most of its rows belong to now.
        joining: batches of one row, of requests that weren't in any batch.
        groups: the shape and members of each batch.
        config: the model's.
    """
    rows = {served: (one, row) for one in old for served, row, _ in one.held()}
    bases = _bases(old, [members for _, members in groups])
    # Rows that move to another batch are taken out before their old one changes.
    coming = dict(joining)
    for (_, members), base in zip(groups, bases, strict=True):
        for served in members:
            if served in rows and rows[served][0] is not base:
                one, row = rows[served]
                coming[served] = one_row(one.batch, row, config)
    new = []
    for (group, members), base in zip(groups, bases, strict=True):
        staying = [served for served in members if served not in coming]
        others = [served for served in members if served in coming]
        if base is not None and not others and _is_as_planned(base, staying, group):
            new.append(base)
            continue
        batch = None if base is None else base.batch
        places = [rows[served][1] for served in staying]
        made, whose = arranged(batch, places, [coming[served] for served in others], group.rows, group.capacity, config)
        owners = [*staying, *others]
        new.append(Decoding(made, tuple(None if place is None else owners[place] for place in whose)))
    return new


def _bases(old: Sequence[Decoding], groups: Sequence[Sequence[Served]]) -> list[Decoding | None]:
    """For each group, the batch that most of its rows are in already. Each batch goes to one group only."""
    left, bases = list(old), list[Decoding | None]()
    for group in groups:
        base = max(left, key=lambda one: sum(served in group for served in one.rows), default=None)
        if base is not None and any(served in group for served in base.rows):
            left.remove(base)
            bases.append(base)
        else:
            bases.append(None)
    return bases


def _is_as_planned(decoding: Decoding, staying: Sequence[Served], group: Group) -> bool:
    cache = decoding.batch.cache
    there = [served for served in decoding.rows if served is not None]
    return (cache.batch_size, cache.capacity) == (group.rows, group.capacity) and len(there) == len(staying)
