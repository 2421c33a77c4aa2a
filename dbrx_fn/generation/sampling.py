"""Sampling of the next token: pure functions of logits, an explicit key, and the tokens so far.

Each `apply_*` takes and returns float32 logits `[batch vocab]`; excluded tokens get -inf. `sample` composes the steps
of a `Sampling` into one compiled function, in transformers' order: bias and penalties, temperature, top-k, top-p,
min-p, then a draw (or, at temperature 0, the most likely token).
"""

import functools
import math
import numbers
from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.runtime.arguments import check_fields
from dbrx_fn.runtime.bounded import within
from dbrx_fn.runtime.compile import compiled, typed

Logits = Float32[mx.array, "batch vocab"]
Number = Float32[mx.array, ""]
Key = UInt32[mx.array, "2"]
Allowed = UInt32[mx.array, "batch words"]

COLDEST = 1e-6
"""The lowest temperature that logits are divided by. A lower one could overflow float32."""

LARGEST, _STRONGEST = 1e20, 1e6
"""The largest numbers that may be added to logits, and multiply them. They keep logits finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The set of steps and `top_k` are compiled in; other numbers change without a new trace.

    `temperature`: divides the logits. 0 always takes the most likely token.
    `top_k`: draw among this many most likely tokens. 0 means all.
    `top_p`: draw among the most likely tokens that together have this probability (https://arxiv.org/abs/1904.09751).
    `min_p`: draw among tokens with at least this fraction of the highest probability (https://arxiv.org/abs/2407.01082).
    `repetition_penalty`: divides positive logits of tokens in the prompt or the text, and multiplies negative ones
        (https://arxiv.org/abs/1909.05858).
    `presence_penalty`: subtracted from the logits of tokens in the generated text.
    `frequency_penalty`: subtracted from a token's logit once for each time that it occurs in the generated text.
    `logit_bias`: (token, bias) pairs. A bias is added to its token's logit; -inf forbids the token, inf forces it.

    Raises:
        InputError: if an option has an impossible value. It names the option.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, list):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias))
        check_fields(self)
        if not all(_is_bias(pair) for pair in self.logit_bias):
            raise InputError(
                f"logit_bias is {shown(self.logit_bias)} where it must be pairs of a token's id and a number."
            )
        object.__setattr__(self, "logit_bias", tuple((int(token), float(bias)) for token, bias in self.logit_bias))
        for name, lowest, highest, expected in (
            ("temperature", 0, LARGEST, f"from 0 to {LARGEST:g}"),
            ("top_k", 0, math.inf, "0 (all tokens) or a positive integer"),
            ("top_p", math.nextafter(0, 1), 1, "above 0 and at most 1"),
            ("min_p", 0, 1, "from 0 to 1"),
            ("repetition_penalty", 1 / _STRONGEST, _STRONGEST, f"from {1 / _STRONGEST:g} to {_STRONGEST:g}"),
            ("presence_penalty", -LARGEST, LARGEST, f"from {-LARGEST:g} to {LARGEST:g}"),
            ("frequency_penalty", -LARGEST, LARGEST, f"from {-LARGEST:g} to {LARGEST:g}"),
        ):
            if not lowest <= getattr(self, name) <= highest:
                raise InputError(f"{name} is {getattr(self, name)!r} where it must be {expected}.")

    @property
    def uses_history(self) -> bool:
        """Whether any penalty needs the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


GREEDY = Sampling()
"""Always the likeliest token."""


def _is_bias(pair: object) -> bool:
    match pair:
        case (numbers.Integral() as token, numbers.Real() as bias):
            return int(token) >= 0 and not math.isnan(bias)
    return False


