"""What the API's endpoints share: the model, its engine, and the requests that are open."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

from dbrx_fn.errors import BusyError
from dbrx_fn.serving.bodies import Bodies
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.metrics import Metrics
from dbrx_fn.serving.relay import Relay
from dbrx_fn.serving.served_model import ServedModel

_WORKERS = 2
"""Number of threads for small work, and for large work: they parse bodies, encode prompts, write long answers."""

_LARGE = 2**14
"""A body with at least this many bytes is large work: it has some thousands of tokens."""

Result = TypeVar("Result")


class Service:
    """A model that is being served. It belongs to the event loop that is running when it is made.

    `open`: requests that are being read or answered.
    `draining`: whether the server is shutting down and takes no more requests.

    Args:
        model: the served model.
        engine: serves the requests.
        most_open: requests that may be open at once.
    """

    def __init__(self, model: ServedModel, engine: Engine, *, most_open: int) -> None:
        self.model, self.engine, self._most_open = model, engine, most_open
        self.metrics = Metrics(engine.statistics)
        self.relay = Relay()
        self.open = 0
        self.draining = False
        self._bodies = Bodies()
        self._small_workers = ThreadPoolExecutor(_WORKERS, "dbrx_fn small work")
        self._large_workers = ThreadPoolExecutor(_WORKERS, "dbrx_fn large work")

    @property
    def is_well(self) -> bool:
        """Whether new requests are accepted."""
        return not self.draining and self.engine.failure is None

    @contextmanager
    def one_more_open(self) -> Iterator[None]:
        """Counts a request.

        Raises:
            BusyError: if the most requests are open already.
        """
        if self.open >= self._most_open:
            raise BusyError(f"{self.open} requests are open, the most that may be: try again later.")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def read(self, request: Request, reader: Callable[[bytes, ServedModel], Result]) -> Result:
        """Reads a request's body with a function that may take long.

        Raises:
            DbrxError: as `Bodies.read`, or from the function.
        """
        body = await self._bodies.read(request)
        return await self.aside(lambda: reader(body, self.model), large=len(body) > _LARGE)

    async def aside(self, work: Callable[[], Result], *, large: bool) -> Result:
        """Does some work on another thread, while the event loop goes on.

        Args:
            work: the work.
            large: whether it may take long. Small work doesn't wait for large work.
        """
        workers = self._large_workers if large else self._small_workers
        return await asyncio.get_running_loop().run_in_executor(workers, work)

    def close(self) -> None:
        """Ends the threads. They must be idle by then."""
        for workers in (self._small_workers, self._large_workers):
            workers.shutdown(wait=False, cancel_futures=True)
