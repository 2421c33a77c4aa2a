"""An HTTP request as read, and the fields that completions and chats share."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.serving.fields import FieldError, Fields, wrong_value
from dbrx_fn.serving.request import Request
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.structures import read_structure

_MOST_STOPS, _LONGEST_STOP = 4, 256
"""The most stop strings (OpenAI's limit), and the most characters of one. Each new token is checked for all of them."""


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    `requests`: one per choice, first those of the first prompt, then those of the next.
    `n`: choices per prompt.
    `stop_strings`: strings that end a text and are cut from it.
    `stream`: whether tokens are sent as they are generated.
    `include_usage`: whether a stream ends with the token counts.
    `echoes`: per prompt, the text that its answers begin with; `None` for none.
    `prompt_only`: `max_tokens` is 0, so the one token that the engine generates is dropped.
    """

    requests: tuple[Request, ...]
    n: int = 1
    stop_strings: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    echoes: tuple[str, ...] | None = None
    prompt_only: bool = False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.requests[0].top_logprobs is not None

    @property
    def adapter(self) -> str | None:
        """The adapter that answers; `None` for the model alone."""
        return self.requests[0].adapter

    @property
    def wants_experts(self) -> bool:
        """Whether the answer has the chosen experts."""
        return self.requests[0].experts


def read_request(fields: Fields, model: ServedModel, adapter: str | None, *, top_logprobs: int | None) -> Request:
    """A request whose prompt is still to be set, from the fields that completions and chats share."""
    structure = read_structure(fields)
    goes_on = fields.flag("ignore_eos")
    if goes_on and structure is not None:
        raise FieldError("ignore_eos", "ignore_eos doesn't go with structured output: leave one out.")
    return Request(
        prompt=(),
        max_tokens=model.max_tokens,
        sampling=_sampling(fields, model.defaults.sampling),
        seed=_seed(fields),
        stop_tokens=frozenset() if goes_on else model.tokenizer.stop_tokens,
        top_logprobs=top_logprobs,
        experts=fields.flag("experts"),
        structure=structure,
        adapter=adapter,
    )


def choices_of(
    request: Request, prompts: Iterable[Sequence[int]], n: int, max_tokens: int | None, model: ServedModel
) -> tuple[Request, ...]:
    """The request for each choice of each prompt. Choices of one prompt have consecutive seeds."""
    return tuple(
        replace(
            request,
            prompt=prompt,
            # A long prompt must not be refused for a default length, so the default shrinks.
            max_tokens=max_tokens or max(1, min(model.max_tokens, model.capacity + 1 - len(prompt))),
            seed=(request.seed + choice) % 2**64,
        )
        for prompt in map(tuple, prompts)
        for choice in range(n)
    )


def read_n(fields: Fields, model: ServedModel) -> int:
    """The number of choices per prompt."""
    return fields.whole("n", 1, model.most_choices) or 1


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = fields.flag("stream")
    options = fields.inner("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise FieldError("stream_options", "stream_options is given without stream: leave it out, or stream.")
    include_usage = options.flag("include_usage")
    options.refuse("include_obfuscation", False)
    options.finish()
    return stream, include_usage


def read_stops(fields: Fields, model: ServedModel, request: Request) -> tuple[str, ...]:
    """The stop strings. The default is the checkpoint's own, or none for a text with a structure, which ends anyway."""
    value = fields.take("stop")
    if value is None:
        return model.defaults.stop_strings if request.structure is None else ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise wrong_value("stop", value, f"a text or a list of at most {_MOST_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= _LONGEST_STOP:
            raise wrong_value("stop", stop, f"a text of 1 to {_LONGEST_STOP} characters")
    return tuple(stops)


def _sampling(fields: Fields, defaults: Sampling) -> Sampling:
    numbers = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0, 1e6),
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    top_k = fields.whole("top_k", -1, 2**31 - 1)
    bias = _logit_bias(fields, defaults.logit_bias)
    # Other servers accept -1 for all.
    top_k = defaults.top_k if top_k is None else max(top_k, 0)
    values: dict[str, Any] = {**given, "top_k": top_k, "logit_bias": bias}
    return replace(defaults, **values)


def _logit_bias(fields: Fields, default: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    given = fields.inner("logit_bias")
    if given is None:
        return default
    pairs = []
    for name in given.names:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise wrong_value("logit_bias", name, "a token's id for a name")
        pairs.append((int(name), given.number(name, -100, 100) or 0.0))
    return tuple(pairs)


def _seed(fields: Fields) -> int:
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    return secrets.randbits(64) if seed is None else seed % 2**64
