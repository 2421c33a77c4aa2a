"""Generation: `stream_tokens` yields tokens one at a time, and `stream_text` adds the tokenizer.

The next token is being computed while the caller uses the last one. The loop waits for the device only to read the
token that it yields.
"""

import operator
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import mlx.core as mx

from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.generation.generated import Held, read_token
from dbrx_fn.generation.sampling import GREEDY, Key, Sampling, init_history, sample
from dbrx_fn.generation.speculation import Speculation, speculated, verify
from dbrx_fn.generation.structured import Matcher, Structure, token_trie
from dbrx_fn.generation.text_cutter import TextCutter
from dbrx_fn.model.cache import Cache, grow_cache, init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.shapes import CHUNK_SIZE, capacity_bucket, shallow, traced_first
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.memory import wired
from dbrx_fn.text.prompt_length import encode_prompt
from dbrx_fn.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
T = TypeVar("T")
_AHEAD = 256
"""The cache has room for this many new tokens at first, and grows later. So short answers attend to fewer slots."""


@dataclass(frozen=True)
class Piece:
    """One token's contribution to a text.

    `token`: its id.
    `text`: the characters that this token made complete and certain, perhaps none.
    `finish_reason`: `None` until the last piece. There it is "stop" after a stop token or string, or "length" at
        `max_tokens` or the end of the model's context.
    """

    token: int
    text: str
    finish_reason: FinishReason | None


class Stream(Iterator[T], Generic[T]):
    """An iterator of tokens or pieces, which are made when they are asked for. It also gives the cache.

    stream = stream_tokens(params, config, prompt)
    text = [*prompt, *stream]
    cache = stream.cache
    stream = stream_tokens(params, config, [*text, *more], cache=cache)  # computes `more` and the last of `text`
    """

    def __init__(self, made: Generator[T], held: Held) -> None:
        self._made, self._held = made, held

    def __next__(self) -> T:
        return next(self._made)

    def close(self) -> None:
        """Ends the stream early."""
        self._made.close()

    @property
    def cache(self) -> Cache:
        """Keys and values of the text so far: the prompt, then the generated tokens.

        The last generated token may be missing. Before the end of the stream, a token that hasn't been yielded yet may
        be included; `rewind` removes it.
        """
        return self._held.cache

    @property
    def passes(self) -> int:
        """How often the model has run behind the prompt: once for each token, or less often with speculation."""
        return self._held.passes


@checked
def stream_tokens(
    params: Params,
    config: Config,
    prompt: Iterable[int],
    *,
    max_tokens: int = 100,
    sampling: Sampling = GREEDY,
    key: Key | None = None,
    stop_tokens: Iterable[int] = (),
    matcher: Matcher | None = None,
    chunk_size: int = CHUNK_SIZE,
    cache: Cache | None = None,
    speculation: Speculation | None = None,
) -> Stream[int]:
    """The tokens that follow `prompt`, including the stop token if one comes.

    Args:
        params: the tree.
        config: its config.
        prompt: token ids, at least one, at most `config.max_seq_len`.
        max_tokens: the most tokens to generate. There are fewer if the context ends before.
        sampling: how to choose tokens. The most likely ones, if not given.
        key: an `mx.random.key`. Required if `sampling` has a temperature.
        stop_tokens: ids that end the text.
        matcher: allows only tokens that its structure asks for. It is advanced behind each token. The text ends as soon
            as nothing but a stop token can follow.
        chunk_size: number of prompt tokens computed at once.
        cache: keys and values of the prompt's first tokens, which aren't computed again.
        speculation: drafts tokens and verifies several in one pass, where that is faster (`docs/speculation.md`). Not
            for a matcher, whose tokens depend on the ones before, nor for a model that several processes share.

    Raises:
        InputError: if an argument has an impossible value, or two of them can't be combined.
        CacheError: if the cache isn't one row of this model's, or isn't shorter than the prompt.
        GenerationError: at a token, if the model's logits aren't finite, or no token fits the structure.
    """
    _check_drawing(sampling, key)
    prompt = token_ids("The prompt", prompt, config)
    max_tokens = token_budget(prompt, config, max_tokens)
    ends = frozenset(token_ids("stop_tokens", stop_tokens, config))
    _check_speculation(speculation, matcher is not None, config)
    capacity = _first_capacity(len(prompt), max_tokens, speculation)
    if cache is None:
        cache = init_cache(config, 1, capacity)
    _check_known(cache, prompt, config)
    held = Held(grow_cache(cache, capacity))
    key = mx.random.key(0) if key is None else key
    if speculation is None:
        made = _tokens(params, config, prompt, held, max_tokens, sampling, key, ends, matcher, chunk_size)
    else:
        made = speculated(params, config, prompt, held, max_tokens, sampling, key, ends, chunk_size, speculation)
    return Stream(made, held)


