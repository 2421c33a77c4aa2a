"""The engine, with real models: everybody gets what they would get alone, and it ends clean whatever happens."""

import functools
import gc
import threading
import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.errors import BusyError, EngineError, GenerationError, InputError
from dbrx_fn.generation.row_sampling import row_numbers, sample_rows, steps_of
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.generation.structured import Structure
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.costs import cache_bytes
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.runtime.device import Backend, as_if
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.limits import Limits, default_limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.request import Event, Failed, PromptRead, Request, TokenMade
from tests.support.engine_requests import (
    CONFIG,
    EXACT,
    FAST,
    PARAMS,
    Events,
    made,
    requests,
    served,
    tokens,
    warmed_up,
)


def test_a_second_turn_is_behind_the_first_ones_answer() -> None:
    first = Request(tokens(6, 200), max_tokens=100)
    with Engine(PARAMS, CONFIG, FAST, prefixes=PrefixStore(CONFIG, "", chunk=FAST.chunk)) as engine:
        answer = [event.token for event in engine.answer(first)]
        second = Request((*first.prompt, *answer, *tokens(7, 30)), max_tokens=5)
        said = [event.token for event in engine.answer(second)]
        assert engine.statistics().cached_tokens == 256
    assert said == list(stream_tokens(PARAMS, CONFIG, second.prompt, max_tokens=5))


def test_requests_with_one_prompt_that_arrive_together_read_it_once() -> None:
    asked = [Request(tokens(6, 300), max_tokens=9, seed=n, sampling=Sampling(temperature=1.0)) for n in range(4)]
    other = Request((*tokens(6, 130), *tokens(7, 170)), max_tokens=9)
    store = PrefixStore(CONFIG, "", chunk=FAST.chunk)
    events = served(FAST, [*asked, other], list(range(5)), store)
    cached = [event.cached_tokens for (event, *_) in events if isinstance(event, PromptRead)]
    assert cached[:4] == [0, 256, 256, 256]
    assert [made(one) for one in events] == [made(one) for one in served(FAST, [*asked, other], list(range(5)))]


def test_a_short_prompt_does_not_wait_for_many_choices_of_a_long_one() -> None:
    asked = [*[Request(tokens(6, 900), max_tokens=4) for _ in range(6)], Request(tokens(7, 20), max_tokens=4)]
    order, done = list[int](), threading.Semaphore(0)

    def receive(number: int, event: Event) -> None:
        if isinstance(event, PromptRead):
            order.append(number)
            done.release()

    with Engine(PARAMS, CONFIG, FAST, prefixes=PrefixStore(CONFIG, "", chunk=FAST.chunk)) as engine:
        # They arrive together, during the warm-up.
        for number, request in enumerate(asked):
            engine.submit(request, functools.partial(receive, number))
        for _ in asked:
            done.acquire()
    assert order.index(6) <= 1


def test_greedy_answers_are_those_of_one_stream() -> None:
    asked = [replace(request, sampling=Sampling(), stop_tokens=frozenset()) for request in requests(12)]
    for request, events in zip(asked, served(FAST, asked, list(range(12))), strict=True):
        assert made(events) == list(stream_tokens(PARAMS, CONFIG, request.prompt, max_tokens=request.max_tokens))


