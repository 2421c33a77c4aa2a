"""What an engine is asked, and what it answers, in tokens."""

from collections.abc import Callable
from dataclasses import dataclass

from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.generation.sampling import GREEDY, Sampling
from dbrx_fn.generation.stream import FinishReason
from dbrx_fn.generation.structured import Structure
from dbrx_fn.runtime.arguments import check_fields

MOST_TOP_LOGPROBS = 20


Experts = tuple[tuple[int, ...], ...]
"""For each layer the experts, in ascending order, that computed the logits from which a token was chosen. They are the
choice at the token before it, which is the last one of the prompt for the first token of an answer."""


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    `prompt`: token ids, at least one.
    `max_tokens`: the most to make; fewer if the model's context ends before.
    `sampling`: how to choose them.
    `seed`: for drawing. The same seed draws the same tokens from the same probabilities.
    `stop_tokens`: ids that end the text; the one that does is handed out too.
    `top_logprobs`: log-probabilities of how many likeliest tokens to hand out beside the chosen one's, at most 20;
        `None` for no log-probabilities.
    `structure`: what the text must be; anything, if not given. The engine needs a `TokenTrie` for it.
    `prompt_logprobs`: whether the prompt's tokens get log-probabilities too.
    `experts`: whether to tell which experts were chosen.

    Raises:
        InputError: naming a field whose value can't work.
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

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= (self.top_logprobs or 0) <= MOST_TOP_LOGPROBS:
            raise InputError(f"top_logprobs is {self.top_logprobs} where it must be from 0 to {MOST_TOP_LOGPROBS}.")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"The seed is {self.seed} where it must be from 0 to 2**64 - 1.")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities by the model's own logits.

    `chosen`: the token's own.
    `top`: (token, logarithm) of the likeliest tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read; the first token follows.

    `cached_tokens`: how many of its tokens were known from earlier requests.
    `logprobs`: of its tokens, where asked for; the first has none.
    """

    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True)
class TokenMade:
    """One token of the answer.

    `finish_reason`: `None` until the last one; there "stop" for a stop token, "length" for `max_tokens` or the end of
        the model's context.
    `logprobs`, `experts`: where asked for.
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
