"""llama.cpp's own quantizer and tokenizer, through llama-cpp-python."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader

FILE_TYPES = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_"): number
    for name, number in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_") and not name.endswith("_NVFP4")
}
"""All types of files that this build's quantizer writes. It refuses NVFP4, which only its converter writes."""


def quantize(source: Path, file: Path, file_type: int) -> None:
    """Runs llama.cpp's quantizer, with an importance matrix of ones, which its smallest types need.

    Args:
        source: a GGUF file of floats.
        file: the new file.
        file_type: one of `FILE_TYPES`.
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_type, 2
    matrices = [tensor for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1]
    # One importance for each column of each expert's matrix; a null name ends the list.
    ones = [np.ones(int(np.prod([tensor.shape[0], *tensor.shape[2:]])), np.float32) for tensor in matrices]
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrices) + 1))()
    for entry, tensor, importance in zip(entries, matrices, ones, strict=False):
        entry.name = tensor.name.encode()
        entry.data = importance.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = importance.size
    settings.imatrix = entries
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file), settings) == 0


class Vocabulary:
    """A GGUF file's tokenizer, as llama.cpp understands it."""

    def __init__(self, model: "llama_cpp.llama_model_p") -> None:
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in which control tokens are recognized."""
        content = text.encode()
        room = (llama_cpp.llama_token * (len(content) + 8))()
        count = llama_cpp.llama_tokenize(self._vocabulary, content, len(content), room, len(room), True, True)
        assert count >= 0
        return list(room[:count])

    def ends(self, tokens: int) -> set[int]:
        """Those of the first tokens that end a text."""
        return {token for token in range(tokens) if llama_cpp.llama_vocab_is_eog(self._vocabulary, token)}


@contextmanager
def vocabulary(file: Path) -> Iterator[Vocabulary]:
    """Loads a file's tokenizer alone."""
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), settings)
    assert model
    try:
        yield Vocabulary(model)
    finally:
        llama_cpp.llama_model_free(model)
