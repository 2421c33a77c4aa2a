"""Prefixes on disk: what is found is what was put, whatever happened to the process, the folder or the files."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.runtime.device import as_if
from dbrx_fn.serving import prefix_folder
from dbrx_fn.serving.prefix_store import PrefixStore
from tests.support.prefixes import CHUNK, CHUNK_BYTES, CONFIG, TEXTS, Naive, assert_holds, cache_of

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@contextmanager
def opened(folder: Path, fingerprint: str = "weights", config: Config = CONFIG, **given: Any) -> Iterator[PrefixStore]:
    """A store that keeps nothing in memory unless told so."""
    store = PrefixStore(config, fingerprint, chunk=CHUNK, folder=folder, **{"memory": 0, **given})
    try:
        yield store
    finally:
        store.close()


def put(folder: Path, *texts: list[int], **given: Any) -> None:
    """Puts texts, each by a process's life of its own."""
    for tokens in texts:
        with opened(folder, **given) as store:
            store.put(tokens, cache_of(tokens))


def found(folder: Path, tokens: list[int], **given: Any) -> int:
    """How many tokens are found, and that they are right."""
    with opened(folder, **given) as store:
        prefix = store.longest(tokens)
    assert_holds(prefix, tokens)
    return prefix.length


def files(folder: Path) -> list[Path]:
    """Chunks' files, the first used last."""
    return sorted(folder.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime_ns)


def file_size(folder: Path) -> int:
    put(folder, TOKENS)
    return files(folder)[0].stat().st_size


# Whole files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_process_finds_the_bits_that_were_put(dtype: Dtype, tmp_path: Path) -> None:
    config = replace(CONFIG, dtype=dtype)
    with opened(tmp_path, config=config) as store:
        store.put(TOKENS, cache_of(TOKENS, dtype=dtype, config=config))
    with opened(tmp_path, config=config) as store:
        prefix = store.longest(TOKENS)
        assert prefix.length == 8
        assert_holds(prefix, TOKENS, dtype)
        said = store.statistics()
    assert (said.hits, said.tokens, said.spoilt, said.memory_bytes) == (1, 8, 0, 0)
    assert said.disk_bytes == sum(file.stat().st_size for file in files(tmp_path))


