"""The schedule, without a model: memory is kept, everybody is served, the oldest first."""

from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.schedule import AHEAD, Group, State, Work, batch_rows, never_fits, plan, row_capacity

CHUNK = 512
FAST = Limits(rows=8, positions=16_384, capacity=8192)
EXACT = Limits(rows=4, positions=6 * 2048, capacity=2048, exact=True)


class Run:
    """Requests that an imagined engine serves: a chunk and a token a step, without a model."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.state, self.made = limits, State(), dict[int, int]()
        self.begun: list[int] = []
        self.finished: list[int] = []

    def add(self, number: int, tokens: int, longest: int) -> None:
        self.state = replace(self.state, waiting=(*self.state.waiting, Work(number, 0, tokens, longest)))

    def step(self) -> Any:
        """One step as planned, and what was planned."""
        state = self.state
        step = plan(state, self.limits)
        works = {work.number: work for work in (*state.waiting, *state.reading, *state.decoding)}
        waiting = {work.number for work in state.waiting} - {*step.admitted} | {*step.put_aside}
        reading = {work.number for work in state.reading} - {*step.put_aside} | {*step.admitted}
        decoding = {work.number for work in state.decoding} - {*step.put_aside}
        for number in step.put_aside:
            works[number] = replace(works[number], tokens=max(works[number].held, works[number].tokens), held=0)
        passed = state.passed_over
        if step.read is not None:
            work = works[step.read]
            passed = 0 if step.read == min(reading) else passed + 1
            works[step.read] = work = replace(work, held=min(work.held + CHUNK, work.tokens))
            self.begun += [step.read] if step.read not in self.begun else []
        for number in decoding:
            works[number] = replace(works[number], held=works[number].held + 1)
        for number in [number for number in reading if works[number].held == works[number].tokens]:
            reading.remove(number)
            decoding.add(number)
        for number in [number for number in decoding if works[number].held >= works[number].longest]:
            decoding.remove(number)
            self.finished.append(number)

        def those(numbers: set[int]) -> tuple[Work, ...]:
            return tuple(works[number] for number in sorted(numbers))

        self.state = State(those(waiting), those(reading), those(decoding), passed)
        return step


requests = st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 900)), min_size=1, max_size=25)


@settings(max_examples=60)
@given(requests=requests, exact=st.booleans())
# Five texts of one length and a long one fit as batches of 4, 1 and 1 rows, and not as 8 and 1.
@example(requests=[(338, 175), (339, 174), (340, 173), (599, 426), (599, 169), (3936, 161), (1, 1)], exact=False)
def test_everybody_is_served_and_memory_is_kept(requests: list[tuple[int, int]], exact: bool) -> None:
    limits = EXACT if exact else FAST
    run = Run(limits)
    served = []
    for number, (tokens, more) in enumerate(requests):
        if not never_fits(tokens, tokens + more, limits):
            run.add(number, tokens, tokens + more)
            served.append(number)
    for _ in range(60_000):
        if len(run.finished) == len(served):
            break
        step = run.step()
        aside = {*step.put_aside}
        rows = [work for work in run.state.decoding if work.number not in aside]
        readers = [work for work in run.state.reading if work.number not in aside]
        assert len(rows) + len(readers) <= limits.rows
        if exact:
            assert [(group.rows, group.capacity) for group in step.groups] in ([], [(4, 2048)])
            assert not step.put_aside
        elif len(rows) + len(readers) > 1:
            own = sum(row_capacity(work.room(), limits) for work in readers)
            assert sum(group.rows * group.capacity for group in step.groups) + own <= limits.positions
    assert sorted(run.finished) == served


def test_requests_begin_in_the_order_of_arrival() -> None:
    run = Run(FAST)
    for number in range(20):
        run.add(number, 100, 150)
    while run.state.waiting or run.state.reading:
        run.step()
    assert run.begun == sorted(run.begun)


def test_a_short_prompt_is_read_before_a_long_one_that_came_first() -> None:
    run = Run(replace(FAST, positions=1 << 20))
    run.add(0, 6000, 6100)
    run.step()
    run.add(1, 40, 90)
    assert run.step().read == 1


def test_a_long_prompt_is_read_though_short_ones_keep_coming() -> None:
    run = Run(replace(FAST, positions=1 << 20, rows=64))
    run.add(0, 6000, 6100)
    for number in range(1, 60):
        run.add(number, 40, 60)
        run.step()
    assert run.state.decoding[0].number == 0


def test_the_newest_is_put_aside_when_nobody_can_grow() -> None:
    old, new = Work(0, 1023, 900, 4000), Work(1, 1024, 900, 4000)
    step = plan(State(decoding=(old, new)), replace(FAST, positions=2 * 1024))
    assert step.put_aside == (1,)
    assert step.groups == (Group((0,), 1, 1024),)


def test_what_never_fits_is_known_at_once() -> None:
    assert never_fits(9000, 9100, FAST)
    assert not never_fits(8000, 8192, FAST)
    assert never_fits(3000, 8192, replace(FAST, positions=4096))
    assert not never_fits(2000, 2048, EXACT)
    assert never_fits(2000, 2049, EXACT)


@given(count=st.integers(1, 256), most=st.integers(1, 256))
def test_there_are_few_batches_and_few_idle_rows(count: int, most: int) -> None:
    limits = replace(FAST, rows=max(count, most))
    assert count <= batch_rows(count, limits) <= limits.rows
    assert count <= 8 or batch_rows(count, limits) <= 4 / 3 * count
    assert len({batch_rows(each, limits) for each in range(1, limits.rows + 1)}) <= 23
    assert batch_rows(min(count, 4), EXACT) == 4


def test_an_engine_that_has_nothing_to_do_does_nothing() -> None:
    step = plan(State(), FAST)
    assert (step.put_aside, step.admitted, step.read, step.groups) == ((), (), None, ())


def test_a_batch_has_room_for_the_next_token_of_each_row() -> None:
    step = plan(State(decoding=(Work(0, 256, 10, 999),)), FAST)
    assert step.groups[0].capacity == capacity_bucket(257) == 512
    assert AHEAD == 256


def test_a_long_text_decodes_beside_short_ones_where_one_batch_would_not_fit() -> None:
    short = tuple(Work(number, 300, 290, 400) for number in range(7))
    long = Work(7, 5000, 4990, 6000)
    one_batch, apart = 8 * 8192, 8 * 512 + 8192
    together = plan(State(decoding=(*short, long)), replace(FAST, positions=one_batch))
    assert together.groups == (Group(tuple(range(8)), 8, 8192),)
    step = plan(State(decoding=(*short, long)), replace(FAST, positions=apart))
    assert step.groups == (Group(tuple(range(7)), 8, 512), Group((7,), 1, 8192))
    assert plan(State(decoding=(*short, long)), replace(FAST, positions=apart - 1)).put_aside == (7,)


def test_a_long_prompt_is_admitted_beside_those_who_decode() -> None:
    """It decodes in the cache that it is read into, so it needs no second one."""
    short = tuple(Work(number, 300, 290, 400) for number in range(7))
    long = Work(7, 0, 5000, 6000)
    limits = replace(FAST, positions=8 * 512 + 8192)
    assert plan(State(waiting=(long,), decoding=short), limits).admitted == (7,)
    assert not plan(State(waiting=(long,), decoding=short), replace(limits, positions=limits.positions - 1)).admitted
