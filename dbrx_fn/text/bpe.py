"""Trains and saves tokenizers of DBRX's kind: byte-level BPE (https://arxiv.org/abs/1508.07909).

Text is split into words as in DBRX's own tokenizer. DBRX's four special tokens come last.
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
"""The size of a vocabulary of all bytes and the special tokens."""

# The pattern of cl100k_base, DBRX's encoding, from tiktoken's first version (tiktoken_ext/openai_public.py). Later
# versions use possessive quantifiers, which the tokenizers library reads differently. The words are the same, except
# that white space at the end of a text is a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE. The same texts always make the same tokenizer.

    Args:
        texts: the texts to train on.
        vocab_size: number of tokens, including the 256 bytes and the four special tokens.

    Raises:
        InputError: if the size is too small for those tokens, or too large for the texts.
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
    """Adds the special tokens, with the next ids, in DBRX's order."""
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, default_system_prompt: bool = False) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json in the form of a DBRX checkpoint.

    Each file appears when it is complete, tokenizer.json last. Existing files are replaced.

    Args:
        tokenizer: a tokenizer with the special tokens.
        folder: the folder, which is made if missing.
        default_system_prompt: whether a conversation without a system message begins with DBRX's. That prompt says that
            the model is DBRX, and only DBRX was trained with it.

    Raises:
        InputError: if a file can't be written.
    """
    settings = {
        # With this class transformers uses tokenizer.json unchanged. With GPT2Tokenizer it would use GPT-2's pattern.
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
