"""Processes that put prefixes into a folder and are killed, and after each one that looks at what it finds there.

All are forked off this one, which computes nothing. Arguments: the folder, and before which file operations to kill.
Prints a JSON list: of each killed process its status, and what the next one says: chunks found, or what is wrong.
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from dbrx_fn.serving.prefix_store import PrefixStore
from tests.support.prefixes import CHUNK, CONFIG, assert_holds, cache_of

MOST = 20_000
"""Bytes of the folder: some ten chunks, so that writing one means giving up others."""

TEXTS = [[family, *([family, number] * 9)] for family in range(3) for number in range(3)]
_CHANGES = {"open", "write", "flush", "utime", "rename", "unlink"}
"""Calls of the thread that writes, before one of which it is killed."""


def opened(folder: Path) -> PrefixStore:
    return PrefixStore(CONFIG, "weights", chunk=CHUNK, memory=0, folder=folder, disk=MOST)


def put(folder: Path, operation: int) -> str:
    """Is killed before this file operation."""
    count = 0

    def profile(_: object, event: str, called: object) -> None:
        nonlocal count
        if event == "c_call" and getattr(called, "__name__", None) in _CHANGES:
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    # It is told of each call in threads that start from now on, before the call.
    threading.setprofile(profile)
    texts = random.Random(operation).choices(TEXTS, k=12)
    store = opened(folder)
    for tokens in texts:
        store.put(tokens, cache_of(tokens))
        while store.write_some():
            pass
    store.close()
    return f"not killed within {count} operations"


def look(folder: Path, _: int) -> str:
    """Chunks found, each compared with what was put."""
    store, found = opened(folder), 0
    for tokens in TEXTS:
        prefix = store.longest(tokens)
        assert_holds(prefix, tokens)
        found += len(prefix.chunks)
    assert store.statistics().spoilt == 0
    files = list(folder.iterdir())
    assert all(not file.name.startswith(".") for file in files)
    assert sum(file.stat().st_size for file in files) == store.statistics().disk_bytes <= MOST
    store.close()
    return str(found)


def forked(task: Callable[[Path, int], str], folder: Path, operation: int) -> tuple[int, str]:
    """Status and result of a task in a process of its own."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writes, task(folder, operation).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writes)
    with open(reads) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


if __name__ == "__main__":
    place = Path(sys.argv[1])
    told = []
    for number in map(int, sys.argv[2:]):
        killed, why = forked(put, place, number)
        told.append((killed, why, *forked(look, place, 0)))
    print(json.dumps(told))
