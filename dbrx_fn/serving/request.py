"""Requests to an engine and its events, in tokens."""

from collections.abc import Callable
from dataclasses import dataclass

from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.generation.sampling import GREEDY, Sampling
from dbrx_fn.generation.stream import FinishReason
from dbrx_fn.generation.structured import Structure
from dbrx_fn.runtime.arguments import check_fields

MOST_TOP_LOGPROBS = 20


Experts = tuple[tuple[int, ...], ...]
"""Per layer, the experts that computed the logits of a token, in ascending order. They are the router's choice at the
token before it. For an answer's first token that is the prompt's last one."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    `prompt`: token ids, at least one.
    `max_tokens`: the most tokens to generate; fewer if the model's context ends before.
    `sampling`: how to choose tokens.
    `seed`: seed for drawing. It draws the same tokens from the same probabilities.
    `stop_tokens`: ids that end the text. The one that ends it is handed out too.
    `top_logprobs`: number of most likely tokens with log-probabilities, besides the chosen one, at most 20; `None`
        for no log-probabilities.
    `structure`: the form of the text, if it must have one. The engine needs a `TokenTrie` for it.
    `prompt_logprobs`: whether the prompt's tokens get log-probabilities too.
    `experts`: whether each token comes with its chosen experts.
    `adapter`: the name of one of the engine's adapters; `None` for the model alone.

    Raises:
        InputError: naming a field with an impossible value.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 100
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    structure: Structure | None = None
    experts: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= (self.top_logprobs or 0) <= MOST_TOP_LOGPROBS:
            raise InputError(f"top_logprobs is {self.top_logprobs} where it must be from 0 to {MOST_TOP_LOGPROBS}.")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"The seed is {self.seed} where it must be from 0 to 2**64 - 1.")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities by the model's own logits.

    `chosen`: the chosen token's.
    `top`: (token, log-probability) of the most likely tokens, the most likely first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read; the first token follows.

    `cached_tokens`: how many of its tokens the prefix cache held.
    `logprobs`: of its tokens, if asked for; the first has none.
    """

    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True)
class TokenMade:
    """One token of the answer.

    `finish_reason`: `None` before the last token. On it "stop" for a stop token, "length" for `max_tokens` or the end
        of the model's context.
    `logprobs`, `experts`: if asked for.
    """

    token: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Failed:
    """The request ended with an error."""

    error: DbrxError


Event = PromptRead | TokenMade | Failed
Receive = Callable[[Event], None]
"""Called on the engine's thread, so it must only hand the event on."""
