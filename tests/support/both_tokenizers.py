"""Tokenizers' files for tests: DBRX's own settings, and a small vocabulary of the tokenizers library."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Hello world, this isn't a test.", "naïve café 😀😁", "don't stop  now \n\n", "日本語の文字"] * 3

# The tokenizer settings of databricks/dbrx-instruct.
DBRX_ADDED = {"100257": "<|endoftext|>", "100277": "<|pad|>", "100278": "<|im_start|>", "100279": "<|im_end|>"}
DBRX_SETTINGS: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
        number: {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, content in DBRX_ADDED.items()
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "auto_map": {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]},
    "bos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": True,
    "encoding_name": None,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 1000000000000000019884624838656,
    "model_name": "gpt-4",
    "pad_token": "<|pad|>",
    "tokenizer_class": "TiktokenTokenizerWrapper",
    "unk_token": "<|endoftext|>",
    "use_default_system_prompt": True,
}
DBRX_GENERATION = {"_from_model_config": True, "eos_token_id": [100257, 100279], "transformers_version": "4.38.2"}
DBRX_OLDER_ADDED = {"<|im_end|>": 100279, "<|im_start|>": 100278, "<|pad|>": 100277}
JSON_SETTINGS = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|endoftext|>", "special": True}}


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def copy_vocabulary(source: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


def trained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("plain", special=False, normalized=False)])
    return tokenizer
