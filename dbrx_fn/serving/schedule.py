"""The scheduler: a pure function of the requests that wait, are in prefill, and decode.

Between two decoding steps at most one chunk of one prompt is prefilled, so no stream pauses for longer than a step and
a chunk take. Memory is counted in cache positions. Each request asks for the positions of its prompt and its next
tokens. A request that doesn't fit waits. When rows have no room to grow, the newest request is put aside (preempted)
until later.

All rows of a batch have the capacity of its longest text. So if memory is short, rows are grouped by length into
several batches, and each turn computes one step of each batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.serving.limits import Limits

AHEAD = 256
"""Tokens besides its prompt that a request asks room for, or all that it wants if they are fewer."""

_READERS = 4
"""The most prompts in prefill at once, so that a short one needn't wait for the end of a long one."""

_MOST_GROUPS = 4
"""The most batches that decode at once. Each reads all weights again, so there is only one if memory allows."""

_PASSED_OVER = 3
"""How many chunks of shorter prompts are read before the oldest prompt gets one."""


@dataclass(frozen=True)
class Work:
    """One request, as the scheduler sees it.

    `number`: its place in the order of arrival.
    `held`: number of tokens that its cache holds.
    `tokens`: number of tokens that it must hold before it can decode.
    `longest`: the most tokens that it may hold in the end.
    """

    number: int
    held: int
    tokens: int
    longest: int

    def room(self, ahead: int = AHEAD) -> int:
        """Positions that it asks for, with room for so many tokens more."""
        return min(max(self.held, self.tokens) + ahead, self.longest)


@dataclass(frozen=True)
class State:
    """All requests of an engine.

    `waiting`: those without a cache.
    `reading`: those in prefill.
    `decoding`: those that generate tokens.
    `passed_over`: chunks of other prompts that were read since the last chunk of the oldest one in `reading`.
    """

    waiting: tuple[Work, ...] = ()
    reading: tuple[Work, ...] = ()
    decoding: tuple[Work, ...] = ()
    passed_over: int = 0


@dataclass(frozen=True)
class Group:
    """Requests that decode together.

    `numbers`: the requests' numbers.
    `rows`: rows of the batch; some may be idle.
    `capacity`: positions of each row.
    """

    numbers: tuple[int, ...]
    rows: int
    capacity: int


@dataclass(frozen=True)
class Step:
    """What to do next.

    `put_aside`: numbers of requests that lose their caches and wait again.
    `admitted`: numbers of waiting requests whose prefill begins.
    `read`: number of the request whose prompt gets a chunk; `None` if there is none.
    `groups`: all requests that decode, by batch.
    """

    put_aside: tuple[int, ...]
    admitted: tuple[int, ...]
    read: int | None
    groups: tuple[Group, ...]


def plan(state: State, limits: Limits) -> Step:
    """The next step. The oldest requests come first in everything."""
    decoding, reading, aside = _with_room(_sorted(state.decoding), _sorted(state.reading), limits)
    admitted: list[Work] = []
    for work in _sorted(state.waiting) if not aside else ():
        there = [*reading, *admitted]
        if len(there) >= _READERS or not _fits(decoding, [*there, work], limits):
            break
        admitted.append(work)
    return Step(
        put_aside=tuple(work.number for work in aside),
        admitted=tuple(work.number for work in admitted),
        read=_to_read([*reading, *admitted], state.passed_over),
        groups=_groups(decoding, [*reading, *admitted], limits),
    )


def never_fits(tokens: int, longest: int, limits: Limits) -> bool:
    """Whether a request can't be served even if it is alone."""
    return not _fits([], [Work(0, 0, tokens, longest)], limits, ahead=longest)


