"""Tokenizers of DBRX's kind: byte-level BPE (https://arxiv.org/abs/1508.07909), trained on text and written to disk.

Text is cut into words as DBRX's own tokenizer cuts it. The same four special tokens follow the others.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import write_file
from dbrx_fn.text.text_pieces import text_pieces

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""The vocabulary of all bytes and the special tokens."""

# The words of cl100k_base, DBRX's encoding, as tiktoken wrote them first (tiktoken_ext/openai_public.py). Its later
# versions use possessive quantifiers, which the tokenizers library reads in another way; the words are the same, except
# that white space which ends a text is one of them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same texts always make the same tokenizer.

    Args:
        texts: what to learn from, long or short.
        vocab_size: how many tokens, the 256 bytes and the four special tokens included.

    Raises:
        InputError: a size that doesn't hold those, or that the texts are too small to reach.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"The vocabulary size is {vocab_size} where at least {SMALLEST_VOCABULARY} is expected, for the 256 bytes "
            f"and {len(SPECIAL_TOKENS)} special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in text_pieces(text)), trainer)
    add_special_tokens(tokenizer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise InputError(
            f"The text is enough for {reached} tokens where a vocabulary of {vocab_size} is asked for: give more text, "
            f"or a vocabulary size of at most {reached}."
        )
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer) -> None:
    """Gives the special tokens the next ids, in DBRX's order."""
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, default_system_prompt: bool = False) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json as a DBRX checkpoint has them.

    Each file appears when it is complete, tokenizer.json as the last; those of the same names are replaced.

    Args:
        tokenizer: one with the special tokens.
        folder: made if it isn't there.
        default_system_prompt: whether a conversation without a system message begins with DBRX's, which only DBRX was
            trained with and which says that the model is DBRX.

    Raises:
        InputError: a file can't be written.
    """
    settings = {
        # transformers takes tokenizer.json as it is under this name; under GPT2Tokenizer it puts GPT-2's words in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "use_default_system_prompt": default_system_prompt,
    }
    stops = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error.strerror}): name another place.") from None
    for name, content in (
        ("generation_config.json", json.dumps({"eos_token_id": stops}, indent=2) + "\n"),
        ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
    ):
        write_file(folder / name, content.encode())
