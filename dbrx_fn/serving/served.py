"""One request in an engine, and the events that it sends."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.errors import DbrxError, GenerationError
from dbrx_fn.generation.stream import FinishReason
from dbrx_fn.generation.structured import Matcher
from dbrx_fn.serving.reading import Reading
from dbrx_fn.serving.request import Event, Experts, Failed, PromptRead, Receive, Request, TokenLogprobs, TokenMade
from dbrx_fn.serving.schedule import Work

_T = TypeVar("_T")
End = Literal["stop", "length", "cancelled", "failed"]


def unusable(served: "Served") -> GenerationError:
    """The error of a request whose logits allow no token."""
    return GenerationError(
        f"After {len(served.tokens)} tokens the model's numbers are no longer finite, or the request allows no token:"
        " try dtype float32 (--dtype float32)."
    )


@dataclass(eq=False)
class Served:
    """A request from its arrival to its end.

    `number`: its place in the order of arrival.
    `budget`: the most tokens that it may generate.
    `made`: tokens that were handed out.
    `launched`: number of tokens launched on the device.
    `reading`: its prefill, until the first token is handed out. Its cache is freed then: the batch has a copy.
    `end`: how it ended, if it did.
    `adapter`: the place of its adapter among the engine's, counted from 1; 0 for none.
    `matcher`: the matcher of its structure, if it has one.
    """

    number: int
    request: Request
    receive: Receive
    budget: int
    ended: Callable[["Served"], None]
    adapter: int = 0
    matcher: Matcher | None = None
    made: list[int] = field(default_factory=list)
    launched: int = 0
    reading: Reading | None = None
    end: End | None = None
    _told_prompt: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is known of its text."""
        return (*self.request.prompt, *self.made)

    @property
    def goes_on(self) -> bool:
        """Whether another of its tokens is to be launched."""
        return self.end is None and self.launched < self.budget

    def work(self, held: int) -> Work:
        """The scheduler's view, if a cache holds `held` of its tokens."""
        return Work(self.number, held, len(self.tokens), len(self.request.prompt) + self.budget - 1)

    def hand_out(self, token: int, logprobs: TokenLogprobs | None, experts: Experts | None) -> None:
        """Sends one more token, with the details that the request wants. The last one ends the request."""
        reading, self.reading = self.reading, None
        if reading is not None and not self._told_prompt:
            self._told_prompt = True
            self._tell(PromptRead(reading.cached_tokens, reading.prompt_logprobs()))
        self.made.append(token)
        reason: FinishReason | None = None
        if token in self.request.stop_tokens or (self.matcher is not None and token in self.matcher.stop_tokens):
            reason = "stop"
        elif len(self.made) == self.budget:
            reason = "length"
        if reason is not None:
            # The request counts as ended before its last token is sent.
            self.finish(reason)
        self._tell(TokenMade(token, reason, self._wanted(logprobs), experts if self.request.experts else None))
        if reason is None and self.matcher is not None:
            self._try(lambda matcher: matcher.advance(token))

    def _wanted(self, logprobs: TokenLogprobs | None) -> TokenLogprobs | None:
        top = self.request.top_logprobs
        return None if top is None or logprobs is None else replace(logprobs, top=logprobs.top[:top])

    def allowed(self) -> NDArray[np.uint32] | None:
        """The tokens that its structure allows next, one bit each; `None` for all. If there are none, it fails."""
        return self._try(lambda matcher: matcher.allowed()) if self.end is None else None

    def fail(self, error: DbrxError) -> None:
        """Ends the request with an error, unless it has ended."""
        if self.end is None:
            self.finish("failed")
            self._tell(Failed(error))

    def finish(self, end: End) -> None:
        """Ends the request without an event, unless it has ended."""
        if self.end is None:
            self.end = end
            # Whoever still refers to the request doesn't keep the cache of its prompt.
            self.reading = None
            self.ended(self)

    def _try(self, step: Callable[[Matcher], _T]) -> _T | None:
        try:
            return None if self.matcher is None else step(self.matcher)
        except GenerationError as error:
            self.fail(error)
            return None

    def _tell(self, event: Event) -> None:
        try:
            self.receive(event)
        except Exception:
            # If the receiver fails, its client has disconnected.
            self.finish("cancelled")
