"""The endpoint of completions and chats: reads a request's body, and sends the answer whole or as a stream."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Literal, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dbrx_fn.errors import DbrxError
from dbrx_fn.serving.answering import Answering, ClientGone
from dbrx_fn.serving.asked import Asked
from dbrx_fn.serving.choice import Delta
from dbrx_fn.serving.event_stream import EventStream, as_events
from dbrx_fn.serving.failures import json_response
from dbrx_fn.serving.openai_objects import Form, told
from dbrx_fn.serving.relay import Inbox
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.service import Service

_MANY = 256
"""The most tokens with log-probabilities or experts that the event loop itself writes as JSON, in 1 to 2 ms."""

Written = TypeVar("Written")


class Answers:
    """An ASGI application that answers completions or chats.

    Args:
        service: serves the requests.
        kind: completions or chats.
        read: reads a request's body.
    """

    def __init__(
        self, service: Service, kind: Literal["completion", "chat"], read: Callable[[bytes, ServedModel], Asked]
    ) -> None:
        self._service, self._kind, self._read = service, kind, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request. Its texts are cancelled as soon as the client disconnects."""
        request, service = Request(scope, receive), self._service
        clock = service.metrics.clock()
        with service.one_more_open():
            asked = await service.read(request, self._read)
            inbox = Inbox()
            watcher = asyncio.create_task(_leave_when_gone(receive, inbox))
            try:
                async with Answering(asked, inbox, service, clock) as answering:
                    if asked.stream:
                        await self._stream(asked, answering, send)
                    else:
                        response = await self._whole(asked, answering)
                        await response(scope, receive, send)
            except ClientGone:
                # The client has disconnected, so there is nobody to answer.
                pass
            finally:
                watcher.cancel()

    def _form(self, asked: Asked) -> Form:
        prefix = "cmpl" if self._kind == "completion" else "chatcmpl"
        name = f"{prefix}-{secrets.token_hex(12)}"
        return Form(self._kind, name, int(time.time()), self._service.model, asked.adapter)

    async def _whole(self, asked: Asked, answering: Answering) -> Response:
        parts: list[list[Delta]] = [[] for _ in asked.requests]
        async with aclosing(answering.deltas()) as deltas:
            async for some in deltas:
                for index, delta in some:
                    parts[index].append(delta)
        form = self._form(asked)

        def response() -> Response:
            return json_response(form.answer(parts, answering.usage(), asked))

        return await self._written(response, [delta for deltas in parts for delta in deltas])

    async def _stream(self, asked: Asked, answering: Answering, send: Send) -> None:
        stream, form = EventStream(send), self._form(asked)
        begun: set[int] = set()

        def events(some: list[tuple[int, Delta]]) -> bytes:
            made = []
            for index, delta in some:
                if delta.text or delta.entries or delta.experts or delta.finish_reason or index not in begun:
                    made.append(form.chunk(index, delta, asked, first=index not in begun))
                    begun.add(index)
            return as_events(made)

        async def put(some: list[tuple[int, Delta]]) -> None:
            await stream.put(await self._written(lambda: events(some), [delta for _, delta in some]))

        async with aclosing(answering.deltas()) as deltas:
            # An error before the first token still gets its own HTTP status.
            first = await anext(deltas)
            await stream.begin()
            await put(first)
            try:
                async for some in deltas:
                    await put(some)
            except DbrxError as error:
                await stream.put(as_events([told(error)]))
            else:
                if asked.include_usage:
                    await stream.put(as_events([form.last_chunk(answering.usage())]))
        await stream.end()

    async def _written(self, write: Callable[[], Written], deltas: Sequence[Delta]) -> Written:
        """These parts as JSON, written on another thread if they are large."""
        many = sum(len(delta.entries) + len(delta.experts) for delta in deltas) > _MANY
        return await self._service.aside(write, large=True) if many else write()


async def _leave_when_gone(receive: Receive, inbox: Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.leave()