def test_logprobs_are_those_of_score() -> None:
    request = Request(tokens(1, 30), max_tokens=8, top_logprobs=3, prompt_logprobs=True)
    (events,) = served(FAST, [request], [0])
    text = (*request.prompt, *made(events))
    logits = np.array(score(PARAMS, mx.array([text]), CONFIG)[0][0], np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    first, *rest = events
    assert isinstance(first, PromptRead)
    said = [*first.logprobs, *(event.logprobs for event in rest if isinstance(event, TokenMade))]
    assert len(said) == len(text)
    assert said[0] is None
    for place, logprobs in enumerate(said[1:], start=1):
        assert logprobs is not None
        assert logprobs.chosen == pytest.approx(expected[place - 1, text[place]], abs=2e-5)
        assert [token for token, _ in logprobs.top] == np.argsort(-expected[place - 1])[:3].tolist()


def test_a_drawn_answer_is_that_of_its_seed_and_positions() -> None:
    sampling = Sampling(temperature=1.5, top_k=40)
    request = Request(tokens(4, 20), max_tokens=30, sampling=sampling, seed=11)
    (events,) = served(FAST, [request], [0])
    numbers, expected = row_numbers([(sampling, 11)], CONFIG.vocab_size), list[int]()
    logits, cache = forward(PARAMS, mx.array([request.prompt], mx.int32), init_cache(CONFIG, 1, 256), last_only=True)
    for position in range(30):
        at = mx.array([position], mx.int32)
        choice, _ = sample_rows(logits[:, -1], numbers, at, None, None, None, steps=steps_of([sampling]))
        expected += np.array(choice.tokens).tolist()
        logits, cache = forward(PARAMS, choice.tokens[:, None], cache)
    assert made(events) == expected
    assert len(set(expected)) > 10


def test_a_stop_token_ends_the_text_and_is_handed_out() -> None:
    free = Request(tokens(2, 10), max_tokens=30)
    (unstopped,) = served(FAST, [free], [0])
    stop = made(unstopped)[6]
    (events,) = served(FAST, [replace(free, stop_tokens=frozenset({stop}))], [0])
    last = events[-1]
    assert isinstance(last, TokenMade)
    assert (last.token, last.finish_reason) == (stop, "stop")
    assert made(events) == made(unstopped)[: made(unstopped).index(stop) + 1]


def test_those_who_lose_their_memory_come_back_and_say_the_same() -> None:
    asked = [Request(tokens(number, 200), max_tokens=150) for number in range(4)]
    narrow = replace(FAST, positions=1024)
    events = Events(4)
    with Engine(PARAMS, CONFIG, narrow) as engine:
        for number, request in enumerate(asked):
            engine.submit(request, events.receiver(number))
        events.wait(4)
        said = engine.statistics()
    assert said.finished == (("length", 4),)
    for request, got in zip(asked, events.of, strict=True):
        assert len(made(got)) == 150
        assert sum(isinstance(event, PromptRead) for event in got) == 1
        assert made(got)[:40] == list(stream_tokens(PARAMS, CONFIG, request.prompt, max_tokens=40))


def test_a_short_request_is_answered_while_a_long_prompt_is_read() -> None:
    events = Events(2)
    ends: list[int] = []
    with Engine(PARAMS, CONFIG, FAST) as engine:
        for number, length in enumerate((4000, 5)):
            receive = events.receiver(number)

            def note(event: Event, number: int = number, receive: Any = receive) -> None:
                if isinstance(event, TokenMade):
                    ends.append(number)
                receive(event)

            engine.submit(Request(tokens(number, length), max_tokens=4), note)
        events.wait(2)
    assert ends[:2] == [1, 1]


def test_a_cancelled_request_ends_and_others_go_on() -> None:
    events = Events(3)
    with Engine(PARAMS, CONFIG, FAST) as engine:
        numbers = [
            engine.submit(Request(tokens(number, 20), max_tokens=60 if number else 3000), events.receiver(number))
            for number in range(3)
        ]
        engine.cancel(numbers[0])
        engine.cancel(numbers[0])
        events.wait(2)
        deadline = time.monotonic() + 30
        while engine.statistics().decoding and time.monotonic() < deadline:
            time.sleep(0.01)
        said = engine.statistics()
    assert said.finished == (("cancelled", 1), ("length", 2))
    assert (said.waiting, said.reading, said.decoding, said.rows) == (0, 0, 0, 0)


def test_whoever_stops_asking_cancels() -> None:
    with Engine(PARAMS, CONFIG, FAST) as engine:
        answer = engine.answer(Request(tokens(0, 9), max_tokens=3000))
        next(answer)
        answer.close()
        assert len(list(engine.answer(Request(tokens(1, 9), max_tokens=3)))) == 3
        assert dict(engine.statistics().finished) == {"cancelled": 1, "length": 1}


def test_a_receiver_that_raises_has_left() -> None:
    def leave(_: Event) -> None:
        raise ConnectionError

    with Engine(PARAMS, CONFIG, FAST) as engine:
        engine.submit(Request(tokens(0, 9), max_tokens=3000), leave)
        assert len(list(engine.answer(Request(tokens(1, 9), max_tokens=3)))) == 3
        assert dict(engine.statistics().finished)["cancelled"] == 1


def test_a_full_queue_is_refused() -> None:
    events = Events(40)
    asked = Request(tokens(0, 300), max_tokens=300)
    with Engine(PARAMS, CONFIG, replace(FAST, rows=1), queue=3) as engine:
        for number in range(3):
            engine.submit(asked, events.receiver(number))
        with pytest.raises(BusyError, match="3 requests wait already"):
            [engine.submit(asked, events.receiver(number)) for number in range(3, 40)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (90,)}, "token 90"),
        ({"prompt": (1,) * 5000}, "holds 4096"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"sampling": Sampling(logit_bias=((90, 1.0),))}, "token 90"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with Engine(PARAMS, CONFIG, FAST) as engine, pytest.raises(InputError, match=words):
        engine.submit(replace(Request((1, 2)), **changes), lambda _: None)