def _tokens(
    params: Params,
    config: Config,
    prompt: list[int],
    held: Held,
    max_tokens: int,
    sampling: Sampling,
    key: Key,
    stop_tokens: frozenset[int],
    matcher: Matcher | None,
    chunk_size: int,
) -> Generator[int]:
    history = init_history([prompt], config.vocab_size) if sampling.uses_history else None
    with wired(params):
        unread = mx.array([prompt[held.cache.lengths[0] :]], mx.int32)
        logits, held.cache = forward(params, unread, held.cache, last_only=True, chunk_size=chunk_size)
        if matcher is not None:
            # With a structure, the device computes logits while the host finds the tokens that may follow.
            mx.async_eval(logits)
        token, key, history = sample(logits[:, 0], key, history, _allowed(matcher), sampling=sampling)
        mx.async_eval(token)
        for remaining in reversed(range(max_tokens)):
            current = token
            if remaining:
                held.cache = grow_cache(held.cache, held.cache.lengths[0] + 1)
                logits, held.cache = forward(params, current[:, None], held.cache)
                held.passes += 1
                if matcher is None:
                    token, key, history = sample(logits[:, 0], key, history, sampling=sampling)
                mx.async_eval(token if matcher is None else logits)
            made = read_token(current, len(prompt) + max_tokens - 1 - remaining, config)
            if matcher is not None:
                matcher.advance(made)
                if remaining and not matcher.finished:
                    token, key, history = sample(logits[:, 0], key, history, _allowed(matcher), sampling=sampling)
                    mx.async_eval(token)
            yield made
            if made in stop_tokens or (matcher is not None and matcher.finished):
                return


def _allowed(matcher: Matcher | None) -> mx.array | None:
    return None if matcher is None else mx.array(matcher.allowed())[None]


@checked
def stream_text(
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    prompt: str | Iterable[int],
    *,
    max_tokens: int = 100,
    sampling: Sampling = GREEDY,
    key: Key | None = None,
    stop_tokens: Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    structure: Structure | None = None,
    chunk_size: int = CHUNK_SIZE,
    cache: Cache | None = None,
    speculation: Speculation | None = None,
) -> Stream[Piece]:
    """The text that follows `prompt`, one piece per token, as `stream_tokens` generates them.

    No piece ends within a character, and none holds a part of a stop token or stop string.

    Args:
        params: the tree.
        config: its config.
        tokenizer: the checkpoint's.
        prompt: text, or its tokens.
        max_tokens: the most tokens to generate.
        sampling: how to choose tokens. The most likely ones, if not given.
        key: an `mx.random.key`. Required if `sampling` has a temperature.
        stop_tokens: ids that end the text. `tokenizer.stop_tokens`, if not given.
        stop_strings: strings that end the text.
        structure: what the text must be. A text that ends with "stop" is that, unless one of your stop strings cut it.
            A text that ends with "length" may be only the beginning.
        chunk_size: number of prompt tokens computed at once.
        cache, speculation: as in `stream_tokens`.

    Raises:
        InputError: as in `stream_tokens`, or if a stop string is empty.
        CacheError, GenerationError: as in `stream_tokens`.
    """
    check_limits(max_tokens, stop_strings)
    stop_tokens = tokenizer.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
    if isinstance(prompt, str):
        tokens = encode_prompt(tokenizer, prompt, config.max_seq_len)
    else:
        tokens = token_ids("The prompt", prompt, config)
    budget = token_budget(tokens, config, max_tokens)
    matcher = None
    if structure is not None:
        matcher = token_trie(tokenizer, config.vocab_size, stop_tokens).matcher(structure)
    cutter = TextCutter(tokenizer, stop_tokens, stop_strings)
    made = stream_tokens(
        params,
        config,
        tokens,
        max_tokens=budget,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        matcher=matcher,
        chunk_size=chunk_size,
        cache=cache,
        speculation=speculation,
    )
    return Stream(_pieces(made, cutter, matcher, budget), made._held)


def _pieces(made: Iterator[int], cutter: TextCutter, matcher: Matcher | None, budget: int) -> Generator[Piece]:
    for count, token in enumerate(made, start=1):
        whole = matcher is not None and matcher.finished
        last = whole or count == budget
        text, stopped = cutter.push(token, last=last)
        yield Piece(token, text, "stop" if stopped or whole else "length" if last else None)
        if stopped:
            return


def check_limits(max_tokens: int, stop_strings: Sequence[str] = ()) -> None:
    """Raises `InputError` for limits that are wrong for every prompt: `max_tokens` below 1, an empty stop string."""
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens} where it must be at least 1.")
    if isinstance(stop_strings, str) or not all(isinstance(stop, str) for stop in stop_strings):
        raise InputError(f"stop_strings is {shown(stop_strings)} where a list of strings is expected.")
    if not all(stop_strings):
        raise InputError("A stop string is empty: give at least one character.")


