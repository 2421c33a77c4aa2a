"""The channel between a command's processes. What follows a process's death is in `tests/commands`."""

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.errors import InputError
from dbrx_fn.runtime.group import Group, group, joined

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def pair() -> tuple[Group, Group]:
    """A leader and another, over a real connection. Their threads last as long as this process."""
    one, other = socket.socketpair()
    return Group(0, 2, {1: one}), Group(1, 2, {0: other})


@given(values=st.lists(json_values, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_leader_s_values_reach_the_other_in_order(values: list[Any], pair: tuple[Group, Group]) -> None:
    leader, other = pair
    assert [leader.share(value) for value in values] == values
    assert [other.share("its own") for _ in values] == values


def test_a_single_process_shares_with_nobody() -> None:
    with joined() as alone:
        assert alone is group()
        assert (alone.rank, alone.size, alone.leads) == (0, 1, True)
        assert alone.share([1]) == [1]
        alone.refuse_others("This")
        alone.finish()


def test_what_several_processes_cannot_do_is_refused(pair: tuple[Group, Group]) -> None:
    for one in pair:
        with pytest.raises(InputError, match=r"^This is for one process, and 2 run here: start it without mlx\.launch"):
            one.refuse_others("This")


def test_the_environment_of_a_single_process_joins_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # What mlx.launch -n 1 sets.
    hosts = tmp_path_factory.mktemp("hosts") / "hosts.json"
    hosts.write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    with joined() as alone:
        assert alone.size == 1


def test_a_group_that_cannot_meet_is_an_error_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hosts = tmp_path_factory.mktemp("hosts") / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_RANK", "7")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    with pytest.raises(InputError, match=r"^The processes that mlx\.launch started can't reach each other"), joined():
        pass
