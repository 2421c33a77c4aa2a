"""Serves many requests at once. Only the engine's thread uses MLX; other threads submit requests and receive events.

Each turn plans (`schedule.plan`), launches a decoding step of all rows and a chunk of one prompt, and hands out the
tokens of the step before while the device works. The host knows a token one turn after its launch. So a row that ends
by a stop token has one more step under way by then, whose token is dropped.
"""

import contextvars
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace

import mlx.core as mx

from dbrx_fn.errors import BusyError, EngineError, lacks_memory
from dbrx_fn.generation.structured import TokenTrie
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import compiles
from dbrx_fn.runtime.group import group
from dbrx_fn.runtime.memory import wired
from dbrx_fn.serving.admission import budget_of, matcher_of
from dbrx_fn.serving.batch import Batch, chosen, decoded
from dbrx_fn.serving.beginnings import Beginnings
from dbrx_fn.serving.decoding import Decoding, Launched, rearranged
from dbrx_fn.serving.following import shared_messages, shielded
from dbrx_fn.serving.limits import FREE_CHUNKS, Limits, check_exact, default_limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.reading import Reading
from dbrx_fn.serving.request import Event, Failed, Receive, Request, TokenMade
from dbrx_fn.serving.row_adapters import RowAdapters
from dbrx_fn.serving.schedule import Group, State, plan, row_capacity
from dbrx_fn.serving.served import Served, unusable
from dbrx_fn.serving.statistics import Statistics
from dbrx_fn.serving.warm_up import warm_up


