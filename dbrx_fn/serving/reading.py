"""Prefill: reads one prompt into a cache, chunk by chunk, up to the answer's first token."""

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.generation.row_sampling import Choice, RowLogprobs, row_logprobs
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.batch import Batch, chosen, first_rows
from dbrx_fn.serving.request import MOST_TOP_LOGPROBS, Experts, Request, TokenLogprobs


@dataclass(eq=False)
class Reading:
    """A prompt in prefill, with its cache of one row.

    `tokens`: the tokens to read: the prompt, and what a preempted request had already generated.
    `cached_tokens`: how many of them the cache held from the start.
    """

    request: Request
    tokens: tuple[int, ...]
    cache: Cache
    cached_tokens: int
    _logits: mx.array | None = None
    _experts: mx.array | None = None
    _logprobs: list[RowLogprobs] = field(default_factory=list)

    @property
    def held(self) -> int:
        """Number of tokens that the cache holds."""
        return self.cache.lengths[0]

    @property
    def is_done(self) -> bool:
        """Whether all tokens have been read."""
        return self.held == len(self.tokens)

    def read(self, params: Params, width: int) -> None:
        """Reads the next `width` tokens, or all that are left. Waits for the chunk before, but not for this one."""
        if self._logits is not None:
            mx.eval(self._logits)
        chunk = mx.array([self.tokens[self.held : self.held + width]], mx.int32)
        wants_all = self.request.prompt_logprobs
        following = self.tokens[self.held + 1 : self.held + 1 + width]
        if self.request.experts:
            logits, self.cache, self._experts = forward(
                params, chunk, self.cache, last_only=not wants_all, chunk_size=width, with_experts=True
            )
        else:
            logits, self.cache = forward(params, chunk, self.cache, last_only=not wants_all, chunk_size=width)
        if wants_all and following:
            self._logprobs.append(
                row_logprobs(logits[0, : len(following)], mx.array(following, mx.int32), top=MOST_TOP_LOGPROBS)
            )
        self._logits = logits[:, -1]
        mx.async_eval(self._logits, self._experts, self._logprobs, self.cache.keys, self.cache.values)

    def first_token(self, allowed: NDArray[np.uint32] | None = None) -> tuple[Choice, Batch]:
        """The token after what was read, and a batch of one row that goes on from it.

        Args:
            allowed: the tokens that may be chosen, uint32 `[words]`; all if not given.
        """
        assert self._logits is not None
        made = self.tokens[len(self.request.prompt) :]
        choice, rows = chosen(self._logits, first_rows(self.request, made, self._logits.shape[-1]), [allowed])
        return choice, Batch(self.cache, replace(rows, experts=self._experts))

    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """Log-probabilities of the prompt's tokens, if asked for; the first has none. Waits for the device."""
        found = [one for chunk in self._logprobs for one in in_words(chunk, self.request.top_logprobs or 0)]
        return (None, *found)[: len(self.request.prompt)] if found else ()


def in_words(logprobs: RowLogprobs, top: int) -> list[TokenLogprobs]:
    """Each row's log-probabilities, with the `top` most likely tokens. Waits for the device."""
    chosen, tokens, likeliest = (np.array(part) for part in logprobs)
    return [
        TokenLogprobs(one, tuple(zip(ids, values, strict=True)))
        for one, ids, values in zip(chosen.tolist(), tokens[:, :top].tolist(), likeliest[:, :top].tolist(), strict=True)
    ]


def experts_of(experts: mx.array) -> list[Experts]:
    """Each row's experts, from `[layers batch top_k]`. Waits for the device."""
    rows = np.sort(np.array(experts), axis=-1).swapaxes(0, 1).tolist()
    return [tuple(map(tuple, layers)) for layers in rows]