def batch_rows(count: int, limits: Limits) -> int:
    """Rows of a batch for `count` requests: 1, 2, 4, 8, then at most four steps per doubling, so that shapes are few.

    Idle rows cost a CPU as much as others (`docs/serving.md`), and take positions.
    """
    if limits.exact:
        return limits.rows
    power = 1 << (count - 1).bit_length()
    step = min(power, max(4, power // 8))
    return min(limits.rows, -(-count // step) * step)


def row_capacity(room: int, limits: Limits) -> int:
    """Capacity of a cache with room for `room` tokens."""
    return limits.capacity if limits.exact else capacity_bucket(room)


def _groups(decoding: Sequence[Work], reading: Sequence[Work], limits: Limits) -> tuple[Group, ...]:
    if not decoding:
        return ()
    left = limits.positions - sum(row_capacity(work.room(), limits) for work in reading)
    parts = _fitting(decoding, (), left, 1, limits) or [list(decoding)]
    return tuple(
        Group(
            tuple(work.number for work in _sorted(part)),
            batch_rows(len(part), limits),
            row_capacity(max(work.room(1) for work in part), limits),
        )
        for part in parts
    )


def _with_room(
    decoding: Sequence[Work], reading: Sequence[Work], limits: Limits
) -> tuple[list[Work], list[Work], list[Work]]:
    """The requests that go on decoding, that go on in prefill, and that are put aside to make room, newest first."""
    stay, read_on, aside = list(decoding), list(reading), []
    while len(stay) + len(read_on) > 1 and not _fits(stay, read_on, limits, ahead=1):
        newest = max([*stay, *read_on], key=lambda work: work.number)
        (stay if newest in stay else read_on).remove(newest)
        aside.append(newest)
    return stay, read_on, aside


def _fits(decoding: Sequence[Work], reading: Sequence[Work], limits: Limits, *, ahead: int = AHEAD) -> bool:
    """Whether there is memory for all of them to decode, beside the caches that prompts are read into."""
    everybody = [*decoding, *reading]
    longest = max((work.room(ahead) for work in everybody), default=0)
    if len(everybody) > limits.rows or longest > limits.capacity:
        return False
    if limits.exact:
        return (limits.rows + len(reading)) * limits.capacity <= limits.positions
    return _fitting(everybody, reading, limits.positions, ahead, limits) is not None


def _fitting(
    works: Sequence[Work], reading: Sequence[Work], positions: int, ahead: int, limits: Limits
) -> list[list[Work]] | None:
    """The fewest groups that fit in `positions`, each of works of similar length; `None` if no grouping fits."""
    if limits.exact or not works:
        return [list(works)]
    # Rows that are as long now, but not later, are cut apart too: 8 rows for 5 requests can take more than 4 and 1. And
    # a grouping that had room when its requests were admitted has room until they are longer.
    orders = [_by_length(works, room, limits) for room in sorted({ahead, max(ahead, AHEAD)})]
    for cuts in range(_MOST_GROUPS):
        groupings = [groups for by_length, steps in orders for groups in _cut(by_length, steps, cuts)]
        best = min(groupings, key=lambda groups: _positions(groups, reading, ahead, limits), default=None)
        if best is not None and _positions(best, reading, ahead, limits) <= positions:
            return best
    return None


def _by_length(works: Sequence[Work], ahead: int, limits: Limits) -> tuple[list[Work], list[int]]:
    """The works by the room that they ask for, and the places at which the capacity changes."""
    by_length = sorted(works, key=lambda work: work.room(ahead))
    capacities = [row_capacity(work.room(ahead), limits) for work in by_length]
    return by_length, [place for place, (one, after) in enumerate(pairwise(capacities), start=1) if one != after]


def _cut(works: list[Work], steps: Sequence[int], cuts: int) -> Iterator[list[list[Work]]]:
    for places in combinations(steps, cuts):
        yield [works[start:stop] for start, stop in pairwise((0, *places, len(works)))]


def _positions(groups: Sequence[Sequence[Work]], reading: Sequence[Work], ahead: int, limits: Limits) -> int:
    """Positions for these groups once all of them decode, and for the caches of those still in prefill."""
    total = 0
    for group in groups:
        own = [row_capacity(work.room(max(ahead, AHEAD)), limits) for work in group if work in reading]
        total += sum(own)
        # A row that decodes alone goes on in its prefill's cache.
        if len(group) > 1 or not own:
            total += batch_rows(len(group), limits) * row_capacity(max(work.room(ahead) for work in group), limits)
    return total


def _to_read(reading: Sequence[Work], passed_over: int) -> int | None:
    if not reading:
        return None
    oldest = min(reading, key=lambda work: work.number)
    if passed_over >= _PASSED_OVER:
        return oldest.number
    return min(reading, key=lambda work: (work.tokens - work.held, work.number)).number


def _sorted(works: Iterable[Work]) -> list[Work]:
    return sorted(works, key=lambda work: work.number)
