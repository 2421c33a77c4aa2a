"""One choice in progress: turns the engine's tokens into the deltas that clients get."""

from collections.abc import Sequence
from dataclasses import dataclass

from dbrx_fn.generation.stream import FinishReason
from dbrx_fn.generation.text_cutter import TextCutter
from dbrx_fn.serving.request import Experts, Request, TokenLogprobs, TokenMade
from dbrx_fn.serving.served_model import ServedModel


@dataclass(frozen=True)
class Entry:
    """A token with its log-probabilities.

    `token`: its id.
    `offset`: number of characters of the text before it.
    `logprobs`: `None` for a prompt's first token.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Delta:
    """What a token adds to a text: the characters that are certain, perhaps none, and why the text ended, if it did.

    `entries`, `experts`: one per token, if asked for.
    """

    text: str = ""
    entries: tuple[Entry, ...] = ()
    experts: tuple[Experts, ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """A text in progress.

    Args:
        request: the engine's request.
        model: the served model.
        stop_strings: strings that end the text.
        echo: the prompt that the text begins with; `None` for no echo.
        prompt_only: whether the token that the engine generates is left out.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        stop_strings: Sequence[str] = (),
        echo: str | None = None,
        *,
        prompt_only: bool = False,
    ) -> None:
        self._request, self._model, self._echo, self._prompt_only = request, model, echo, prompt_only
        self._cutter = TextCutter(model.tokenizer, request.stop_tokens, stop_strings)
        self._offset = 0
        self.made = 0
        self.ended = False

    def begin(self, logprobs: Sequence[TokenLogprobs | None]) -> Delta:
        """The delta of the echoed prompt, with its tokens' log-probabilities if they are wanted."""
        if self._echo is None:
            return Delta()
        stream = self._model.tokenizer.stream(skip_special_tokens=False)
        entries = []
        for token, of_token in zip(self._request.prompt, logprobs, strict=bool(logprobs)):
            entries.append(Entry(token, self._offset, of_token))
            self._offset += len(stream.push(token))
        self._offset = len(self._echo)
        return Delta(self._echo, tuple(entries))

    def push(self, event: TokenMade) -> Delta:
        """The delta of a token."""
        if self._prompt_only:
            self.ended = True
            return Delta(finish_reason="length")
        self.made += 1
        text, stopped = self._cutter.push(event.token, last=event.finish_reason is not None)
        entries = () if event.logprobs is None else (Entry(event.token, self._offset, event.logprobs),)
        self._offset += len(text)
        reason: FinishReason | None = "stop" if stopped else event.finish_reason
        self.ended = reason is not None
        return Delta(text, entries, () if event.experts is None else (event.experts,), reason)
