"""Many requests at once: one thread that alone touches MLX, and everybody else hands it requests and gets events.

Each turn of the engine plans (`schedule.plan`), launches a decoding step of all rows and a chunk of one prompt, and
hands out the tokens of the step before while the device works. A row's token is known a turn after it was launched, so
a row that ends by a stop token is computed once more, and that token is dropped.
"""

import contextvars
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from dbrx_fn.errors import BusyError, DbrxError, EngineError, GenerationError, InputError, lacks_memory
from dbrx_fn.generation.row_sampling import Choice
from dbrx_fn.generation.stream import FinishReason, token_budget
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.batch import Batch, arranged, decoded
from dbrx_fn.serving.limits import Limits, default_limits
from dbrx_fn.serving.reading import Reading, token_logprobs
from dbrx_fn.serving.request import Event, Failed, PromptRead, Receive, Request, TokenLogprobs, TokenMade
from dbrx_fn.serving.schedule import State, Work, never_fits, plan, row_capacity

CHUNK = 512
"""Prompt tokens that are read between two decoding steps."""

_FREE_CHUNK = 2048
"""The same while nobody decodes; the exact mode keeps to `CHUNK`."""

_QUEUE = 256
"""Requests that may wait, unless asked otherwise."""


@dataclass(frozen=True)
class Statistics:
    """What an engine is doing and has done.

    `waiting`, `reading`, `decoding`: requests, now.
    `rows`, `positions`: shape of the batch that decodes; of its rows some may be idle.
    `finished`: requests that ended, by how: "stop", "length", "cancelled", "failed".
    `prompt_tokens`, `cached_tokens`, `made_tokens`: so far; cached ones are among the prompts'.
    `put_aside`: how often a request lost its cache to others.
    """

    waiting: int = 0
    reading: int = 0
    decoding: int = 0
    rows: int = 0
    positions: int = 0
    finished: tuple[tuple[str, int], ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    made_tokens: int = 0
    put_aside: int = 0


@dataclass(eq=False)
class _Served:
    """A request from its arrival to its end.

    `budget`: tokens that it may make.
    `launched`: tokens that were asked of the device; those of `made` have been handed out.
    """

    number: int
    request: Request
    receive: Receive
    budget: int
    made: list[int] = field(default_factory=list)
    launched: int = 0
    told_prompt: bool = False
    ended: bool = False
    reading: Reading | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is known of its text."""
        return (*self.request.prompt, *self.made)

    def work(self, held: int) -> Work:
        """What the schedule sees."""
        return Work(self.number, held, len(self.tokens), len(self.request.prompt) + self.budget - 1)


@dataclass(frozen=True, eq=False)
class _Launched:
    """Tokens that the device is making: a choice, and whose its rows are."""

    choice: Choice
    rows: tuple[_Served | None, ...]


class Engine:
    """Serves requests on a thread of its own until it is closed.

        with Engine(params, config) as engine:
            for made in engine.answer(Request(prompt=tuple(tokens))):
                ...

    Args:
        params: the tree.
        config: the model's.
        limits: rows and memory; `default_limits` if not given.
        queue: requests that may wait.

    In the exact mode (`Limits.exact`) a request's tokens and log-probabilities are the same bits whoever else is served
    and in whatever order they came (`docs/exactness.md`).
    """

    def __init__(self, params: Params, config: Config, limits: Limits | None = None, *, queue: int = _QUEUE) -> None:
        self._params, self._config = params, config
        self.limits = default_limits(params, config) if limits is None else limits
        self._most_waiting = queue
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._arrived: list[_Served] = []
        self._cancelled: set[int] = set()
        self._closing = False
        self._failure: EngineError | None = None
        self._waiting: dict[int, _Served] = {}
        self._reading: dict[int, _Served] = {}
        self._rows: list[_Served | None] = []
        self._joining: list[tuple[_Served, Batch]] = []
        self._batch: Batch | None = None
        self._launched: list[_Launched] = []
        self._passed_over = 0
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        # What is lazy belongs to the thread that made it, and MLX has no stream for it in another.
        mx.eval(params)
        # The thread chooses for the same back end as whoever makes the engine (`runtime.device.as_if`).
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="dbrx_fn engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, receive: Receive) -> int:
        """Takes a request, and calls `receive` with each event on the engine's thread; the number is for `cancel`.

        The last event is a `TokenMade` with a finish reason, or a `Failed`. A cancelled request has no more events.

        Raises:
            InputError: if the request can't work with this model, or never fits these limits.
            BusyError: if as many requests wait as may.
            EngineError: if the engine was closed or has failed.
        """
        budget = token_budget(request.prompt, self._config, request.max_tokens)
        strange = [token for token, _ in request.sampling.logit_bias if token >= self._config.vocab_size]
        if strange:
            raise InputError(
                f"logit_bias names token {strange[0]}, past the model's vocabulary of {self._config.vocab_size}."
            )
        length = len(request.prompt)
        if never_fits(length, length + budget - 1, self.limits):
            raise InputError(
                f"The prompt has {length} tokens and up to {budget} more are asked for, where this server has room for"
                f" {min(self.limits.capacity, self.limits.positions)} tokens: shorten the prompt or lower max_tokens."
            )
        with self._lock:
            self._check_running()
            if len(self._arrived) + len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{self._most_waiting} requests wait already, as many as may: try again later.")
            served = _Served(next(self._numbers), request, receive, budget)
            self._arrived.append(served)
            self._lock.notify_all()
        return served.number

    def cancel(self, number: int) -> None:
        """Ends a request. One that has ended already is none."""
        with self._lock:
            self._cancelled.add(number)
            self._lock.notify_all()

    def answer(self, request: Request) -> Generator[TokenMade]:
        """Submits a request and yields its tokens. Whoever stops asking cancels it.

        Raises:
            DbrxError: as `submit`, or what the request failed with.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, TokenMade):
                    yield event
                    if event.finish_reason is not None:
                        return
        finally:
            self.cancel(number)

    def statistics(self) -> Statistics:
        """A view of the engine, some microseconds old."""
        batch, counts = self._batch, self._counts
        return Statistics(
            waiting=len(self._waiting) + len(self._arrived),
            reading=len(self._reading),
            decoding=sum(row is not None for row in self._rows) + len(self._joining),
            rows=0 if batch is None else batch.cache.batch_size,
            positions=0 if batch is None else batch.cache.batch_size * batch.cache.capacity,
            finished=tuple(sorted(self._finished.items())),
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            made_tokens=counts["made"],
            put_aside=counts["put aside"],
        )

    @property
    def failure(self) -> EngineError | None:
        """Why the engine ended by itself, if it did."""
        return self._failure

    def close(self, drain: float = 0.0) -> None:
        """Ends the engine. Requests that are there get `drain` seconds to end; the others fail with `EngineError`."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if drain:
            self._thread.join(drain)
        with self._lock:
            self._failure = self._failure or EngineError("The engine was closed: start another one.")
            self._lock.notify_all()
        self._thread.join()

    def _check_running(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise EngineError("The engine is closing and takes no more requests: try another server.")

    def _run(self) -> None:
        try:
            while self._take_messages():
                try:
                    self._turn()
                except RuntimeError as error:
                    self._lose_device_state(error)
        except Exception as error:
            self._failure = EngineError(f"The engine ended by a fault of its own ({type(error).__name__}: {error}).")
        with self._lock:
            self._failure = self._failure or EngineError("The engine was closed: start another one.")
            left = [*self._arrived, *self._everybody()]
            self._arrived = []
        for served in left:
            self._fail(served, self._failure)

    def _lose_device_state(self, error: RuntimeError) -> None:
        """What the device was computing failed, mostly for want of memory: those whose it was fail, others go on."""
        remedy = "the server lacks memory: try a shorter text, or later" if lacks_memory(error) else "try again"
        failed = EngineError(f"The device couldn't compute this ({error}): {remedy}.")
        for served in self._everybody():
            if served.number not in self._waiting:
                self._fail(served, failed)
        self._reading, self._rows, self._joining, self._batch, self._launched = {}, [], [], None, []
        mx.clear_cache()

    def _take_messages(self) -> bool:
        """Waits for something to do; whether to go on."""
        with self._lock:
            while not (self._arrived or self._everybody() or self._closing or self._failure):
                self._lock.wait()
            for served in self._arrived:
                self._waiting[served.number] = served
            self._arrived = []
            cancelled, self._cancelled = self._cancelled, set()
        for served in self._everybody():
            if served.number in cancelled and not served.ended:
                self._end(served, "cancelled")
        return self._failure is None and not (self._closing and not self._everybody())

    def _everybody(self) -> list[_Served]:
        decoding = [row for row in self._rows if row is not None]
        found = [*self._waiting.values(), *self._reading.values(), *decoding, *(row for row, _ in self._joining)]
        return [served for served in found if not served.ended]

    def _turn(self) -> None:
        """One turn: plan, launch, hand out."""
        self._forget_ended()
        step = plan(self._state(), self.limits)
        for number in step.put_aside:
            self._put_aside(number)
        for number in step.admitted:
            self._begin(self._waiting.pop(number))
        self._arrange(step.rows, step.capacity)
        before, self._launched = self._launched, []
        if self._batch is not None:
            self._decode(self._batch)
        if step.read is not None and step.read in self._reading:
            self._read(self._reading[step.read], alone=self._batch is None)
        for launched in before:
            self._hand_out(launched)

    def _state(self) -> State:
        held = dict(zip(self._rows, self._batch.cache.lengths, strict=True)) if self._batch is not None else {}
        decoding = [served.work(held[served]) for served in self._rows if served is not None and _goes_on(served)]
        joining = [served.work(batch.cache.lengths[0]) for served, batch in self._joining if _goes_on(served)]
        return State(
            waiting=tuple(served.work(0) for served in self._waiting.values()),
            reading=tuple(
                served.work(served.reading.held) for served in self._reading.values() if served.reading is not None
            ),
            decoding=(*decoding, *joining),
            passed_over=self._passed_over,
        )

    def _forget_ended(self) -> None:
        for table in (self._waiting, self._reading):
            for number in [number for number, served in table.items() if served.ended]:
                del table[number]

    def _put_aside(self, number: int) -> None:
        """Takes a request's cache away. What it has made so far is known, so it goes on from there."""
        self._counts["put aside"] += 1
        served = self._reading.pop(number, None)
        if served is None:
            # Its last token is still being made, and is handed out this once more.
            for launched in self._launched:
                self._hand_out(launched)
            self._launched = []
            rows = [*self._rows, *(row for row, _ in self._joining)]
            served = next(row for row in rows if row is not None and row.number == number)
            self._rows = [None if row is served else row for row in self._rows]
            self._joining = [(row, batch) for row, batch in self._joining if row is not served]
            if self._batch is not None:
                self._batch = self._without_idle(self._batch)
        served.reading, served.launched = None, len(served.made)
        if not served.ended:
            self._waiting[number] = served

    def _without_idle(self, batch: Batch) -> Batch:
        requests = tuple(None if row is None else row.request for row in self._rows)
        return replace(batch, rows=replace(batch.rows, requests=requests))

    def _begin(self, served: _Served) -> None:
        capacity = row_capacity(served.work(0).room(), self.limits)
        cache = init_cache(self._config, 1, capacity)
        served.reading = Reading(served.request, served.tokens, cache, cached_tokens=0)
        self._reading[served.number] = served

    def _read(self, served: _Served, *, alone: bool) -> None:
        reading = served.reading
        assert reading is not None
        self._passed_over = 0 if served.number == min(self._reading) else self._passed_over + 1
        reading.read(self._params, _FREE_CHUNK if alone and not self.limits.exact else CHUNK)
        if not reading.is_done:
            return
        del self._reading[served.number]
        served.launched += 1
        choice, batch = reading.first_token()
        mx.async_eval(choice.tokens)
        self._launched.append(_Launched(choice, (served,)))
        self._joining.append((served, batch))

    def _arrange(self, rows: int, capacity: int) -> None:
        """Makes the batch hold those who decode on, and nobody else."""
        joining = [(served, batch) for served, batch in self._joining if _goes_on(served)]
        kept = [row for row, served in enumerate(self._rows) if served is not None and _goes_on(served)]
        self._joining = []
        if not kept and not joining:
            self._batch, self._rows = None, []
            return
        batch = self._batch
        same = batch is not None and (batch.cache.batch_size, batch.cache.capacity) == (rows, capacity)
        if same and not joining and len(kept) == sum(row is not None for row in self._rows):
            return
        self._batch = None
        owners = [*(self._rows[row] for row in kept), *(served for served, _ in joining)]
        self._batch, whose = arranged(batch, kept, [one for _, one in joining], rows, capacity, self._config)
        self._rows = [None if place is None else owners[place] for place in whose]

    def _decode(self, batch: Batch) -> None:
        self._batch = None
        choice, self._batch = decoded(self._params, batch, None, whole_cache=self.limits.exact)
        mx.async_eval(choice.tokens, choice.logprobs, choice.top_logprobs)
        for served in self._rows:
            if served is not None:
                served.launched += 1
        self._launched.append(_Launched(choice, tuple(self._rows)))

    def _hand_out(self, launched: _Launched) -> None:
        choice = launched.choice
        tokens = np.array(choice.tokens)
        logprobs = None if choice.logprobs is None else np.array(choice.logprobs)
        top_tokens = None if choice.top_tokens is None else np.array(choice.top_tokens)
        top_logprobs = None if choice.top_logprobs is None else np.array(choice.top_logprobs)
        for row, served in enumerate(launched.rows):
            if served is None or served.ended:
                continue
            of_token: TokenLogprobs | None = None
            top = served.request.top_logprobs
            if top is not None and logprobs is not None and top_tokens is not None and top_logprobs is not None:
                of_token = token_logprobs(logprobs[row], top_tokens[row], top_logprobs[row], top)
            self._made(served, int(tokens[row]), of_token)

    def _made(self, served: _Served, token: int, logprobs: TokenLogprobs | None) -> None:
        """Hands one token out, and ends the request if it is the last."""
        if not served.told_prompt and served.reading is not None:
            served.told_prompt = True
            self._counts["prompt"] += len(served.request.prompt)
            self._counts["cached"] += served.reading.cached_tokens
            self._tell(served, PromptRead(served.reading.cached_tokens, served.reading.prompt_logprobs()))
        if token == self._config.vocab_size:
            self._fail(
                served,
                GenerationError(
                    f"After {len(served.tokens)} tokens the model's numbers are no longer finite, or nothing may follow"
                    " by what was asked: try dtype float32 (--dtype float32)."
                ),
            )
            return
        served.made.append(token)
        self._counts["made"] += 1
        reason: FinishReason | None = None
        if token in served.request.stop_tokens:
            reason = "stop"
        elif len(served.made) == served.budget:
            reason = "length"
        self._tell(served, TokenMade(token, reason, logprobs))
        if reason is not None:
            self._end(served, reason)

    def _tell(self, served: _Served, event: Event) -> None:
        try:
            served.receive(event)
        except Exception:
            # Whoever can't take an event has left.
            self._end(served, "cancelled")

    def _fail(self, served: _Served, error: DbrxError) -> None:
        if not served.ended:
            self._end(served, "failed")
            self._tell(served, Failed(error))

    def _end(self, served: _Served, how: str) -> None:
        if not served.ended:
            served.ended = True
            self._finished[how] += 1


def _goes_on(served: _Served) -> bool:
    """Whether another token of it is to be launched."""
    return not served.ended and served.launched < served.budget
