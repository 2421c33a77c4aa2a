"""What is asked of a Mac's memory: before, during and after all that runs a model, however it ends."""

import contextvars
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

import dbrx_fn.generation.stream
import dbrx_fn.runs.loop
import dbrx_fn.runtime.memory
from dbrx_fn import train
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.data.token_file import read_token_file
from dbrx_fn.errors import CacheError, CheckpointError, DbrxError, GenerationError, InputError
from dbrx_fn.evaluation.comparison import Model, compare
from dbrx_fn.evaluation.perplexity import evaluate
from dbrx_fn.generation.stream import stream_text, stream_tokens
from dbrx_fn.model.cache import grow_cache, init_cache
from dbrx_fn.model.cache_rows import take_rows
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import Backend, as_if, memory_size, pool_size
from dbrx_fn.runtime.memory import check_buffer, limited, reading_device, room_remedy, wired
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.request import Request
from dbrx_fn.training.step import train_step
from tests.support import tiny_runs, trees
from tests.support.mac import BEFORE, GIB, Mac

CASE, _ = trees.random_case(0)
CONFIG, PARAMS = replace(CASE.config, max_seq_len=2048), CASE.params


def nbytes(params: Params) -> int:
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    return sum(leaf.nbytes for leaf in leaves.values())


NBYTES = nbytes(PARAMS)
PROMPT = [1, 2, 3]


@pytest.fixture
def mac() -> Iterator[Mac]:
    """One for which the model is large, but not too large."""
    with Mac(2 * NBYTES).here() as mac:
        yield mac


def given_back(mac: Mac) -> bool:
    """Whether the limit was raised once, and given back once the device had ended its work."""
    calls = [call for call in mac.calls if call != "clear_cache"]
    return calls == [mac.working_set, "synchronize", BEFORE] and mac.limit == BEFORE


def tokens(count: int = 8, **options: Any) -> Iterator[int]:
    return stream_tokens(PARAMS, CONFIG, PROMPT, max_tokens=count, **options)


def test_memory_is_wired_while_text_is_made(mac: Mac) -> None:
    stream = tokens()
    assert not mac.calls
    for _ in range(8):
        next(stream)
        assert mac.limit == mac.working_set
    assert next(stream, None) is None
    assert given_back(mac)


def test_a_stop_token_gives_it_back(mac: Mac) -> None:
    first = next(tokens())
    mac.calls.clear()
    assert list(tokens(stop_tokens=[first])) == [first]
    assert given_back(mac)


@pytest.mark.parametrize("end", [lambda stream: stream.close(), lambda stream: None], ids=["closed", "dropped"])
def test_a_stream_that_is_left_gives_it_back(mac: Mac, end: Callable[[Any], None]) -> None:
    stream = tokens()
    next(stream)
    end(stream)
    del stream
    gc.collect()
    assert given_back(mac)


def test_a_text_that_is_left_gives_it_back() -> None:
    params, config = load(SMALL)
    with Mac(nbytes(params)).here() as mac:
        with pytest.warns(UserWarning, match="quantization"):
            next(text := stream_text(params, config, load_tokenizer(SMALL), "Once", max_tokens=5))
        assert mac.limit == mac.working_set
        del text
        gc.collect()
        assert given_back(mac)