def test_a_file_is_private_and_anybodys_tool_can_read_it(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    first, second = files(tmp_path)
    for file in (first, second):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with safe_open(first, framework="numpy") as read, safe_open(second, framework="numpy") as after:
        assert read.get_tensor("keys_and_values").shape == (4, 2, 4, 6)
        assert json.loads(read.metadata()["tokens"]) == [1, 2, 3, 4]
        assert json.loads(read.metadata()["dbrx_fn_prefix"])["fingerprint"] == "weights"
        assert after.metadata()["before"] == first.stem


def test_what_is_read_from_disk_stays_in_memory_as_far_as_there_is_room(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    with opened(tmp_path, memory=CHUNK_BYTES) as store:
        assert store.longest(TOKENS).length == 8
        assert store.statistics().memory_bytes == CHUNK_BYTES
        for file in files(tmp_path):
            file.unlink()
        prefix = store.longest(TOKENS)
        assert prefix.length == 4
        assert_holds(prefix, TOKENS)


def test_a_file_that_was_lost_is_written_again(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    files(tmp_path)[0].unlink()
    with opened(tmp_path) as store:
        # Opened without it, the store may write it at once; the next chunk is still right behind it.
        store.put(TOKENS, cache_of(TOKENS))
    assert found(tmp_path, TOKENS) == 8


def test_a_lookup_is_ready_without_waiting(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    with opened(tmp_path) as store:
        lookup = store.begin(TOKENS)
        deadline = time.monotonic() + 10
        while not lookup.is_ready:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert_holds(store.finish(lookup), TOKENS)


def test_a_lookup_finds_what_came_after_it_began() -> None:
    store = PrefixStore(CONFIG, "weights", chunk=CHUNK)
    lookup = store.begin(TOKENS)
    store.put(TOKENS, cache_of(TOKENS))
    prefix = store.finish(lookup)
    assert prefix.length == 8
    assert_holds(prefix, TOKENS)


def test_as_on_a_gpu_the_disk_gets_a_copy(tmp_path: Path) -> None:
    with as_if(backend="cuda"):
        put(tmp_path, TOKENS)
    assert found(tmp_path, TOKENS) == 8


def test_known_chunks_are_not_written_again(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    before = {file.name: file.stat().st_ino for file in files(tmp_path)}
    put(tmp_path, TOKENS, [*TOKENS[:8], 0, 0])
    assert {file.name: file.stat().st_ino for file in files(tmp_path)} == before


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), TEXTS), max_size=8), most=st.integers(0, 8))
def test_what_was_used_the_longest_ago_is_given_up_across_restarts(
    steps: list[tuple[bool, list[int]]], most: int
) -> None:
    """Each step opens the store anew; what it finds is what a naive store finds that is never closed."""
    naive = Naive(most)
    with TemporaryDirectory() as place:
        folder, bound = Path(place, "kept"), most * file_size(Path(place, "other")) + 7
        for is_put, tokens in steps:
            if is_put:
                put(folder, tokens, disk=bound)
                naive.put(tokens)
            else:
                assert found(folder, tokens, disk=bound) == naive.longest(tokens)
            assert len(files(folder)) == len(naive.used)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "find", "restart"]), TEXTS), max_size=10),
    chunks_in_memory=st.integers(0, 8),
    chunks_on_disk=st.integers(0, 8),
    data=st.data(),
)
def test_bounds_hold_at_any_time_and_what_is_found_is_right(
    steps: list[tuple[str, list[int]]], chunks_in_memory: int, chunks_on_disk: int, data: st.DataObject
) -> None:
    with TemporaryDirectory() as place:
        folder, memory = Path(place, "kept"), chunks_in_memory * CHUNK_BYTES
        disk = chunks_on_disk * file_size(Path(place, "other"))
        store = PrefixStore(CONFIG, "weights", chunk=CHUNK, memory=memory, folder=folder, disk=disk)
        for step, tokens in steps:
            if step == "put":
                store.put(tokens, cache_of(tokens))
                while data.draw(st.booleans()) and store.write_some():
                    pass
            elif step == "find":
                assert_holds(store.longest(tokens), tokens)
            else:
                store.close()
                store = PrefixStore(CONFIG, "weights", chunk=CHUNK, memory=memory, folder=folder, disk=disk)
            said = store.statistics()
            assert said.memory_bytes <= memory
            assert said.disk_bytes <= disk
            assert said.spoilt == 0
        store.close()
        assert sum(file.stat().st_size for file in files(folder)) <= disk


def test_a_lower_bound_is_kept_from_the_start(tmp_path: Path) -> None:
    size = file_size(tmp_path)
    put(tmp_path, [0] * 12)
    assert len(files(tmp_path)) == 5
    with opened(tmp_path, disk=3 * size) as store:
        assert store.statistics().disk_bytes == 3 * size
    assert found(tmp_path, [0] * 13) == 12
    assert found(tmp_path, TOKENS) == 0


# Files that are not what they were


def test_damage_anywhere_is_a_miss_and_the_file_is_removed(tmp_path: Path) -> None:
    # A folder that is left empty is removed.
    (tmp_path / "another file").touch()
    put(tmp_path, TOKENS[:5])
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    damaged = [
        whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :] for place in range(len(whole))
    ]
    damaged += [whole[:size] for size in range(0, len(whole), 7)] + [whole[:-1], whole + b"\0", whole * 2]
    for content in damaged:
        file.write_bytes(content)
        with opened(tmp_path) as store:
            assert store.longest(TOKENS[:5]).length == 0
            assert store.statistics().spoilt == 1
        assert not file.exists()
    file.write_bytes(whole)
    assert found(tmp_path, TOKENS[:5]) == 4


