"""Many clients of all kinds at once wear nothing out."""

import asyncio
import sys

import pytest

from tests.support.server_process import server_process
from tests.support.soak_server import ALLOCATOR, OPTIONS, soak


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_whatever_clients_do_each_is_answered_rightly_and_nothing_stays_held() -> None:
    with server_process(*OPTIONS, **ALLOCATOR) as server:
        outcome = asyncio.run(soak(server, 150))
        assert server.process.poll() is None
    assert outcome["answered"] > 50
    assert outcome["refused"] + outcome["left"] > 20