def random_key(seed: int) -> mx.array:
    """`mx.random.key` of a user's number.

    Raises:
        InputError: if the number is negative or doesn't fit into 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"The seed is {seed} where it must be from 0 to 2**64 - 1.")
    return mx.random.key(seed)


class History(TypedDict):
    """The tokens so far, as penalties use them.

    `prompted`: bool `[batch vocab]`, whether a token is in the prompt.
    `made`: int32 `[batch vocab]`, how often a token is in the generated text.
    """

    prompted: mx.array
    made: mx.array


def init_history(prompts: list[list[int]], vocab_size: int) -> History:
    """The history before generation, for one prompt per row.

    Raises:
        InputError: if a prompt holds an id outside of the vocabulary.
    """
    strange = [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]
    if strange:
        raise InputError(f"A prompt holds token {strange[0]}, outside of the vocabulary of {vocab_size}.")
    prompted = mx.zeros((len(prompts), vocab_size), mx.bool_)
    for row, prompt in enumerate(prompts):
        prompted = prompted.at[row, mx.array(prompt, mx.int32)].maximum(mx.array(True))
    return {"prompted": prompted, "made": mx.zeros((len(prompts), vocab_size), mx.int32)}


def sample(
    logits: mx.array, key: mx.array, history: History | None, allowed: mx.array | None = None, *, sampling: Sampling
) -> tuple[mx.array, mx.array, History | None]:
    """Chooses each row's next token.

    Args:
        logits: `[batch vocab]` of any float dtype. The computation is in float32.
        key: an `mx.random.key`.
        history: the tokens so far; `None` if `sampling` has no penalties.
        sampling: how to choose.

    Returns:
        The tokens, int32 `[batch]`, the key for the next call, and the history with these tokens counted. A row whose
        logits hold NaN, infinity or nothing but -inf gets the vocabulary's size, which is no valid token. The caller
        sees it when it reads the tokens, without another wait for the device.

    Raises:
        InputError: if `logit_bias` names a token past the vocabulary.
    """
    strange = max((token for token, _ in sampling.logit_bias), default=-1)
    if strange >= logits.shape[-1]:
        raise InputError(f"logit_bias names token {strange}, past the model's vocabulary of {logits.shape[-1]}.")
    return _sample(
        logits,
        key,
        history,
        allowed,
        _numbers(sampling),
        greedy=sampling.temperature == 0,
        top_k=sampling.top_k,
        uses_top_p=sampling.top_p < 1,
        uses_min_p=sampling.min_p > 0,
    )


class _Numbers(TypedDict):
    """A `Sampling`'s numbers as arrays, so that new values need no new trace."""

    temperature: mx.array
    top_p: mx.array
    min_p: mx.array
    repetition_penalty: mx.array
    presence_penalty: mx.array
    frequency_penalty: mx.array
    biased_tokens: mx.array | None
    biases: mx.array | None


@functools.lru_cache(maxsize=64)
def _numbers(sampling: Sampling) -> _Numbers:
    tokens, biases = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else (None, None)
    return {
        "temperature": mx.array(max(sampling.temperature, COLDEST), mx.float32),
        "top_p": mx.array(sampling.top_p, mx.float32),
        "min_p": mx.array(sampling.min_p, mx.float32),
        "repetition_penalty": mx.array(sampling.repetition_penalty, mx.float32),
        "presence_penalty": mx.array(sampling.presence_penalty, mx.float32),
        "frequency_penalty": mx.array(sampling.frequency_penalty, mx.float32),
        "biased_tokens": None if tokens is None else mx.array(tokens, mx.int32),
        "biases": None if biases is None else mx.array([min(bias, LARGEST) for bias in biases], mx.float32),
    }