def token_budget(prompt: Iterable[int], config: Config, max_tokens: int) -> int:
    """How many tokens can be generated after `prompt`: `max_tokens`, or fewer if the context has less room.

    Raises:
        InputError: if the prompt is empty, doesn't fit the context or holds ids past the vocabulary, or `max_tokens`
            is not positive.
    """
    check_limits(max_tokens)
    prompt = token_ids("The prompt", prompt, config)
    if not prompt:
        raise InputError("The prompt is empty: give at least one token to continue from.")
    if len(prompt) > config.max_seq_len:
        raise InputError(
            f"The prompt has {len(prompt)} tokens and the model's context holds {config.max_seq_len} (max_seq_len in"
            " config.json): shorten it."
        )
    # The last token made is never fed back, so it needs no position.
    return min(max_tokens, config.max_seq_len - len(prompt) + 1)


def token_ids(name: str, tokens: Iterable[int] | mx.array, config: Config) -> list[int]:
    """The tokens as plain integers of the model's vocabulary. The error calls them `name`.

    Raises:
        InputError: if they aren't a sequence of such integers.
    """
    values: Any = tokens.tolist() if isinstance(tokens, mx.array) else tokens
    try:
        ids = [operator.index(token) for token in values]
    except TypeError:
        raise InputError(f"{name} is {shown(tokens)} where a sequence of token ids is expected.") from None
    strange = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if strange is not None:
        raise InputError(
            f"{name} holds token {strange}, past the model's vocabulary of {config.vocab_size}: the tokenizer belongs"
            " to another model."
        )
    return ids


def _check_known(cache: Cache, prompt: Sequence[int], config: Config) -> None:
    """Raises `CacheError` unless `cache` can hold the first tokens of `prompt`."""
    if cache.config != config or cache.batch_size != 1:
        raise CacheError("The cache isn't one row of this model's config: make it with init_cache(config, 1, …).")
    if cache.lengths[0] >= len(prompt):
        raise CacheError(
            f"The cache holds {cache.lengths[0]} tokens and the prompt has {len(prompt)} where the whole text is"
            " expected: give it from its beginning, or rewind the cache to fewer tokens than that."
        )


def _check_drawing(sampling: Sampling, key: Key | None) -> None:
    if key is None and sampling.temperature > 0:
        raise InputError(
            f"The temperature is {sampling.temperature:g}, and drawing needs a key: give key=mx.random.key(seed), with"
            " another seed for another text."
        )


def _check_speculation(speculation: Speculation | None, structured: bool, config: Config) -> None:
    if speculation is None:
        return
    if structured:
        raise InputError(
            "Speculation and a structure can't be combined, since a structure tells a token's choices only when the"
            " token before is known: leave one out."
        )
    if config.shard.size > 1:
        raise InputError(
            "Speculation isn't for a model that several processes share, since each would time its own passes: leave"
            " it out."
        )


def warm_up(
    params: Params,
    config: Config,
    prompt_length: int,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    structured: bool = False,
    chunk_size: int = CHUNK_SIZE,
    speculation: Speculation | None = None,
) -> None:
    """Traces and compiles everything that such a generation will run, by running few layers only.

    MLX builds CUDA kernels on first use, which takes seconds on a new machine. After this call the generation doesn't
    wait for that, and its time can be measured alone. On the CPU layers aren't compiled, so the call costs little.
    """
    params, config = shallow(params, config)
    empty = init_cache(config, 1, _first_capacity(prompt_length, max_tokens, speculation))
    history = init_history([[0]], config.vocab_size) if sampling.uses_history else None
    key = mx.random.key(0)
    allowed = mx.full((1, -(-config.vocab_size // 32)), 2**32 - 1, mx.uint32) if structured else None
    for width, start in traced_first(prompt_length, chunk_size, empty.capacity):
        tokens, cache = mx.zeros((1, width), mx.int32), replace(empty, lengths=(start,))
        logits, _ = forward(params, tokens, cache, last_only=width > 1, chunk_size=width)
        mx.eval(sample(logits[:, 0], key, history, allowed, sampling=sampling)[0])
    for width in () if speculation is None else speculation.widths:
        chosen, _ = verify(params, mx.zeros((1, width), mx.int32), empty, key, history, sampling=sampling)
        mx.eval(chosen.tokens)


def _first_capacity(prompt_length: int, max_tokens: int, speculation: Speculation | None) -> int:
    """The capacity that a generation starts with. The last token needs no position, since it is never fed back.

    A draft has room behind the last token that it may be kept for.
    """
    drafted = 0 if speculation is None else speculation.num_draft_tokens
    return capacity_bucket(prompt_length + min(max_tokens - 1, _AHEAD) + drafted)
