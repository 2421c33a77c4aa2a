"""llama.cpp on this package's weights, to be measured beside it. It needs llama-cpp-python to be installed.

The weights are written as a GGUF file, which llama.cpp loads with its default settings on all of the machine's cores,
or on its GPU if llama-cpp-python was built for it. API: llama.cpp's include/llama.h.
"""

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.benchmarks.inference import Program, Step
from dbrx_fn.benchmarks.plan import Planned
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.gguf_conversion import GgufRequest, GgufType, check_llama_cpp_model, plan_gguf, write_gguf
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.costs import Formats
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.cores import usable_cores

NAME = "llama.cpp"
_INSTALL = "pip install llama-cpp-python (it compiles llama.cpp for minutes)"
_OF_BITS: dict[int, GgufType] = {8: "q8_0", 4: "q4_0"}


def check_llama_cpp(planned: Planned) -> None:
    """Raises `InputError` if llama-cpp-python isn't installed, or llama.cpp has no such model or format."""
    if _own_file(planned) is None:
        check_llama_cpp_model(planned.config)
        _request(planned)
    _library()


@contextmanager
def llama_cpp_program(params: Params, planned: Planned) -> Iterator[Program]:
    """Yields llama.cpp as a program. It runs the plan's GGUF file, or one that is written for it and then removed.

    Args:
        params: the tree.
        planned: the model's plan. llama.cpp gets floats in the stored dtype.

    Raises:
        InputError: as in `check_llama_cpp`, or if llama.cpp can't run the file on this machine.
    """
    with tempfile.TemporaryDirectory() as name:
        file = _own_file(planned) or _written(params, planned, Path(name))
        model = Model(file, repacked=_runs_repacked(file))
        try:
            yield _program(model, planned.stored)
        finally:
            model.close()


def _own_file(planned: Planned) -> Path | None:
    """The GGUF file that is measured, if it is measured unchanged."""
    file = planned.checkpoint
    if file is None or not file.is_file() or planned.quantization is not None:
        return None
    return file if open_checkpoint(file).config.n_layers == planned.config.n_layers else None


def _written(params: Params, planned: Planned, folder: Path) -> Path:
    save(folder / "checkpoint", params, planned.config, layout="stacked")
    file = folder / "model.gguf"
    with warnings.catch_warnings():
        # Ids are measured, which need no tokenizer.
        warnings.filterwarnings("ignore", "The new file has no tokenizer")
        write_gguf(plan_gguf(open_checkpoint(folder / "checkpoint"), _request(planned)), file)
    return file


class Model:
    """A GGUF file that llama.cpp has loaded.

    Args:
        file: the GGUF file.
        repacked: whether weights may be rearranged for the CPU's fastest kernels, which is llama.cpp's default.
        float32: whether keys and values are float32, instead of its default of float16.
    """

    def __init__(self, file: Path, *, repacked: bool, float32: bool = False) -> None:
        self._library = _library()
        settings = self._library.llama_model_default_params()
        settings.use_extra_bufts = repacked
        self._model = self._library.llama_model_load_from_file(os.fsencode(file), settings)
        if not self._model:
            raise InputError(f"llama.cpp can't load {file}: update llama-cpp-python.")
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._library.llama_vocab_n_tokens(vocabulary)
        self.repacked, self._float32 = repacked, float32
        self._context: Context | None = None

    def context(self, capacity: int, sequences: int = 1) -> "Context":
        """An empty context: room for `capacity` tokens of each of some sequences. There is one at a time."""
        if self._context is None or self._context.size != (capacity, sequences):
            self._free_context()
            settings = self._library.llama_context_default_params()
            if self._float32:
                settings.type_k = settings.type_v = self._library.GGML_TYPE_F32
                settings.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self._context = Context(self._library, self._model, settings, self.vocab_size, capacity, sequences)
        self._context.clear()
        return self._context

    def close(self) -> None:
        """Frees everything."""
        self._free_context()
        self._library.llama_model_free(self._model)

    def _free_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None