@compiled
def _sample(
    logits: Float[mx.array, "batch vocab"],
    key: Key,
    history: History | None,
    allowed: Allowed | None,
    numbers: _Numbers,
    *,
    greedy: bool,
    top_k: int,
    uses_top_p: bool,
    uses_min_p: bool,
) -> tuple[Int32[mx.array, " batch"], Key, History | None]:
    logits = logits.astype(mx.float32)
    if numbers["biased_tokens"] is not None and numbers["biases"] is not None:
        logits = apply_logit_bias(logits, numbers["biased_tokens"], numbers["biases"])
    if history is not None:
        seen = history["prompted"] | (history["made"] > 0)
        logits = apply_repetition_penalty(logits, seen, numbers["repetition_penalty"])
        logits = apply_presence_penalty(logits, history["made"], numbers["presence_penalty"])
        logits = apply_frequency_penalty(logits, history["made"], numbers["frequency_penalty"])
    if allowed is not None:
        logits = apply_allowed(logits, allowed)
    key, this_key = mx.random.split(key)
    # On every back end the maximum is NaN if a logit is. On some, argmax overlooks NaN.
    usable = mx.abs(logits.max(axis=-1)) < math.inf
    if greedy:
        tokens = logits.argmax(axis=-1).astype(mx.int32)
    else:
        logits = logits / numbers["temperature"]
        if 0 < top_k < logits.shape[-1]:
            logits = apply_top_k(logits, k=top_k)
        if uses_top_p:
            logits = apply_top_p(logits, numbers["top_p"])
        if uses_min_p:
            logits = apply_min_p(logits, numbers["min_p"])
        tokens = mx.random.categorical(logits, key=this_key).astype(mx.int32)
    if history is not None:
        made = history["made"].at[mx.arange(tokens.shape[0]), tokens].add(1)
        history = {"prompted": history["prompted"], "made": made}
    return mx.where(usable, tokens, logits.shape[-1]), key, history


@typed
def apply_logit_bias(logits: Logits, tokens: Int32[mx.array, " biased"], biases: Float[mx.array, " biased"]) -> Logits:
    """Adds each of `biases` to its token's logit. A bias for a token outside of the vocabulary is ignored."""
    ids, known = within(tokens, logits.shape[-1])
    return logits.at[:, ids].add(mx.where(known, biases, 0))


@typed
def apply_repetition_penalty(logits: Logits, seen: Bool[mx.array, "batch vocab"], penalty: Number) -> Logits:
    """Divides positive logits of `seen` tokens by the penalty and multiplies negative ones: above 1, less likely."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


@typed
def apply_presence_penalty(logits: Logits, made: Int32[mx.array, "batch vocab"], penalty: Number) -> Logits:
    """Subtracts `penalty` from the logit of each token that has been generated."""
    return logits - penalty * (made > 0)


@typed
def apply_frequency_penalty(logits: Logits, made: Int32[mx.array, "batch vocab"], penalty: Number) -> Logits:
    """Subtracts `penalty` from a token's logit for each time that it has been generated."""
    return logits - penalty * made


@typed
def apply_allowed(logits: Logits, allowed: Allowed) -> Logits:
    """Keeps tokens whose bit is 1 in `allowed`, which holds 32 to a word, the lowest first."""
    bits = (allowed[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(allowed.shape[0], -1)[:, : logits.shape[-1]] == 1, logits, -math.inf)


@typed
def apply_top_k(logits: Logits, *, k: int) -> Logits:
    """Keeps the `k` largest logits of each row, and all that tie with the last of them."""
    smallest = mx.topk(logits, k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logits < smallest, -math.inf, logits)


@typed
def apply_top_p(logits: Logits, p: Number) -> Logits:
    """Keeps each row's most likely tokens, the fewest whose probabilities add up to at least `p`."""
    order = mx.argsort(logits, axis=-1)
    ascending = mx.take_along_axis(logits, order, axis=-1)
    up_to_here = mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)
    rank = mx.arange(logits.shape[-1])
    kept = (up_to_here > 1 - p) | (rank == logits.shape[-1] - 1)
    return mx.put_along_axis(logits, order, mx.where(kept, ascending, -math.inf), axis=-1)


@typed
def apply_min_p(logits: Logits, p: Number) -> Logits:
    """Keeps tokens whose probability is at least `p` times the row's largest."""
    return mx.where(logits < logits.max(axis=-1, keepdims=True) + mx.log(p), -math.inf, logits)
