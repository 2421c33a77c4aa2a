"""What a generation holds while it runs, and the reading of its tokens from the device."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from dbrx_fn.errors import GenerationError
from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import Config


@dataclass(eq=False)
class Held:
    """Holds a generation's only reference to its cache, so that MLX can write to it in place.

    `passes`: how often the model has run behind the prompt.
    """

    cache: Cache
    passes: int = 0


def read_token(token: mx.array, count: int, config: Config) -> int:
    """The token `[1]` made after `count` others. Waits for the device.

    Raises:
        GenerationError: if the logits weren't usable (`sampling.sample`).
    """
    made = cast(int, token.item())
    if made == config.vocab_size:
        raise GenerationError(
            f"After {count} tokens the model's numbers are no longer finite, or logit_bias forbids every token that may"
            " follow: try dtype float32 (--dtype float32), and if that doesn't help, its weights are damaged."
        )
    return made
