"""`Batches` and `eval_windows`."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dbrx_fn.data.batches import Batches, eval_windows
from dbrx_fn.data.token_file import TokenFile
from dbrx_fn.errors import InputError

SHAPES = {
    "length": st.integers(2, 70),
    "batch_size": st.integers(1, 5),
    "sequence_length": st.integers(1, 20),
    "seed": st.integers(0, 2**64),
}


def stream(length: int, targets: np.ndarray[Any, Any] | None = None) -> TokenFile:
    """Tokens that are their own places, but for the last, which is the first one again."""
    tokens: Any = np.arange(length, dtype=np.uint16)
    tokens[-1] = 0
    masks: Any = targets
    return TokenFile(tokens, masks, 0, 0, 1, "")


def epoch(batches: Batches, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An epoch's windows in order, whatever batches they are in."""
    first, last = number * batches.windows, (number + 1) * batches.windows
    rows = [
        (tokens, mask)
        for step in range(first // batches.batch_size, -(-last // batches.batch_size))
        for tokens, mask in zip(*batches[step], strict=True)
    ]
    start = first % batches.batch_size
    tokens, masks = zip(*rows[start : start + batches.windows], strict=True)
    return np.stack(tokens), np.stack(masks)


@given(number=st.integers(0, 5), **SHAPES)
def test_every_token_is_predicted_once_an_epoch(
    length: int, batch_size: int, sequence_length: int, seed: int, number: int
) -> None:
    assume(length > sequence_length)
    tokens, mask = epoch(Batches(stream(length), batch_size, sequence_length, seed), number)
    assert not mask[:, 0].any()
    # Each token but the first (which is the last one too), each from the one that stands before it.
    pairs = zip(tokens[:, :-1][mask[:, 1:]].tolist(), tokens[:, 1:][mask[:, 1:]].tolist(), strict=True)
    ring = length - 1
    assert sorted(pairs) == sorted((place, (place + 1) % ring) for place in range(ring))
    # One window at the most is short of targets.
    assert (mask[:, 1:].sum(1) < sequence_length).sum() <= 1


@given(number=st.integers(0, 3), data=st.data(), **SHAPES)
def test_masked_tokens_are_never_targets(
    length: int, batch_size: int, sequence_length: int, seed: int, number: int, data: st.DataObject
) -> None:
    assume(length > sequence_length)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    targets[0] = False
    tokens, mask = epoch(Batches(stream(length, targets), batch_size, sequence_length, seed), number)
    wanted = [place % (length - 1) for place in np.flatnonzero(targets)]
    assert sorted(tokens[mask].tolist()) == sorted(wanted)
    rows = list(eval_windows(stream(length, targets), batch_size, sequence_length))
    assert [token for tokens, mask, _ in rows for token in tokens[mask].tolist()] == wanted


@given(steps=st.lists(st.integers(0, 30), min_size=1, max_size=8), **SHAPES)
def test_batches_depend_on_seed_and_number_only(
    length: int, batch_size: int, sequence_length: int, seed: int, steps: list[int]
) -> None:
    assume(length > sequence_length)
    one = Batches(stream(length), batch_size, sequence_length, seed)
    in_order = [one[step] for step in range(max(steps) + 1)]
    for step in steps:
        tokens, mask = Batches(stream(length), batch_size, sequence_length, seed)[step]
        assert [tokens.dtype.name, mask.dtype.name] == ["int32", "bool"]
        assert tokens.shape == mask.shape == (batch_size, sequence_length + 1)
        assert np.array_equal(tokens, in_order[step][0])
        assert np.array_equal(mask, in_order[step][1])


def test_epochs_and_seeds_differ_in_order_and_cuts() -> None:
    cuts, orders = set(), set()
    for seed in range(3):
        batches = Batches(stream(1001), 8, 10, seed)
        assert batches.windows == 100
        assert batches.epochs(25) == 2.0
        for number in range(4):
            starts = epoch(batches, number)[0][:, 0]
            shift = set((starts % 10).tolist())
            assert len(shift) == 1
            cuts |= shift
            orders.add(tuple((starts // 10).tolist()))
            # A permutation keeps about one place, not its neighbours' order.
            assert Counter(np.diff(starts).tolist())[10] < 10
    assert len(orders) == 12
    assert len(cuts) > 5


def test_other_processes_make_the_same_batches() -> None:
    """Nor does it change with this code: a run that was saved resumes with what it would have seen."""
    batches = Batches(stream(500), 3, 16, 7)
    rows = [batches[step][0][:, 0].tolist() for step in (0, 5, 23)]
    assert rows == [[91, 8, 379], [475, 219, 459], [460, 92, 492]]
    code = (
        "from tests.data.test_batches import stream; from dbrx_fn.data.batches import Batches\n"
        "batches = Batches(stream(500), 3, 16, 7); print([batches[step][0][:, 0].tolist() for step in (23, 5, 0)])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert ended.stdout == f"{rows[::-1]}\n"


@given(**{name: shape for name, shape in SHAPES.items() if name != "seed"})
def test_eval_windows_cover_the_text_once(length: int, batch_size: int, sequence_length: int) -> None:
    rows = list(eval_windows(stream(length), batch_size, sequence_length))
    assert len(rows) == -(-(length - 1) // (batch_size * sequence_length))
    seen: list[tuple[int, int]] = []
    for tokens, mask, lengths in rows:
        assert [tokens.dtype.name, mask.dtype.name, lengths.dtype.name] == ["int32", "bool", "int32"]
        assert tokens.shape == mask.shape == (batch_size, sequence_length + 1)
        assert 0 < lengths.max() <= sequence_length
        expected = (np.arange(sequence_length + 1) > 0) & (np.arange(sequence_length + 1) <= lengths[:, None])
        assert np.array_equal(mask, expected)
        assert (tokens[:, 1:][~mask[:, 1:]] == 0).all()
        seen += zip(tokens[:, :-1][mask[:, 1:]].tolist(), tokens[:, 1:][mask[:, 1:]].tolist(), strict=True)
    assert seen == [(place, (place + 1) % (length - 1)) for place in range(length - 1)]


def test_what_cannot_be_cut() -> None:
    Batches(stream(11), 1, 10, 0)
    with pytest.raises(InputError, match=r"makes 10 tokens where one sequence of 10 needs 11: .* at most 9\.$"):
        Batches(stream(10), 1, 10, 0)
    for sizes in ((0, 10, 0), (1, 0, 0), (1, 10, -1)):
        with pytest.raises(InputError, match=r"is (0|-1) where .* is expected\.$"):
            Batches(stream(100), *sizes)
    for batch_size, sequence_length in ((0, 10), (1, 0)):
        with pytest.raises(InputError, match="is 0 where at least 1 is expected"):
            eval_windows(stream(100), batch_size, sequence_length)
    with pytest.raises(IndexError, match="step is -1"):
        Batches(stream(100), 1, 10, 0)[-1]
