"""Encodes a prompt without taking memory for one that is far too long."""

from dbrx_fn.errors import InputError
from dbrx_fn.text.literal_text import Ranges
from dbrx_fn.text.tokenizer import Tokenizer

_PIECE = 2**16
"""Characters. The tokenizers library takes 200 bytes or so for each while it encodes."""
_CUT_ERROR = 64
"""Tokens that a piece can have more than its share of the whole, since a cut parts what belongs together."""


def encode_prompt(
    tokenizer: Tokenizer, text: str, most: int | None, *, add_special_tokens: bool = True, literal: Ranges = ()
) -> list[int]:
    """Returns a prompt's tokens, unless it is long and they are sure to be too many.

    A long text is counted in pieces first, and no further than it may fit, so it takes the memory of a piece or of a
    prompt that about fits. Whether a short one fits is left to the caller, who sees its tokens.

    Args:
        tokenizer: the model's.
        text: the prompt.
        most: the tokens that the model's context holds; None for no bound.
        add_special_tokens: as in `Tokenizer.encode`.
        literal: as in `Tokenizer.encode`.

    Raises:
        InputError: the prompt has more than `most` tokens.
    """
    if most is not None and len(text) > 2 * _PIECE:
        _check_length(tokenizer, text, most)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, literal=literal)


def _check_length(tokenizer: Tokenizer, text: str, most: int) -> None:
    counted = 0
    for start in range(0, len(text), _PIECE):
        counted += len(tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False)) - _CUT_ERROR
        if counted > most:
            raise InputError(
                f"The prompt has more than {most} tokens, which is what the model's context holds (max_seq_len in"
                " config.json): shorten it."
            )
