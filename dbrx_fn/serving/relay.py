"""Hands the engine's events to an event loop, with one wake-up for all events of a turn."""

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field

from dbrx_fn.serving.request import Event, Receive


@dataclass(eq=False)
class Inbox:
    """Events of one HTTP request's choices, for a task of the event loop.

    `gone`: whether the client disconnected.
    """

    gone: bool = False
    _events: list[tuple[int, Event]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self) -> list[tuple[int, Event]]:
        """All new events, each with its choice's number. Waits until there is one, or the client disconnects."""
        await self._changed.wait()
        self._changed.clear()
        events, self._events = self._events, []
        return events

    def put(self, choice: int, event: Event) -> None:
        """Adds an event."""
        self._events.append((choice, event))
        self._changed.set()

    def leave(self) -> None:
        """Marks the client as disconnected."""
        self.gone = True
        self._changed.set()


class Relay:
    """Hands events over to the running event loop.

    A turn of the engine has events for many streams. The first one wakes the loop, which takes all that have arrived by
    then.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: deque[tuple[Inbox, int, Event]] = deque()
        self._woken = False

    def receiver(self, inbox: Inbox, choice: int) -> Receive:
        """The function that the engine calls with a choice's events."""

        def receive(event: Event) -> None:
            with self._lock:
                self._events.append((inbox, choice, event))
                wakes, self._woken = not self._woken, True
            if wakes:
                self._loop.call_soon_threadsafe(self._deliver)

        return receive

    def _deliver(self) -> None:
        with self._lock:
            events, self._events = self._events, deque()
            self._woken = False
        for inbox, choice, event in events:
            inbox.put(choice, event)
