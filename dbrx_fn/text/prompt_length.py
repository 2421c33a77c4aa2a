"""Encodes prompts, and refuses one that is far too long before it takes memory."""

from dbrx_fn.errors import InputError
from dbrx_fn.text.literal_text import Ranges
from dbrx_fn.text.tokenizer import Tokenizer

_PIECE = 2**16
"""Characters per piece. The tokenizers library takes about 200 bytes for each character while it encodes."""
_CUT_ERROR = 64
"""The most tokens that a cut can add to a piece."""


def encode_prompt(
    tokenizer: Tokenizer, text: str, most: int | None, *, add_special_tokens: bool = True, literal: Ranges = ()
) -> list[int]:
    """Returns a prompt's tokens, unless it is long and has certainly too many.

    A long text is first counted piece by piece, until it can't fit any more. So it never takes more memory than a
    prompt that about fits. Whether a short prompt fits is left to the caller.

    Args:
        tokenizer: the model's.
        text: the prompt.
        most: the model's context length; None means no bound.
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