def test_a_file_of_another_text_or_model_is_a_miss(tmp_path: Path) -> None:
    put(tmp_path, TOKENS)
    (first, second), mine = files(tmp_path), tmp_path / "mine"
    put(mine, [0] * 4)
    put(mine, TOKENS, fingerprint="other weights")
    for stranger in (second, *files(mine)):
        put(tmp_path, TOKENS)
        first.write_bytes(stranger.read_bytes())
        assert found(tmp_path, TOKENS) == 0
        assert not first.exists()
    assert found(tmp_path, TOKENS, fingerprint="other weights") == 0


@pytest.mark.parametrize("make", [os.symlink, lambda _, file: os.mkfifo(file), lambda _, file: os.mkdir(file)])
def test_what_is_no_regular_file_is_a_miss_and_not_followed(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    put(folder, TOKENS)
    first, second = files(folder)
    content = first.read_bytes()
    # While a store is open, and before it is opened.
    with opened(folder) as store:
        first.rename(elsewhere)
        make(elsewhere, first)
        assert store.longest(TOKENS).length == 0
    second.unlink()
    if not os.path.lexists(first):
        make(elsewhere, first)
    assert found(folder, TOKENS) == 0
    assert elsewhere.read_bytes() == content
    put(folder, [0] * 4)
    assert found(folder, [0] * 5) == 4


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    names = ["notes.txt", "model.safetensors", f".{'0' * 63}.safetensors.unfinished", f"{'A' * 64}.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".{'0' * 64}.safetensors.unfinished").write_text("left by a killed process")
    put(tmp_path, TOKENS, disk=10)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


# Folders


def test_a_second_store_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "kept") as store:
        with pytest.raises(InputError, match=r"kept keeps the prefixes of another process: wait until it ends, or"):
            PrefixStore(CONFIG, "weights", folder=tmp_path / "kept")
        store.put(TOKENS, cache_of(TOKENS))
    assert found(tmp_path / "kept", TOKENS) == 8


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "file/within"):
        with pytest.raises(InputError, match=name):
            PrefixStore(CONFIG, "weights", folder=tmp_path / name)


def test_a_full_disk_is_told_once_and_memory_goes_on(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with opened(tmp_path / "kept", memory=2**20) as store:
                store.put(TOKENS, cache_of(TOKENS))
                while store.write_some() or store.statistics().dropped < 2:
                    pass
                assert store.longest(TOKENS).length == 8
                assert store.statistics().disk_bytes == 0
                assert not list((tmp_path / "kept").iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(told) == 1
    assert "can't be written (File too large), so new prefixes are kept in memory alone" in str(told[0].message)


def test_what_is_offered_too_fast_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = file_size(tmp_path / "other")
    monkeypatch.setattr(prefix_folder, "_MOST_WAITING", 2 * size)
    with opened(tmp_path) as store:
        store.put([0] * 16, cache_of([0] * 16))
        assert store.statistics().dropped == 1
    assert found(tmp_path, [0] * 17) == 8
    put(tmp_path, [0] * 16)
    assert found(tmp_path, [0] * 17) == 16


def test_what_was_not_handed_over_can_be_withdrawn(tmp_path: Path) -> None:
    with opened(tmp_path, memory=2**20) as store:
        store.put(TOKENS, cache_of(TOKENS))
        store.write_some()
        store.forget_memory()
        assert store.statistics().memory_bytes == 0
        assert not store.write_some()
    assert found(tmp_path, TOKENS) == 4
    with opened(tmp_path) as store:
        store.put(TOKENS, cache_of(TOKENS))
        store.forget_memory()
        store.put(TOKENS, cache_of(TOKENS))
    assert found(tmp_path, TOKENS) == 8


# Processes that are killed


def test_a_process_killed_at_any_moment_leaves_whole_chunks(tmp_path: Path) -> None:
    operations = [*range(1, 13), *range(15, 100, 7)]
    command = [sys.executable, "-m", "tests.support.put_and_be_killed", str(tmp_path), *map(str, operations)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [status for status, _, _, _ in told] == [-signal.SIGKILL] * len(operations), told
    assert [status for _, _, status, _ in told] == [0] * len(operations), told
    assert max(int(count) for _, _, _, count in told) >= 8