def test_an_error_gives_it_back(mac: Mac) -> None:
    broken = tree_map(lambda leaf: leaf * mx.nan, PARAMS)
    with pytest.raises(GenerationError):
        list(stream_tokens(broken, CONFIG, PROMPT))
    assert given_back(mac)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_ctrl_c_while_a_token_is_computed_gives_it_back(mac: Mac, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **options)

    monkeypatch.setattr(dbrx_fn.generation.stream, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(tokens())
    assert given_back(mac)


def test_ctrl_c_between_tokens_gives_it_back(mac: Mac) -> None:
    def use() -> None:
        for _ in tokens():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        use()
    gc.collect()
    assert given_back(mac)


def test_ctrl_c_once_more_while_the_device_ends_its_work_gives_it_back(
    mac: Mac, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "synchronize", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(tokens())
    assert mac.calls == [mac.working_set, BEFORE]


def test_texts_that_overlap_share_it_until_the_last_ends(mac: Mac) -> None:
    one, other = tokens(3), tokens(6)
    next(one)
    next(other)
    assert len(list(one)) == 2
    assert mac.limit == mac.working_set
    assert len(list(other)) == 5
    assert mac.calls == [mac.working_set, "synchronize", "synchronize", BEFORE]


def test_threads_share_it_until_the_last_ends(mac: Mac) -> None:
    barrier = threading.Barrier(4)

    def use() -> None:
        stream = tokens(4)
        next(stream)
        barrier.wait()
        assert mac.limit == mac.working_set
        list(stream)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(use,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [call for call in mac.calls if call != "synchronize"] == [mac.working_set, BEFORE]
    assert mac.calls[-1] == BEFORE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, with a checkpoint after each and a held-out text."""
    folder = tmp_path_factory.mktemp("run")
    config, data = tiny_runs.write_config(folder / "config.json"), tiny_runs.write_text(folder / "text.txt")
    assert train.main(run_arguments(folder / "run", config, data, steps=2)) == 0
    return folder / "run"


def run_arguments(out: Path, config: Path, data: Path, **options: Any) -> list[str]:
    return tiny_runs.arguments(out, config, [data], **{"save_every": 1, "held_out_share": 0.2, **options})


@pytest.fixture
def mac_of_run() -> Iterator[Mac]:
    """One for which the tiny run's state is large: 0.3 MB."""
    with Mac(10**6).here() as mac:
        yield mac


def test_memory_is_wired_while_a_model_is_trained(mac_of_run: Mac, tmp_path: Path) -> None:
    config, data = tiny_runs.write_config(tmp_path / "config.json"), tiny_runs.write_text(tmp_path / "text.txt")
    assert train.main(run_arguments(tmp_path / "run", config, data)) == 0
    waited = [call for call in mac_of_run.calls if call != "clear_cache"]
    # What the run will take is measured before. The evaluation at the end is one more use within.
    assert waited[waited.index(10**6) :] == [10**6, "synchronize", "synchronize", BEFORE]


@pytest.mark.parametrize("ends_by", ["Ctrl-C", "an error", "Ctrl-C at once"])
def test_training_that_is_ended_gives_it_back(
    ends_by: str, mac_of_run: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def ended(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            if ends_by == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            else:
                raise KeyboardInterrupt if ends_by == "Ctrl-C at once" else GenerationError("It ends.")
        return train_step(*arguments, **options)

    monkeypatch.setattr(dbrx_fn.runs.loop, "train_step", ended)
    config, data = tiny_runs.write_config(tmp_path / "config.json"), tiny_runs.write_text(tmp_path / "text.txt")
    status = train.main(run_arguments(tmp_path / "run", config, data))
    assert status == (2 if ends_by == "an error" else 130)
    assert steps == 2
    assert 10**6 in mac_of_run.calls
    assert mac_of_run.calls[-2:] == ["synchronize", BEFORE]


def test_memory_is_wired_while_a_text_is_scored(mac_of_run: Mac, run: Path) -> None:
    params, config = load(run / "model")
    file = read_token_file(run / "data" / "held_out")
    evaluate(params, config, file, batch_size=4, sequence_length=16)
    assert given_back(mac_of_run)
    mac_of_run.calls.clear()
    compare(Model(params, config), [Model(params, config)], file, batch_size=4, sequence_length=16)
    assert given_back(mac_of_run)


def test_memory_is_wired_as_long_as_an_engine_is_open(mac: Mac) -> None:
    with Engine(PARAMS, CONFIG, Limits(rows=2, positions=4096, capacity=1024)) as engine:
        assert len(list(engine.answer(Request(tuple(PROMPT), max_tokens=4)))) == 4
        assert mac.limit == mac.working_set
    assert given_back(mac)


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_other_machines_are_let_be(mac: Mac, machine: Backend) -> None:
    with as_if(backend=machine):
        list(tokens())
        check_buffer("It", 2**60, "no", InputError)
        assert reading_device() == mx.default_device()
    assert not mac.calls


def test_small_models_leave_the_limit_alone() -> None:
    with Mac(17 * NBYTES).here() as mac:
        list(tokens())
    assert not mac.calls


@pytest.mark.parametrize(
    ("memory", "said"), [(64 * GIB, "sudo sysctl iogpu.wired_limit_mb=1"), (8 * GIB, "or a larger machine")]
)
def test_weights_near_the_working_set_are_told_with_the_remedy(memory: int, said: str) -> None:
    with Mac(NBYTES, memory=memory).here(), pytest.warns(UserWarning, match="wait for the disk") as caught:
        list(tokens())
    assert said in str(caught[0].message)
    with Mac(2 * NBYTES, memory=memory).here(), warnings.catch_warnings():
        warnings.simplefilter("error")
        list(tokens())


def test_the_remedy_leaves_the_system_its_part() -> None:
    with Mac(72 * GIB, memory=96 * GIB).here():
        assert f"iogpu.wired_limit_mb={84 * 1024}" in room_remedy(70 * GIB)
        assert "sysctl" not in room_remedy(80 * GIB)


def test_a_state_that_is_replaced_can_be_freed(mac: Mac) -> None:
    """Training's first state isn't kept until the last step."""
    weights = {"a": mx.zeros((2 * NBYTES,), mx.uint8)}
    with warnings.catch_warnings(action="ignore"), wired(weights):
        before = mx.get_active_memory()
        mx.eval(weights)
        assert mx.get_active_memory() > before + NBYTES
        del weights
        assert mx.get_active_memory() < before + NBYTES


@pytest.mark.parametrize(("machine", "cleared"), [("metal", True), ("cuda", False), ("cpu", False)])
def test_unused_memory_is_given_back_each_256_tokens(machine: Backend, cleared: bool) -> None:
    with Mac(100 * NBYTES).here() as mac, as_if(backend=machine):
        cache = init_cache(CONFIG, 1, 1024)
        # Chunks of 256, 256 and 88 tokens.
        _, cache = forward(PARAMS, mx.ones((1, 600), mx.int32), cache, last_only=True, chunk_size=256)
        assert len(mac.calls) == 2 * cleared
        _, cache = forward(PARAMS, mx.ones((1, 167), mx.int32), cache)
        assert len(mac.calls) == 2 * cleared
        for after in (768, 769, 770):
            _, cache = forward(PARAMS, mx.ones((1, 1), mx.int32), cache)
            assert cache.lengths == (after,)
            assert len(mac.calls) == 3 * cleared
        # A row that has ended stands still at a multiple of 256 while another goes on.
        cache = replace(cache, lengths=(768,))
        cache = take_rows(cache, [0, 0])
        cache = replace(cache, lengths=(768, 5))
        for _ in range(3):
            _, cache = forward(PARAMS, mx.ones((2, 1), mx.int32), cache, lengths=[0, 1])
        assert len(mac.calls) == 3 * cleared


def test_a_mac_reads_files_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made of tensors before their files are read is the CPU's work."""
    made_on: list[mx.Device] = []
    stream = mx.stream

    def noted(device: mx.Device) -> Any:
        made_on.append(device)
        return stream(device)

    monkeypatch.setattr(mx, "stream", noted)
    with Mac(GIB).here():
        load(SMALL, dtype="float16", lazy=True)
    assert made_on == [mx.Device(mx.cpu)]


def test_no_array_is_larger_than_the_largest_buffer() -> None:
    params, config = load(SMALL)
    with Mac(GIB, largest_buffer=10**5).here():
        with pytest.raises(CheckpointError, match=r"takes .* in one piece and this device's largest buffer is"):
            load(SMALL)
        with pytest.raises(CacheError, match="a layer's keys"):
            init_cache(config, 64, 2048)
        with pytest.raises(CacheError, match="a layer's keys"):
            grow_cache(init_cache(config, 64, 8), 2048)
        many = mx.zeros((64, 16), mx.int32)
        with pytest.raises(InputError, match=r"The logits of \[64, 16\] tokens"):
            forward(params, many, init_cache(config, 64, 0))
        with pytest.raises(InputError, match="The logits"):
            score(params, many, config)
        forward(params, many, init_cache(config, 64, 0), last_only=True)


@pytest.mark.parametrize("error", [CacheError, InputError])
def test_an_array_that_just_fits_is_made(error: type[DbrxError]) -> None:
    with Mac(GIB, largest_buffer=100).here():
        check_buffer("It", 100, "no", error)
        with pytest.raises(error):
            check_buffer("It", 101, "no", error)


WIRES = """
import mlx.core as mx
from dbrx_fn.runtime.memory import wired
from tests.support.mac import Mac

with Mac(100).here() as mac, wired({"a": mx.zeros((60,), mx.uint8)}):
    print(mac.calls)
"""


@pytest.mark.parametrize(("value", "calls"), [("0", "[]"), ("1", "[100]"), ("", "[100]"), ("off", "[100]")])
def test_the_environment_can_forbid_it(value: str, calls: str) -> None:
    """For Macs that wired memory makes restart."""
    ran = subprocess.run(
        [sys.executable, "-c", WIRES], env={**os.environ, "DBRX_FN_WIRED": value}, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, calls)
    assert ("DBRX_FN_WIRED is 'off' where 0 or 1 is expected" in ran.stderr) == (value == "off")


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a CUDA device that has 100 GiB, of which MLX takes 95."""
    calls = list[str]()
    monkeypatch.setattr(dbrx_fn.runtime.memory, "_cuda_memory", lambda: 100 * GIB)
    monkeypatch.setattr(mx, "get_memory_limit", lambda: 95 * GIB)
    for name in ("clear_cache", "synchronize"):
        monkeypatch.setattr(mx, name, functools.partial(calls.append, name))
    return calls


def holds(active: float, unused: float, pool: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the device hold so many GiB in use, unused, and in the pool."""
    monkeypatch.setattr(mx, "get_active_memory", lambda: int(active * GIB))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: int(unused * GIB))
    monkeypatch.setattr(dbrx_fn.runtime.memory, "pool_size", lambda: int(pool * GIB))


@pytest.mark.parametrize(
    ("active", "unused", "given_back"), [(90, 3, True), (88, 3, False), (93, 0.5, False), (50, 45, True), (0, 0, False)]
)
@pytest.mark.parametrize(("time", "chunks"), [(1, 1), (5, 3)])
def test_a_nearly_full_cuda_device_gets_unused_buffers_back(
    active: float,
    unused: float,
    given_back: bool,
    time: int,
    chunks: int,
    cuda_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a sequence's step, and before each chunk of a prompt. A little stays for the steps themselves."""
    holds(active, unused, 100, monkeypatch)
    with as_if(backend="cuda", kernels=False):
        logits, _ = forward(PARAMS, mx.array([[1] * time]), init_cache(CONFIG, 1, 16), chunk_size=2)
    assert mx.isfinite(logits).all()
    assert cuda_calls == ["clear_cache"] * (chunks if given_back else 0)
    with as_if(backend="cpu"):
        forward(PARAMS, mx.array([[1]]), init_cache(CONFIG, 1, 16))
    assert len(cuda_calls) == (chunks if given_back else 0)


@pytest.mark.parametrize(
    ("active", "unused", "pool", "shrinks"),
    [(90, 0.1, 95.1, True), (90, 0.1, 94.9, False), (94.5, 0.1, 95.1, False), (90, 4, 94, False)],
)
def test_a_full_pool_shrinks_before_several_sequences_decode(
    active: float,
    unused: float,
    pool: float,
    shrinks: bool,
    cuda_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holds(active, unused, pool, monkeypatch)
    with as_if(backend="cuda", kernels=False):
        logits, _ = forward(PARAMS, mx.array([[1], [2]]), init_cache(CONFIG, 2, 16))
    assert mx.isfinite(logits).all()
    assert cuda_calls == (["clear_cache", "synchronize"] if shrinks else [])


def test_only_an_nvidia_gpu_has_a_pool() -> None:
    mx.eval(mx.ones(1 << 20))
    assert (pool_size() > 0) == mx.cuda.is_available()


def test_training_on_cuda_stays_within_its_plan_and_gives_the_limit_back() -> None:
    own = mx.get_memory_limit()
    planned = int(0.9 * own)
    with as_if(backend="cuda"), limited(planned):
        assert planned < mx.get_memory_limit() < min(own, 1.05 * planned)
        with limited(own):
            assert mx.get_memory_limit() < own
        with limited(0):
            assert mx.get_memory_limit() == memory_size() // 2
    assert mx.get_memory_limit() == own
    with limited(planned):
        assert mx.get_memory_limit() == own
