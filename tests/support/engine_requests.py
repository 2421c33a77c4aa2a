"""A small model, requests of all kinds, and what an engine tells of them."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import compiles
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.request import Event, Failed, PromptRead, Request, TokenMade
from dbrx_fn.serving.warm_up import warm_up

CONFIG = Config(
    d_model=64,
    n_heads=4,
    n_layers=2,
    vocab_size=90,
    max_seq_len=4096,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2),
    dtype="float32",
)
PARAMS = init_params(CONFIG, mx.random.key(3))
mx.eval(PARAMS)
FAST = Limits(rows=4, positions=1 << 20, capacity=4096, chunk=128)
EXACT = Limits(rows=8, positions=1 << 20, capacity=1024, exact=True, chunk=128)


def tokens(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 90, length).tolist())


@contextmanager
def warmed_up(
    params: Params,
    config: Config,
    limits: Limits,
    *,
    prefixes: PrefixStore | None = None,
    adapters: Sequence[str] = (),
) -> Iterator[Engine]:
    """An engine that has met all its signatures. By itself it meets them first only where layers are compiled."""
    if not compiles():
        warm_up(params, config, limits)
    with Engine(params, config, limits, prefixes=prefixes, adapters=adapters) as engine:
        engine.wait_until_ready()
        yield engine


def requests(count: int) -> list[Request]:
    """All kinds of them."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(count):
        sampling = Sampling(
            temperature=float(rng.choice([0, 0.7, 1.2])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1, 0.9])),
            frequency_penalty=float(rng.choice([0, 0, 0.5])),
            logit_bias=((3, 1.5),) if number % 5 == 0 else (),
        )
        made.append(
            Request(
                tokens(number, int(rng.choice([1, 9, 60, 700]))),
                max_tokens=int(rng.integers(1, 20)),
                sampling=sampling,
                seed=number,
                stop_tokens=frozenset({17}),
                top_logprobs=[None, 0, 4][number % 3],
                experts=number % 4 == 2,
            )
        )
    return made


class Events:
    """What the engine says of some requests."""

    def __init__(self, count: int) -> None:
        self.of: list[list[Event]] = [[] for _ in range(count)]
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def receiver(self, number: int) -> Any:
        def receive(event: Event) -> None:
            self.of[number].append(event)
            if isinstance(event, Failed) or (isinstance(event, TokenMade) and event.finish_reason):
                self._ended.put(number)

        return receive

    def wait(self, count: int) -> None:
        for _ in range(count):
            self._ended.get(timeout=120)


def served(
    limits: Limits, asked: list[Request], order: list[int], prefixes: PrefixStore | None = None
) -> list[list[Event]]:
    """What each of `asked` gets, if they come in this order, all at once."""
    events = Events(len(asked))
    with Engine(PARAMS, CONFIG, limits, prefixes=prefixes) as engine:
        for number in order:
            engine.submit(asked[number], events.receiver(number))
        events.wait(len(asked))
    return events.of


def made(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenMade)]


def without_prompts(answers: list[list[Event]]) -> list[list[Event]]:
    return [[event for event in events if not isinstance(event, PromptRead)] for events in answers]
