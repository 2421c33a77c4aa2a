"""llama.cpp as a reference: it computes what we compute of the same GGUF files, whoever wrote them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, quants
from mlx.utils import tree_flatten
from numpy.typing import NDArray

pytest.importorskip("llama_cpp")

import dbrx_fn
from dbrx_fn.bench import main as bench
from dbrx_fn.benchmarks.llama_cpp import Model
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.gguf_conversion import GGUF_TYPES, GgufRequest, GgufType, plan_gguf, write_gguf
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.model.quantization import dequantize
from tests.llama_cpp.quantizer import FILE_TYPES, quantize, vocabulary
from tests.llama_cpp.texts import texts
from tests.support import checkpoints

Measured = Callable[[str, float], float]

pytestmark = pytest.mark.filterwarnings("ignore:The new (file|checkpoint) has no tokenizer")
RAW = checkpoints.QUANTIZABLE | {"d_model": 256, "vocab_size": 512}
PROMPT = [(37 * n + 11) % 512 for n in range(50)]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose widths every type's blocks divide, in float32, written by this package."""
    folder = tmp_path_factory.mktemp("floats")
    checkpoints.write_fused(folder / "dbrx", RAW, checkpoints.random_tensors(RAW, np.random.default_rng(0)))
    return written(folder / "dbrx", folder / "floats.gguf", GgufRequest())


def written(source: Path, file: Path, request: GgufRequest) -> Path:
    write_gguf(plan_gguf(open_checkpoint(source), request), file)
    return file


def theirs(file: Path, tokens: list[int] = PROMPT) -> NDArray[Any]:
    # Kernels for rearranged weights end the process on some machines.
    model = Model(file, repacked=False, float32=True)
    logits = model.context(64).logits(tokens)
    model.close()
    return logits


def ours(file: Path, tokens: list[int] = PROMPT) -> NDArray[Any]:
    params, config = load(file, dtype="float32")
    logits, _ = dbrx_fn.forward(params, mx.array([tokens]), dbrx_fn.init_cache(config, 1, 64))
    return np.array(logits[0])


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference of a logit, as a part of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The root mean square of the logits' differences, as a part of the logits'."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("name", FILE_TYPES)
def test_files_of_every_type_that_its_quantizer_writes_are_read(
    floats: Path, tmp_path: Path, name: str, measured: Measured
) -> None:
    file = tmp_path / "new.gguf"
    quantize(floats, file, FILE_TYPES[name])
    leaves = dict(tree_flatten(dequantize(*load(file, dtype="float32"))))
    values = {
        source.names[0]: np.array(leaves[path])
        for path, source in open_checkpoint(file).sources.items()
        if path in leaves
    }
    tensors = GGUFReader(file).tensors if name not in ("Q1_0", "Q2_0") else []
    for tensor in tensors:
        expected = quants.dequantize(tensor.data, tensor.tensor_type).reshape(values[tensor.name].shape)
        assert np.array_equal(values[tensor.name], expected), tensor.name
    # The same values as float32 show that nothing else differs; with its own, llama.cpp rounds activations too.
    same = written(file, tmp_path / "same.gguf", GgufRequest("f32"))
    found = ours(file)
    assert measured("of the largest logit, on the values of each type", difference(theirs(same), found)) < 1e-5
    assert measured(f"root mean square of its rounding of activations, {name}", distance(theirs(file), found)) < 0.15


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("model", ["random", "small"])
def test_its_logits_of_what_we_write_are_ours_of_what_we_read(
    floats: Path, tmp_path: Path, model: str, kind: GgufType, measured: Measured
) -> None:
    file = written(floats if model == "random" else SMALL, tmp_path / "new.gguf", GgufRequest(kind))
    tokens = PROMPT if model == "random" else load_tokenizer(SMALL).encode("To be, or not to be: that is the question")
    found = ours(file, tokens)
    same = written(file, tmp_path / "same.gguf", GgufRequest("f32"))
    assert measured("largest difference of a logit, floats", np.abs(theirs(same, tokens) - found).max()) < 1e-4
    there = theirs(file, tokens)
    assert measured(f"root mean square of its rounding of activations, {model}, {kind}", distance(there, found)) < 0.1
    assert np.mean(there.argmax(-1) == found.argmax(-1)) > 0.8


def test_its_tokenizer_gives_our_ids_on_a_thousand_texts(tmp_path: Path) -> None:
    file = written(SMALL, tmp_path / "new.gguf", GgufRequest("q8_0"))
    tokenizer = load_tokenizer(SMALL)
    with vocabulary(file) as found:
        assert {token for token in tokenizer.stop_tokens} == found.ends(4096)
        wrong = [text for text in texts(1000) if found.encode(text) != tokenizer.encode(text)]
    assert wrong == []


def test_its_tokenizer_gives_tiktoken_s_ids_on_a_thousand_texts(tmp_path: Path) -> None:
    """DBRX's own vocabulary, of which tiktoken knows no merges."""
    raw = RAW | {"d_model": 32, "vocab_size": 100_352}
    checkpoints.write_fused(tmp_path / "dbrx", raw, checkpoints.random_tensors(raw, np.random.default_rng(0)))
    settings = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "eos_token": "<|endoftext|>"}
    (tmp_path / "dbrx" / "tokenizer_config.json").write_text(json.dumps(settings))
    file = written(tmp_path / "dbrx", tmp_path / "new.gguf", GgufRequest())
    tokenizer = load_tokenizer(tmp_path / "dbrx")
    with vocabulary(file) as found:
        wrong = [text for text in texts(1000) if found.encode(text) != tokenizer.encode(text)]
    assert wrong == []
    # Ours, read back from the file.
    again = load_tokenizer(file)
    assert all(again.encode(text) == tokenizer.encode(text) for text in texts(1000))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_bench_measures_both(form: str, floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's weights are written for llama.cpp. A GGUF file is taken as it is, with types that aren't written."""
    model = SMALL
    if form == "file":
        model = tmp_path / "new.gguf"
        quantize(floats, model, FILE_TYPES["Q4_K_M"])
    options = ["--prompt", "5", "--context", "7", "--batch-size", "1", "2", "--tokens", "2", "--repeats", "1", "--json"]
    assert bench(["inference", "--model", str(model), "--peer", "llama.cpp", *options]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"][1:]
    assert [figure["program"].split()[0] for figure in figures] == ["dbrx_fn", "llama.cpp"] * 4
    assert all(figure["missing"] is None and figure["seconds"] > 0 for figure in figures)
