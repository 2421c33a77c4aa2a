"""An answer in progress: a request's choices in the engine, from submission to the end of the last one."""

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType

from dbrx_fn.serving.asked import Asked
from dbrx_fn.serving.choice import Choice, Delta
from dbrx_fn.serving.metrics import Clock
from dbrx_fn.serving.openai_objects import Usage
from dbrx_fn.serving.relay import Inbox
from dbrx_fn.serving.request import Failed, PromptRead, Request
from dbrx_fn.serving.service import Service


class ClientGone(Exception):
    """The client has disconnected."""


class Answering:
    """Submits the choices of a request, and follows them.

        async with Answering(asked, inbox, service, clock) as answering:
            async for deltas in answering.deltas():
                for index, delta in deltas:
                    ...

    When the block ends for any reason, running choices are cancelled.

    Raises:
        DbrxError: on entering, as `Engine.submit`.
    """

    def __init__(self, asked: Asked, inbox: Inbox, service: Service, clock: Clock) -> None:
        self._asked, self._inbox, self._service, self._clock = asked, inbox, service, clock
        echoes = asked.echoes or (None,) * len(asked.requests)
        self.choices = [
            Choice(
                request,
                service.model,
                asked.stop_strings,
                echoes[index // asked.n],
                prompt_only=asked.prompt_only,
            )
            for index, request in enumerate(asked.requests)
        ]
        self._numbers: list[int] = []
        self._cached = 0

    async def __aenter__(self) -> "Answering":
        try:
            for index, request in enumerate(self._asked.requests):
                await self._submit(index, request)
        except BaseException:
            self._cancel()
            raise
        return self

    async def _submit(self, index: int, request: Request) -> None:
        engine, receive = self._service.engine, self._service.relay.receiver(self._inbox, index)

        def submit() -> None:
            self._numbers.append(engine.submit(request, receive))

        if request.structure is None:
            submit()
            # Each prompt is looked through once more: others go on in between.
            await asyncio.sleep(0)
        else:
            # A structure is compiled then.
            await self._service.aside(submit, large=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    async def deltas(self) -> AsyncGenerator[list[tuple[int, Delta]]]:
        """Yields the choices' new deltas, all that are available at a time, until every choice has ended.

        Raises:
            DbrxError: the error of a failed choice.
            ClientGone: if the client disconnected.
        """
        while not all(choice.ended for choice in self.choices):
            events = await self._inbox.take()
            if self._inbox.gone:
                raise ClientGone
            deltas = []
            for index, event in events:
                choice = self.choices[index]
                if choice.ended:
                    continue
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, PromptRead):
                    # Choices of one prompt read it as one, as far as anybody is told.
                    self._cached += event.cached_tokens if index % self._asked.n == 0 else 0
                    deltas.append((index, choice.begin(event.logprobs)))
                    continue
                deltas.append((index, choice.push(event)))
                self._clock.token(index)
                if choice.ended and event.finish_reason is None:
                    self._service.engine.cancel(self._numbers[index])
            if deltas:
                yield deltas

    def usage(self) -> Usage:
        """Tokens so far."""
        prompts = self._asked.requests[:: self._asked.n]
        return Usage(
            prompt=sum(len(request.prompt) for request in prompts),
            cached=self._cached,
            made=sum(choice.made for choice in self.choices),
        )

    def _cancel(self) -> None:
        for number, choice in zip(self._numbers, self.choices, strict=False):
            if not choice.ended:
                self._service.engine.cancel(number)
