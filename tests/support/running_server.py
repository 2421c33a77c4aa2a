"""A server of the small model in this process, on a free port, for as long as a block lasts."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.errors import EngineError
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.generation.structured import token_trie
from dbrx_fn.model.config import Config
from dbrx_fn.model.stacked_adapters import stack_adapters
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.access import Access
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.server import Server, Settings, bound
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from tests.support.adapters import with_random_adapters


@cache
def small_model() -> tuple[Params, Config, Tokenizer]:
    """The model that ships, and its tokenizer."""
    return (*load(SMALL), read_tokenizer(SMALL))


@dataclass
class Running:
    """A server that runs.

    `failure`: what it ended with, if it has.
    """

    url: str
    engine: Engine
    server: Server
    thread: threading.Thread
    failure: EngineError | None = None


@contextmanager
def running_server(
    access: Access | None = None,
    *,
    rows: int = 8,
    queue: int = 64,
    drain: float = 0.0,
    most_open: int = 100,
    adapters: Sequence[str] = (),
) -> Iterator[Running]:
    """Serves within the block. A text may have 2,048 tokens. Adapters are random ones, by these names."""
    params, config, tokenizer = small_model()
    trees = [with_random_adapters(params, config, ("attention",), seed=seed) for seed in range(len(adapters))]
    params = stack_adapters(params, config, trees)
    limits = Limits(rows=rows, positions=1 << 20, capacity=2048, chunk=128)
    engine = Engine(
        params, config, limits, trie=token_trie(tokenizer, config.vocab_size), queue=queue, adapters=adapters
    )
    engine.wait_until_ready()
    model = ServedModel(
        name="small",
        created=1,
        config=config,
        tokenizer=tokenizer,
        capacity=limits.capacity,
        defaults=read_generation_config(SMALL),
        max_tokens=24,
        most_choices=min(128, queue),
        adapters=tuple(adapters),
    )
    server = Server(bound("127.0.0.1", 0), model, engine, Settings(access or Access(), most_open, drain))
    is_ready = threading.Event()

    def run() -> None:
        try:
            server.run(ready)
        except EngineError as error:
            running.failure = error

    def ready(url: str) -> None:
        running.url = url
        is_ready.set()

    running = Running("", engine, server, threading.Thread(target=run))
    running.thread.start()
    try:
        assert is_ready.wait(30)
        yield running
    finally:
        server.stop()
        running.thread.join(60)
        assert not running.thread.is_alive()