class Context:
    """The keys and values of some sequences, and what computes them."""

    def __init__(self, library: Any, model: Any, settings: Any, vocab_size: int, capacity: int, sequences: int) -> None:
        self._library, self._vocab_size = library, vocab_size
        self.size = capacity, sequences
        settings.n_ctx = capacity * sequences
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = usable_cores()
        settings.n_batch = max(settings.n_batch, sequences)
        self._most = int(settings.n_batch)
        self._context = library.llama_init_from_model(model, settings)
        if not self._context:
            raise MemoryError(f"llama.cpp can't make a context of {capacity} tokens for {sequences} sequences")

    def clear(self) -> None:
        """Forgets all sequences."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def prefill(self, tokens: Sequence[int], sequence: int = 0) -> NDArray[np.float32]:
        """Computes a sequence's first tokens. Returns the logits after the last, float32 `[vocab]`."""
        for start in range(0, len(tokens), self._most):
            part = tokens[start : start + self._most]
            self._decode([(token, start + n, sequence) for n, token in enumerate(part)], last_only=True)
        logits: NDArray[np.float32] = self._logits(1)[0]
        return logits

    def step(self, tokens: Sequence[int], place: int) -> NDArray[np.float32]:
        """Computes one more token of each sequence. Returns their logits, float32 `[sequence vocab]`."""
        self._decode([(token, place, sequence) for sequence, token in enumerate(tokens)], last_only=False)
        return self._logits(len(tokens))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each token of an empty context's sequence, float32 `[time vocab]`."""
        self._decode([(token, place, 0) for place, token in enumerate(tokens)], last_only=False)
        return self._logits(len(tokens))

    def close(self) -> None:
        """Frees the context."""
        self._library.llama_free(self._context)

    def _decode(self, tokens: Sequence[tuple[int, int, int]], *, last_only: bool) -> None:
        """Computes tokens, each with its place and sequence."""
        library = self._library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for n, (token, place, sequence) in enumerate(tokens):
            batch.token[n], batch.pos[n] = token, place
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = not last_only or n == len(tokens) - 1
        status = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode ended with status {status}")
        library.llama_synchronize(self._context)

    def _logits(self, rows: int) -> NDArray[np.float32]:
        found = self._library.llama_get_logits(self._context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(found, (rows, self._vocab_size)).copy()
        return logits


def _program(model: Model, config: Config) -> Program:
    """llama.cpp as a program."""

    def prefill(tokens: mx.array) -> None:
        model.context(tokens.shape[1] + 1).prefill(_ids(tokens[0]))

    def first_token(prompt: list[int]) -> None:
        np.argmax(model.context(len(prompt) + 1).prefill(prompt))

    def decoder(place: int, batch_size: int, steps: int, together: int) -> Step:
        if together > 1:
            raise InputError("its steps of several tokens aren't measured")
        filled = model.context(place + steps, batch_size)
        for sequence in range(batch_size):
            filled.prefill([(7 * n + sequence) % model.vocab_size for n in range(place)], sequence)

        def step(token: mx.array) -> mx.array:
            nonlocal place
            logits = filled.step(_ids(token), place)
            place += 1
            return mx.array(np.argmax(logits, axis=-1).astype(np.int32))

        return step

    name = NAME if model.repacked else f"{NAME} without repacking"
    return Program(name, config, prefill, first_token, decoder, uses_mlx=False)


def _ids(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())


def _request(planned: Planned) -> GgufRequest:
    """The type that is nearest to the formats of the plan."""
    return GgufRequest(kind=_type_of(planned.formats), dtype=None if planned.formats else planned.stored.dtype)


def _type_of(formats: Formats) -> GgufType | None:
    bits = {form.bits for path, form in formats.items() if ".router." not in path}
    if not bits:
        return None
    kind = _OF_BITS.get(bits.pop()) if len(bits) == 1 else None
    if kind is None:
        raise InputError(
            "--peer llama.cpp measures Q8_0 and Q4_0 beside 8 and 4 bits: quantize all matrices to one of these, or"
            " leave them floats."
        )
    return kind


@functools.cache
def _library() -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise InputError(f"--peer llama.cpp needs llama-cpp-python, which isn't installed: {_INSTALL}.") from None
    llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _silent(library: Any) -> Any:
    """A callback that drops llama.cpp's log. It has to live as long as the library."""
    return library.llama_log_callback(lambda level, text, data: None)


def _runs_repacked(file: Path) -> bool:
    """Whether llama.cpp's fastest kernels run on this machine. On some, they end the process.

    Raises:
        InputError: if llama.cpp runs the file in no way.
    """
    for repacked in (True, False):
        command = [sys.executable, "-m", "dbrx_fn.benchmarks.llama_cpp", str(file), str(int(repacked))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode == 0:
            return repacked
    reason = done.stderr.strip().rpartition("\n")[2] or f"it ended with status {done.returncode}"
    raise InputError(f"llama.cpp can't run the weights on this machine ({reason}): update llama-cpp-python.")


def _try(file: Path, repacked: bool) -> None:
    """A prompt and a step, which end this process if llama.cpp's kernels don't run here."""
    context = Model(file, repacked=repacked).context(64)
    context.prefill(list(range(32)))
    context.step([1], 32)


if __name__ == "__main__":
    _try(Path(sys.argv[1]), sys.argv[2] == "1")
