"""Tokenizers in GGUF files, written with the package `gguf`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.text.vocabulary import BYTES
from tests.support.layouts_written import add_metadata

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def small_metadata() -> dict[str, Any]:
    """The small model's tokenizer as llama.cpp's converter writes it."""
    definition = json.loads((SMALL / "tokenizer.json").read_text())
    tokens = {number: text for text, number in definition["model"]["vocab"].items()}
    tokens |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    texts = [tokens[number] for number in range(4096)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * 4092 + [CONTROL] * 4,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in definition["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 4092,
        "tokenizer.ggml.eos_token_id": 4092,
        "tokenizer.ggml.padding_token_id": 4093,
    }


def tiny_metadata() -> dict[str, Any]:
    """A tokenizer of bytes and four merges, with a bit of everything."""
    tokens = [*sorted(BYTES), "th", "Ġt", "Ġth", "the", "<|endoftext|>", "<|im_end|>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 260 + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": ["t h", "Ġ t", "Ġ th", "th e"],
        "tokenizer.ggml.bos_token_id": 260,
        "tokenizer.ggml.eos_token_id": 260,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "general.sampling.temp": 0.7,
    }


def write_tokenizer(file: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Path:
    """A GGUF file of this metadata, and an embedding. `None` leaves a key out."""
    writer = GGUFWriter(file, "dbrx")
    add_metadata(writer, config)
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        writer.kv_data[0].pop(key)
    for key, value in metadata.items():
        if value is not None:
            kind = GGUFValueType.get_type(value)
            sub_type = GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, kind, sub_type)
    writer.add_tensor("token_embd.weight", np.zeros((config["vocab_size"], config["d_model"]), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