@pytest.mark.parametrize("changes", [{"top_logprobs": 21}, {"seed": -1}, {"seed": 2**64}])
def test_a_request_that_makes_no_sense_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Request((1,), **changes)


def test_what_never_fits_is_refused_at_once() -> None:
    with Engine(PARAMS, CONFIG, replace(FAST, capacity=100)) as engine:
        with pytest.raises(InputError, match="room for 100 tokens"):
            engine.submit(Request(tokens(0, 90), max_tokens=50), lambda _: None)
        assert len(list(engine.answer(Request(tokens(0, 90), max_tokens=11)))) == 11


def test_numbers_that_are_not_finite_fail_their_request_only() -> None:
    damaged = init_params(CONFIG, mx.random.key(3))
    damaged["transformer"]["wte"]["weight"][5] = mx.nan
    with Engine(damaged, CONFIG, FAST) as engine:
        with pytest.raises(GenerationError, match="no longer finite"):
            list(engine.answer(Request((5,), max_tokens=3)))
        said = list(engine.answer(Request((6, 7), max_tokens=3, sampling=Sampling(logit_bias=((5, -np.inf),)))))
        assert len(said) == 3


def test_a_closed_engine_fails_those_who_wait() -> None:
    events = Events(6)
    engine = Engine(PARAMS, CONFIG, FAST)
    for number in range(6):
        engine.submit(Request(tokens(number, 20), max_tokens=3000), events.receiver(number))
    engine.close()
    events.wait(6)
    assert all(isinstance(of_one[-1], Failed) for of_one in events.of)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(Request((1,)), lambda _: None)


def test_a_draining_engine_ends_what_runs() -> None:
    events = Events(6)
    engine = Engine(PARAMS, CONFIG, FAST)
    for number in range(6):
        engine.submit(Request(tokens(number, 20), max_tokens=9), events.receiver(number))
    closing = threading.Thread(target=engine.close, args=(60,))
    closing.start()
    events.wait(6)
    closing.join()
    assert [len(made(of_one)) for of_one in events.of] == [9] * 6


def test_limits_suit_the_machine() -> None:
    for exact in (False, True):
        limits = default_limits(PARAMS, CONFIG, exact=exact)
        assert limits.capacity == CONFIG.max_seq_len
        assert limits.positions >= (limits.rows + 1) * limits.capacity
    with pytest.raises(InputError, match="5000 tokens doesn't fit"):
        default_limits(PARAMS, CONFIG, capacity=5000)


@pytest.mark.parametrize("machine", ["cuda", "metal"])
@pytest.mark.parametrize("limits", [FAST, EXACT])
def test_nothing_is_traced_after_the_warm_up(
    machine: Backend, limits: Limits, caplog: pytest.LogCaptureFixture
) -> None:
    """Where layers aren't compiled, each signature is checked as a GPU would trace it."""
    limits = replace(limits, capacity=1024, positions=16_384)
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_loss_weight=0.07 + limits.exact + 2 * (machine == "cuda")))
    prefixes = PrefixStore(config, "", chunk=128)
    with as_if(backend=machine), warmed_up(PARAMS, config, limits, prefixes=prefixes) as engine:
        events = Events(30)
        with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
            for number, request in enumerate(requests(30)):
                engine.submit(replace(request, prompt=request.prompt[:600]), events.receiver(number))
            events.wait(30)
    assert not caplog.records