class Engine:
    """Serves requests on a thread of its own until it is closed.

        with Engine(params, config) as engine:
            for made in engine.answer(Request(prompt=tuple(tokens))):
                ...

    In the exact mode (`Limits.exact`) a request's tokens and log-probabilities are the same bits under any load
    and in any order of arrival (`docs/exactness.md`).
    """

    def __init__(
        self,
        params: Params,
        config: Config,
        limits: Limits | None = None,
        *,
        trie: TokenTrie | None = None,
        prefixes: PrefixStore | None = None,
        queue: int = 256,
        adapters: Sequence[str] = (),
    ) -> None:
        """Evaluates all weights, and starts the thread.

        Args:
            params: the tree.
            config: the model's.
            limits: rows and memory; `default_limits` if not given.
            trie: the tokenizer's vocabulary, for requests with a structure. Without it they are refused.
            prefixes: where beginnings of prompts are kept, with chunks of `limits.chunk` tokens; nowhere, if not given.
                The engine closes it.
            queue: requests that may wait.
            adapters: names, for requests, of the adapters that `stack_adapters` put beside the weights, in its order.

        Raises:
            InputError: if memory has no room for the default limits, the exact mode can't have so many rows, or the
                tree has other adapters than are named.
        """
        self._params, self._config, self._adapters = params, config, RowAdapters(params, adapters)
        self.limits = default_limits(params, config) if limits is None else limits
        check_exact(self.limits, params, config)
        self._trie, self._most_waiting = trie, queue
        self._numbers, self._lock = itertools.count(), threading.Condition()
        # Guarded by the lock.
        self._arrived: list[Served] = []
        self._cancelled: set[int] = set()
        self._closing = False
        self._failure: EngineError | None = None
        self._fault: EngineError | None = None
        # Only the thread uses these. Each request that hasn't ended is in `_alive`, and in one of the next four.
        self._alive: dict[int, Served] = {}
        self._waiting: dict[int, Served] = {}
        self._reading: dict[int, Served] = {}
        self._joining: list[tuple[Served, Batch]] = []
        self._decoding: list[Decoding] = []
        self._launched: list[Launched] = []
        self._beginnings = Beginnings(prefixes, config)
        self._passed_over, self._counts = 0, Counter[str]()
        self._ready = threading.Event()
        # MLX can't evaluate a lazy array on another thread than the one that made it.
        mx.eval(params)
        # With its caller's context the thread uses the same back end (`runtime.device.as_if`).
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
            InputError: if the model can't serve the request, or it can never fit these limits.
            BusyError: if the queue is full.
            EngineError: if the engine was closed or has failed.
        """
        served = self._served(request, shielded(receive, lambda: self.cancel(served.number)))
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise EngineError("The engine is closing and takes no more requests: ask another server.")
            if len(self._arrived) + len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{self._most_waiting} requests wait already, and the queue is full: try again later.")
            served.number = next(self._numbers)
            self._arrived.append(served)
            self._lock.notify_all()
        return served.number

    def cancel(self, number: int) -> None:
        """Ends a request. Nothing happens if it has ended."""
        with self._lock:
            self._cancelled.add(number)
            self._lock.notify_all()

    def answer(self, request: Request) -> Generator[TokenMade]:
        """Submits a request and yields its tokens. Closing the iterator cancels the request.

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
        caches, counts = [one.batch.cache for one in self._decoding], self._counts
        waiting, reading = len(self._waiting) + len(self._arrived), len(self._reading)
        return Statistics(
            waiting=waiting,
            reading=reading,
            decoding=max(0, len(self._alive) + len(self._arrived) - waiting - reading),
            rows=sum(cache.batch_size for cache in caches),
            positions=sum(cache.batch_size * cache.capacity for cache in caches),
            finished=tuple((end, counts[end]) for end in ("cancelled", "failed", "length", "stop") if counts[end]),
            prompt_tokens=counts["prompt tokens"],
            cached_tokens=counts["cached tokens"],
            made_tokens=counts["made tokens"],
            put_aside=counts["put aside"],
            prefixes=self._beginnings.statistics(),
        )

    def wait_until_ready(self) -> None:
        """Waits until every trace is made that requests may need. Requests that come earlier wait in the queue."""
        while self._thread.is_alive() and not self._ready.wait(0.1):
            pass

    @property
    def failure(self) -> EngineError | None:
        """Why the engine ended, if it did."""
        return self._failure

    def close(self, drain: float = 0.0) -> None:
        """Ends the engine. Open requests get `drain` seconds to end. The rest then fail with `EngineError`."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if drain:
            self._thread.join(drain)
        with self._lock:
            self._failure = self._failure or EngineError("The engine was closed: start another one.")
            self._lock.notify_all()
        self._thread.join()

    def follow(self) -> None:
        """Waits until the engine ends with that of the leader (`dbrx_fn.serving.following`).

        Raises:
            EngineError: if it ends by an internal error.
        """
        self._thread.join()
        if self._fault is not None:
            raise self._fault

    def _served(self, request: Request, receive: Receive, number: int = -1) -> Served:
        budget = budget_of(request, self._config, self.limits)
        adapter, matcher = self._adapters.place(request.adapter), matcher_of(request, self._trie)
        return Served(number, request, receive, budget, self._ended, adapter, matcher)

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            with wired(self._params):
                if compiles():
                    warm_up(self._params, self._config, self.limits)
                self._ready.set()
                while self._take_messages():
                    try:
                        self._turn()
                    except RuntimeError as error:
                        if group().size > 1:
                            raise
                        self._lose_device_state(error)
        except Exception as error:
            self._fault = EngineError(f"The engine ended by an internal error ({type(error).__name__}: {error}).")
            self._failure = self._fault
        with self._lock:
            self._failure = self._failure or EngineError("The engine was closed: start another one.")
            left, self._arrived = [*self._alive.values(), *self._arrived], []
        for served in left:
            served.fail(self._failure)
        self._forget_device_state()
        self._beginnings.close()
        # MLX asks for this at a thread's end (mlx 4110): on CUDA the process can crash without.
        mx.clear_streams()

    def _take_messages(self) -> bool:
        """Waits for work. Returns whether to go on."""
        while not (self._alive or self._arrived) and self._beginnings.write_some():
            pass
        with self._lock:
            while group().leads and not (self._arrived or self._alive or self._closing or self._failure):
                self._lock.wait()
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
        arrived, cancelled = shared_messages(arrived, cancelled, self._served)
        for served in arrived:
            self._alive[served.number] = self._waiting[served.number] = served
        for number in cancelled & self._alive.keys():
            self._alive[number].finish("cancelled")
        return bool(group().share(self._failure is None and not (self._closing and not self._alive)))

    def _ended(self, served: Served) -> None:
        self._counts[str(served.end)] += 1
        for table in (self._alive, self._waiting, self._reading):
            table.pop(served.number, None)

    def _turn(self) -> None:
        """Plans, launches, and hands out the tokens of the turn before."""
        step = plan(self._state(), self.limits)
        for number in step.put_aside:
            self._put_aside(self._alive[number])
        for number in step.admitted:
            self._begin(self._waiting.pop(number))
        self._arrange(step.groups)
        before, self._launched = self._launched, []
        logits = [self._decode(decoding) for decoding in self._decoding]
        free = [not any(served is not None and served.matcher for served in one.rows) for one in self._decoding]
        for decoding, one, is_free in zip(self._decoding, logits, free, strict=True):
            if is_free:
                self._choose(decoding, one)
            else:
                mx.async_eval(one)
        for launched in before:
            self._hand_out(launched)
        # Which tokens a structure allows is known once the token before has been handed out. The device computes the
        # logits meanwhile.
        for decoding, one, is_free in zip(self._decoding, logits, free, strict=True):
            if not is_free:
                self._choose(decoding, one)
        # The step that was just launched keeps the device busy meanwhile. If the chunk were launched before the tokens
        # are handed out, the device would be a turn further ahead, and the next request would wait for that turn.
        if step.read is not None and step.read in self._reading:
            self._read(self._reading[step.read])
        self._beginnings.write_some()

    def _state(self) -> State:
        decoding = [(served, length) for one in self._decoding for served, _, length in one.held()]
        decoding += [(served, batch.cache.lengths[0]) for served, batch in self._joining]
        reading = [(served, served.reading.held) for served in self._reading.values() if served.reading is not None]
        waiting = self._beginnings.ready(self._waiting, self._reading, idle=not (decoding or reading or self._launched))
        return State(
            waiting=tuple(served.work(0) for served in waiting),
            reading=tuple(served.work(held) for served, held in reading),
            decoding=tuple(served.work(held) for served, held in decoding if served.goes_on),
            passed_over=self._passed_over,
        )

    def _put_aside(self, served: Served) -> None:
        """Preempts a request: drops its cache and keeps its tokens. It goes on from there when it is admitted again."""
        self._counts["put aside"] += 1
        if served.number not in self._reading:
            # The device is still computing its last token.
            launched, self._launched = self._launched, []
            for one in launched:
                self._hand_out(one)
        if served.end is None:
            self._remember_decoded([served])
            self._reading.pop(served.number, None)
            self._joining = [(other, batch) for other, batch in self._joining if other is not served]
            for decoding in self._decoding:
                decoding.rows = tuple(None if other is served else other for other in decoding.rows)
            served.reading, served.launched = None, len(served.made)
            self._waiting[served.number] = served

    def _begin(self, served: Served) -> None:
        capacity = row_capacity(served.work(0).room(), self.limits)
        cache = self._beginnings.cache(served, capacity)
        served.reading = Reading(served.request, served.tokens, cache, cached_tokens=cache.lengths[0])
        self._reading[served.number] = served

    def _read(self, served: Served) -> None:
        reading = served.reading
        assert reading is not None
        self._passed_over = 0 if served.number == min(self._reading) else self._passed_over + 1
        free = not self._decoding and not self.limits.exact
        reading.read(self._adapters.tree([served.request]), self.limits.chunk * (FREE_CHUNKS if free else 1))
        if not reading.is_done:
            return
        del self._reading[served.number]
        self._beginnings.put(served, served.request.prompt, reading.cache, 0)
        self._counts["prompt tokens"] += len(reading.tokens)
        self._counts["cached tokens"] += reading.cached_tokens
        choice, batch = reading.first_token(served.allowed())
        mx.async_eval(choice, batch.rows.experts)
        served.launched += 1
        self._launched.append(Launched(choice, (served,), batch.rows.experts))
        self._joining.append((served, batch))

    def _arrange(self, groups: Sequence[Group]) -> None:
        """Rearranges the batches so that they hold exactly the requests in `groups`."""
        self._remember_decoded([served for one in self._decoding for served, _, _ in one.held() if not served.goes_on])
        members = [[self._alive[number] for number in group.numbers] for group in groups]
        old, self._decoding, joining, self._joining = self._decoding, [], dict(self._joining), []
        self._decoding = rearranged(old, joining, list(zip(groups, members, strict=True)), self._config)

    def _remember_decoded(self, leaving: list[Served]) -> None:
        """Stores the texts of rows that leave, for the next turns of their conversations.

        The exact mode doesn't, since decoding and prefill may give different bits for the same tokens.
        """
        if not self.limits.exact:
            for one in self._decoding:
                for served, row, _ in one.held():
                    if served in leaving:
                        self._beginnings.put(served, served.tokens, one.batch.cache, row)

    def _decode(self, decoding: Decoding) -> mx.array:
        tree = self._adapters.tree(decoding.batch.rows.requests)
        logits, decoding.batch = decoded(tree, decoding.batch, whole_cache=self.limits.exact)
        for served, _, _ in decoding.held():
            served.launched += 1
        return logits

    def _choose(self, decoding: Decoding, logits: mx.array) -> None:
        allowed = [None if served is None else served.allowed() for served in decoding.rows]
        choice, rows = chosen(logits, decoding.batch.rows, allowed)
        decoding.batch = replace(decoding.batch, rows=rows)
        mx.async_eval(choice, rows.experts)
        self._launched.append(Launched(choice, decoding.rows, rows.experts))

    def _hand_out(self, launched: Launched) -> None:
        for served, token, logprobs, experts in launched.tokens():
            if served is None or served.end is not None:
                continue
            if token == self._config.vocab_size:
                served.fail(unusable(served))
                continue
            self._counts["made tokens"] += 1
            served.hand_out(token, logprobs, experts)

    def _lose_device_state(self, error: RuntimeError) -> None:
        """Handles an error of the device, usually too little memory. The requests being computed fail; others go on."""
        remedy = "it lacks memory, so try a shorter text or try later" if lacks_memory(error) else "try again"
        for served in [served for number, served in self._alive.items() if number not in self._waiting]:
            served.fail(EngineError(f"The device couldn't compute this ({error}): {remedy}."))
        self._forget_device_state()
        self._beginnings.forget()

    def _forget_device_state(self) -> None:
        self._reading, self._joining, self._decoding, self._launched = {}, [], [], []
        mx.clear_cache()
