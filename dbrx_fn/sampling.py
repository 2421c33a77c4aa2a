"""Choosing the next token: pure functions of logits, an explicit key, and what has been said so far.

Each `apply_*` takes float32 logits `[batch vocab]` and gives such logits back; excluded tokens become -inf. `sample`
composes those that a `Sampling` asks for, in the order of transformers' generation: bias and penalties, temperature,
top-k, top-p, min-p, then a draw (or, at temperature 0, the likeliest token).
"""

import math
from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx
from jaxtyping import Bool, Float, Int32, UInt32

from dbrx_fn.compile import compiled
from dbrx_fn.errors import InputError

Logits = Float[mx.array, "batch vocab"]
Tokens = Int32[mx.array, " batch"]

_COLDEST = 1e-6
"""Below this temperature a division may leave float32, where all positive logits would then be equal."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; static, so each distinct value is compiled once.

    `temperature`: divides the logits; 0 always takes the likeliest token.
    `top_k`: draw among this many likeliest tokens; 0 means all.
    `top_p`: draw among the likeliest tokens that together have this probability (https://arxiv.org/abs/1904.09751).
    `min_p`: draw among tokens at least this fraction as likely as the likeliest (https://arxiv.org/abs/2407.01082).
    `repetition_penalty`: positive logits of tokens in prompt or text are divided by it, negative ones multiplied
        (https://arxiv.org/abs/1909.05858).
    `presence_penalty`: subtracted from logits of tokens in the text made so far.
    `frequency_penalty`: subtracted for each time that a token is in the text made so far.
    `logit_bias`: (token, bias) pairs; a bias is added to its token's logit.

    Raises:
        InputError: naming an option whose value can't work.
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
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive integer"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            (
                "logit_bias",
                all(token >= 0 and not math.isnan(bias) for token, bias in self.logit_bias),
                "pairs of a token's id and a number",
            ),
        ):
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r} where it must be {expected}.")

    @property
    def uses_history(self) -> bool:
        """Whether any penalty needs to know what has been said."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def random_key(seed: int) -> mx.array:
    """`mx.random.key` of a number that a user gave.

    Raises:
        InputError: if it is negative or doesn't fit 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"The seed is {seed} where it must be from 0 to 2**64 - 1.")
    return mx.random.key(seed)


class History(TypedDict):
    """What penalties look at.

    `prompted`: bool `[batch vocab]`, whether a token is in the prompt.
    `made`: int32 `[batch vocab]`, how often it is in the text made so far.
    """

    prompted: mx.array
    made: mx.array


def init_history(prompts: list[list[int]], vocab_size: int) -> History:
    """The history before anything is made, for one prompt a row."""
    prompted = mx.zeros((len(prompts), vocab_size), mx.bool_)
    for row, prompt in enumerate(prompts):
        prompted = prompted.at[row, mx.array(prompt, mx.int32)].maximum(mx.array(True))
    return {"prompted": prompted, "made": mx.zeros((len(prompts), vocab_size), mx.int32)}


@compiled
def sample(
    logits: Logits, key: UInt32[mx.array, "2"], history: History | None, *, sampling: Sampling
) -> tuple[Tokens, UInt32[mx.array, "2"], History | None]:
    """Chooses each row's next token.

    Args:
        logits: any float dtype; computed on in float32.
        key: an `mx.random.key`.
        history: what penalties look at; `None` if `sampling` asks for none.
        sampling: how to choose.

    Returns:
        The tokens, the key for the next call, and the history with these tokens counted.
    """
    logits = logits.astype(mx.float32)
    if sampling.logit_bias:
        logits = apply_logit_bias(logits, bias=sampling.logit_bias)
    if history is not None:
        seen = history["prompted"] | (history["made"] > 0)
        logits = apply_repetition_penalty(logits, seen, penalty=sampling.repetition_penalty)
        logits = apply_presence_penalty(logits, history["made"], penalty=sampling.presence_penalty)
        logits = apply_frequency_penalty(logits, history["made"], penalty=sampling.frequency_penalty)
    key, this_key = mx.random.split(key)
    if sampling.temperature == 0:
        tokens = logits.argmax(axis=-1).astype(mx.int32)
    else:
        logits = logits / max(sampling.temperature, _COLDEST)
        if 0 < sampling.top_k < logits.shape[-1]:
            logits = apply_top_k(logits, k=sampling.top_k)
        if sampling.top_p < 1:
            logits = apply_top_p(logits, p=sampling.top_p)
        if sampling.min_p > 0:
            logits = apply_min_p(logits, p=sampling.min_p)
        tokens = mx.random.categorical(logits, key=this_key).astype(mx.int32)
    if history is not None:
        made = history["made"].at[mx.arange(tokens.shape[0]), tokens].add(1)
        history = {"prompted": history["prompted"], "made": made}
    return tokens, key, history


@compiled
def apply_logit_bias(logits: Logits, *, bias: tuple[tuple[int, float], ...]) -> Logits:
    """Adds each bias to its token's logit.

    Raises:
        InputError: if a token is past the vocabulary.
    """
    tokens, amounts = zip(*bias, strict=True)
    # MLX writes past an array's end without a word.
    if max(tokens) >= logits.shape[-1]:
        raise InputError(f"logit_bias names token {max(tokens)}, past the model's vocabulary of {logits.shape[-1]}.")
    return logits.at[:, mx.array(tokens)].add(mx.array(amounts, mx.float32))


@compiled
def apply_repetition_penalty(logits: Logits, seen: Bool[mx.array, "batch vocab"], *, penalty: float) -> Logits:
    """Makes `seen` tokens less likely (for a penalty above 1): positive logits are divided, negative multiplied."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


@compiled
def apply_presence_penalty(logits: Logits, made: Int32[mx.array, "batch vocab"], *, penalty: float) -> Logits:
    """Subtracts `penalty` where a token has been made at all."""
    return logits - penalty * (made > 0)


@compiled
def apply_frequency_penalty(logits: Logits, made: Int32[mx.array, "batch vocab"], *, penalty: float) -> Logits:
    """Subtracts `penalty` for each time that a token has been made."""
    return logits - penalty * made


@compiled
def apply_top_k(logits: Logits, *, k: int) -> Logits:
    """Keeps the `k` largest logits of each row, and what ties with the last of them."""
    smallest = mx.topk(logits, k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logits < smallest, -math.inf, logits)


@compiled
def apply_top_p(logits: Logits, *, p: float) -> Logits:
    """Keeps the fewest likeliest tokens of each row whose probabilities add up to at least `p`."""
    order = mx.argsort(logits, axis=-1)
    ascending = mx.take_along_axis(logits, order, axis=-1)
    up_to_here = mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)
    rank = mx.arange(logits.shape[-1])
    kept = (up_to_here > 1 - p) | (rank == logits.shape[-1] - 1)
    return mx.put_along_axis(logits, order, mx.where(kept, ascending, -math.inf), axis=-1)


@compiled
def apply_min_p(logits: Logits, *, p: float) -> Logits:
    """Keeps tokens whose probability is at least `p` times the row's largest."""
    return mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -math.inf, logits)