def test_long_texts_decode_in_a_batch_of_their_own_where_memory_is_short() -> None:
    asked = [Request(tokens(number, 40), max_tokens=60) for number in range(3)]
    asked.append(Request(tokens(9, 1900), max_tokens=60))
    events = Events(4)
    shapes = set()
    with Engine(PARAMS, CONFIG, replace(FAST, positions=4 * 256 + 2048)) as engine:
        for number, request in enumerate(asked):
            engine.submit(request, events.receiver(number))
        while engine.statistics().waiting + engine.statistics().reading + engine.statistics().decoding:
            shapes.add((engine.statistics().rows, engine.statistics().positions))
        events.wait(4)
        assert engine.statistics().put_aside == 0
    assert (5, 4 * 256 + 2048) in shapes
    for request, got in zip(asked, events.of, strict=True):
        assert made(got) == list(stream_tokens(PARAMS, CONFIG, request.prompt, max_tokens=60))


def test_a_structure_without_a_vocabulary_is_refused() -> None:
    with Engine(PARAMS, CONFIG, FAST) as engine, pytest.raises(InputError, match="TokenTrie"):
        engine.submit(Request((1,), structure=Structure.choice(["a"])), lambda _: None)


@pytest.mark.parametrize("limits", [FAST, replace(EXACT, rows=2)])
def test_experts_are_those_that_computed_the_logits(limits: Limits) -> None:
    """Beside a request that doesn't ask, and with prompts of several chunks."""
    asked = [Request(tokens(n, (9, 200, 300)[n % 3]), max_tokens=20, experts=n != 1) for n in range(6)]
    asked[4] = replace(asked[4], top_logprobs=1, prompt_logprobs=True)
    events = Events(6)
    with Engine(PARAMS, CONFIG, limits, prefixes=PrefixStore(CONFIG, "", chunk=128)) as engine:
        for number, request in enumerate(asked):
            engine.submit(request, events.receiver(number))
        events.wait(6)
    for request, got in zip(asked, events.of, strict=True):
        told = [event.experts for event in got if isinstance(event, TokenMade)]
        if not request.experts:
            assert told == [None] * 20
            continue
        text = [*request.prompt, *made(got)]
        top = np.array(score(PARAMS, mx.array([text]), CONFIG)[1].top_experts)[:, 0]
        wanted = np.sort(top, axis=-1).swapaxes(0, 1)[len(request.prompt) - 1 : -1]
        np.testing.assert_array_equal(np.array(told), wanted)


def test_a_prompt_s_own_cache_is_freed_once_its_row_decodes() -> None:
    """A row's cache is in the batch then. Kept twice, caches would take double the memory that was admitted."""
    rows, capacity = 8, 1024
    with Engine(PARAMS, CONFIG, Limits(rows=rows, positions=1 << 20, capacity=capacity, chunk=128)) as engine:
        engine.wait_until_ready()
        before = mx.get_active_memory()
        answers = [engine.answer(Request(tokens(row, 600), max_tokens=400)) for row in range(rows)]
        for answer in answers:
            next(answer)
        for _ in range(20):
            next(answers[-1])
        held = mx.get_active_memory() - before
        for answer in answers:
            answer.close()
    assert held < 1.5 * cache_bytes(CONFIG, rows * capacity)


def test_a_cancelled_prompt_s_cache_is_freed_at_once() -> None:
    """Not only when Python's cyclic garbage collection comes by: on a GPU a cache is gigabytes."""
    capacity = 4096
    gc.disable()
    try:
        with Engine(PARAMS, CONFIG, Limits(rows=2, positions=1 << 20, capacity=capacity, chunk=16)) as engine:
            engine.wait_until_ready()
            before = mx.get_active_memory()
            numbers = [engine.submit(Request(tokens(row, 3900), max_tokens=100), lambda _: None) for row in range(4)]
            while not engine.statistics().reading:
                time.sleep(0.001)
            for number in numbers:
                engine.cancel(number)
            while len(engine.statistics().finished) == 0 or engine.statistics().finished[0][1] < 4:
                time.sleep(0.01)
            time.sleep(0.2)
            assert mx.get_active_memory() - before < cache_bytes(CONFIG, capacity) / 2
    finally:
        gc.enable()
