"""Speculation: several drafted tokens are verified by one pass of the model.

A pass over the last token and a draft gives the logits behind each of them. From each position's logits a token is
chosen, with the key and the penalties that it would have without speculation. As long as the draft equals these
choices, single passes would have chosen them too, so the distribution is exact. The first choice that differs from the
draft is right as well. The rest is dropped, and the cache is cut back.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from dbrx_fn.errors import InputError
from dbrx_fn.generation.drafts import WIDTHS, Drafter
from dbrx_fn.generation.generated import Held, read_token
from dbrx_fn.generation.sampling import History, Key, Sampling, init_history, sample
from dbrx_fn.model.cache import Cache, grow_cache
from dbrx_fn.model.cache_rows import rewind
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import check_fields
from dbrx_fn.runtime.device import backend
from dbrx_fn.runtime.memory import wired

MOST_DRAFTED = max(WIDTHS) - 1


@dataclass(frozen=True)
class Speculation:
    """Speculation with drafts that are looked up in the text so far.

    `num_draft_tokens`: the most tokens to draft at once, from 1 to 31.

    Raises:
        InputError: if it is out of that range.
    """

    num_draft_tokens: int = MOST_DRAFTED

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.num_draft_tokens <= MOST_DRAFTED:
            raise InputError(f"num_draft_tokens is {self.num_draft_tokens} where it must be from 1 to {MOST_DRAFTED}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of tokens in verifying passes, ascending. Each is a trace."""
        return tuple(sorted({min(width, self.num_draft_tokens + 1) for width in WIDTHS}))


@dataclass(frozen=True, eq=False)
class Chosen:
    """The choice behind each token of a pass.

    `tokens`: int32 `[time]`.
    `keys`, `histories`: what the choice behind that needs, as `sample` returns it.
    """

    tokens: mx.array
    keys: Sequence[Key]
    histories: Sequence[History | None]


def verify(
    params: Params, tokens: mx.array, cache: Cache, key: Key, history: History | None, *, sampling: Sampling
) -> tuple[Chosen, Cache]:
    """Runs the last token and its draft, int32 `[1 time]`, through the model, and chooses a token behind each of them.

    A choice is what `sample` chooses without speculation, if the draft is right up to there. Nothing waits for the
    device.
    """
    # On GPUs a span that follows the text's length would be traced at one length after another.
    logits, cache = forward(params, tokens, cache, whole_cache=backend() != "cpu")
    time = tokens.shape[1]
    if history is None and sampling.temperature == 0:
        chosen, key, _ = sample(logits[0], key, None, sampling=sampling)
        return Chosen(chosen, [key] * time, [None] * time), cache
    each, keys, histories = list[mx.array](), list[Key](), list[History | None]()
    for place in range(time):
        chosen, key, history = sample(logits[:, place], key, history, sampling=sampling)
        each.append(chosen)
        keys.append(key)
        histories.append(history)
    return Chosen(mx.concatenate(each), keys, histories), cache


class _Run:
    """A generation between its passes: the next token `[1]`, and what the choice behind it needs."""

    def __init__(
        self, params: Params, held: Held, sampling: Sampling, token: mx.array, key: Key, history: History | None
    ) -> None:
        self._params, self._held, self._sampling = params, held, sampling
        self.token, self._key, self._history = token, key, history

    def step(self) -> None:
        """Runs the token through the model, and chooses the next one."""
        held = self._held
        held.cache = grow_cache(held.cache, held.cache.lengths[0] + 1)
        logits, held.cache = forward(self._params, self.token[:, None], held.cache)
        self.token, self._key, self._history = sample(logits[:, 0], self._key, self._history, sampling=self._sampling)
        held.passes += 1
        mx.async_eval(self.token)

    def verify(self, tokens: Sequence[int]) -> Chosen:
        """Runs the token and its draft through the model. The cache then shows only the token of them."""
        held = self._held
        length = held.cache.lengths[0]
        held.cache = grow_cache(held.cache, length + len(tokens))
        chosen, held.cache = verify(
            self._params, mx.array([tokens], mx.int32), held.cache, self._key, self._history, sampling=self._sampling
        )
        held.cache = rewind(held.cache, [length + 1])
        held.passes += 1
        mx.async_eval(chosen.tokens)
        return chosen

    def show_one_more(self) -> None:
        """Has the cache show the draft's next token. `verify` has written its keys and values."""
        self._held.cache = replace(self._held.cache, lengths=(self._held.cache.lengths[0] + 1,))

    def go_on(self, chosen: Chosen, right: int) -> None:
        """Goes on with the choice behind the draft's first `right` tokens."""
        self.token = chosen.tokens[right : right + 1]
        self._key, self._history = chosen.keys[right], chosen.histories[right]


def speculated(
    params: Params,
    config: Config,
    prompt: Sequence[int],
    held: Held,
    max_tokens: int,
    sampling: Sampling,
    key: Key,
    stop_tokens: frozenset[int],
    chunk_size: int,
    speculation: Speculation,
) -> Generator[int]:
    """The tokens of `stream_tokens`, for arguments that it has checked.

    Single tokens run as without speculation: the device computes the next one while the caller uses the last one. A
    pass that verifies a draft starts after the token before it has been read.
    """
    history = init_history([list(prompt)], config.vocab_size) if sampling.uses_history else None
    with wired(params):
        unread = mx.array([prompt[held.cache.lengths[0] :]], mx.int32)
        logits, held.cache = forward(params, unread, held.cache, last_only=True, chunk_size=chunk_size)
        run = _Run(params, held, sampling, *sample(logits[:, 0], key, history, sampling=sampling))
        mx.async_eval(run.token)
        drafter = Drafter(speculation.widths, prompt)
        left, read, timed = max_tokens, False, False
        while left:
            start, current = time.perf_counter(), run.token
            single = not read and drafter.width(left) == 1
            if single and left > 1:
                run.step()
            token = read_token(current, len(prompt) + max_tokens - left, config)
            if single and timed:
                drafter.pace.note_time(1, time.perf_counter() - start)
            drafter.push(token)
            left, timed = left - 1, single
            if token in stop_tokens or not left:
                yield token
                return
            width = 1 if single else drafter.width(left)
            if width > 1:
                right = yield from _verified(run, drafter, token, width, left, stop_tokens)
                if right is None:
                    return
                left, read = left - right, True
            else:
                if not single:
                    run.step()
                read = False
                yield token


def _verified(
    run: _Run, drafter: Drafter, token: int, width: int, left: int, stop_tokens: frozenset[int]
) -> Generator[int, None, int | None]:
    """Yields the token, and then as much of its draft as is right.

    Args:
        run: stands at the token.
        drafter: makes the draft.
        token: the last token, which the model hasn't read.
        width: the number of tokens in the pass.
        left: how many tokens may follow `token`. At least one of them is left for the next pass.
        stop_tokens: tokens that end the text.

    Returns:
        How many of the draft's tokens were right; `None` if the last one ends the text.
    """
    start = time.perf_counter()
    draft = drafter.draft(width - 1)
    chosen = run.verify([token, *draft])
    seconds = time.perf_counter() - start
    yield token
    start = time.perf_counter()
    # Waits for the device.
    tokens: list[int] = chosen.tokens.tolist()  # type: ignore[assignment]
    drafter.pace.note_time(width, seconds + time.perf_counter() - start)
    right = 0
    while right < min(len(draft), left - 1) and tokens[right] == draft[right]:
        run.show_one_more()
        drafter.push(tokens[right])
        yield tokens[right]
        if tokens[right] in stop_tokens:
            return None
        right += 1
    run.go_on(chosen, right)
    return right
