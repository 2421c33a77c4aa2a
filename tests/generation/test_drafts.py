"""Drafts that are looked up in the text, and the decision to verify them."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_fn.generation.drafts import Drafter, Ngrams, Pace
from dbrx_fn.runtime.device import as_if

TEXTS = st.lists(st.integers(0, 2), max_size=90)


def looked_up(text: Sequence[int], count: int) -> list[int]:
    """What followed the last time that the text's last 16 or 4 tokens occurred, by looking at every place."""
    for size in (16, 4):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[len(text) - size :]:
                longer = list(text)
                while len(longer) < start + size + count:
                    longer.append(longer[start + size + len(longer) - len(text)])
                return longer[start + size :][:count]
    return []


@given(text=TEXTS, count=st.integers(1, 40))
def test_a_draft_is_what_followed_last_time(text: list[int], count: int) -> None:
    assert Ngrams(text).draft(count) == looked_up(text, count)


@given(text=TEXTS, more=TEXTS)
def test_a_text_may_come_in_any_pieces(text: list[int], more: list[int]) -> None:
    pushed = Ngrams(text)
    for token in more:
        pushed.push(token)
    assert pushed.draft(9) == Ngrams(text + more).draft(9)


def test_a_text_that_repeats_itself_is_drafted_on() -> None:
    assert Ngrams([1, 2, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]


def pace(right: Sequence[bool], **seconds: float) -> Pace:
    """A pace that has seen these comparisons and these times of passes, each thrice."""
    made = Pace((8, 16, 32))
    for one in right:
        made.compare(one)
    for width, time in seconds.items():
        for _ in range(3):
            made.note_time(int(width.removeprefix("of_")), time)
    return made


ALWAYS = [True] * 60


@pytest.mark.parametrize(
    ("made", "width"),
    [
        (pace(ALWAYS), 1),
        (pace([], of_1=1), 1),
        (pace([False] * 60, of_1=1), 1),
        (pace([True, False] * 30, of_1=1), 1),
        (pace(ALWAYS, of_1=1), 32),
        (pace(ALWAYS, of_1=1, of_32=40), 16),
        (pace(ALWAYS, of_1=1, of_32=40, of_16=20, of_8=3), 8),
        (pace(ALWAYS, of_1=1, of_32=40, of_16=20, of_8=9), 1),
        (pace([*ALWAYS, False, False], of_1=1, of_8=1.5, of_16=3, of_32=5), 8),
        (pace([*ALWAYS, *[False] * 12], of_1=1), 1),
        (pace([*[False] * 60, *[True] * 80], of_1=1), 32),
    ],
    ids=[
        "nothing is timed",
        "nothing is compared",
        "never right",
        "right half of the time",
        "always right",
        "the widest is slow",
        "and the next",
        "all are slow",
        "less sure",
        "no longer right",
        "right since lately",
    ],
)
def test_the_pass_that_gives_most_tokens_per_second_is_taken(made: Pace, width: int) -> None:
    assert made.width(1000) == width


def test_no_wide_pass_is_taken_for_few_tokens() -> None:
    made = pace(ALWAYS, of_1=1, of_8=3, of_16=3.5, of_32=4.5)
    assert [made.width(left) for left in (1, 2, 3, 4, 9, 14, 40)] == [1, 1, 1, 8, 8, 16, 32]


def test_a_machine_that_reads_wide_passes_fast_tries_them_sooner() -> None:
    widths = []
    for machine in ("cpu", "cuda"):
        with as_if(backend=machine):
            widths.append(pace([True] * 8, of_1=1).width(1000))
    assert widths[0] == 1 < widths[1]


def test_drafts_are_compared_before_any_is_verified() -> None:
    drafter = Drafter((8,), [])
    for width, seconds in ((1, 1), (1, 1), (8, 3)):
        drafter.pace.note_time(width, seconds)
    widths = []
    for place in range(60):
        drafter.push(place % 10)
        widths.append(drafter.width(1000))
    first = widths.index(8)
    assert 13 < first < 26
    assert set(widths[first:]) == {8}
    assert drafter.draft(7) == [0, 1, 2, 3, 4, 5, 6]


@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=80), prompt=TEXTS)
def test_a_draft_is_as_long_as_the_pass_needs(text: list[int], prompt: list[int]) -> None:
    drafter = Drafter((8, 32), prompt)
    for _ in range(2):
        drafter.pace.note_time(1, 1)
    for token in text:
        drafter.push(token)
        width = drafter.width(1000)
        assert width == 1 or len(drafter.draft(width - 1)) == width - 1
