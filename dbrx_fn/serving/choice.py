"""One text of an answer in the making: the engine's tokens as what clients are told of them."""

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
    `offset`: characters of the text before it.
    `logprobs`: `None` for the first of a prompt.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Delta:
    """What a token adds to a text: characters that are certain, perhaps none; how the text ended, if it did.

    `entries`, `experts`: one for the token, where asked for.
    """

    text: str = ""
    entries: tuple[Entry, ...] = ()
    experts: tuple[Experts, ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """A text in the making.

    Args:
        request: the engine's.
        model: what is served.
        stop_strings: they end the text.
        echo: what the text begins with; `None` if nothing of the prompt.
        prompt_only: whether the token that the engine makes is left out.
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
        """The prompt's part, whose tokens have these log-probabilities if they are wanted."""
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
        """A token's part."""
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
