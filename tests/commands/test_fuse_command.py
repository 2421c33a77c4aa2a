"""`python -m dbrx_fn.fuse`: the model with its adapters merged."""

import shutil
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.fuse import main
from dbrx_fn.model.adapters import fuse_adapters
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import Case, case_of

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG = CASE.config
WITH_WORDS = case_of(QUANTIZABLE | {"vocab_size": 4096}, np.random.default_rng(0))


def leaves(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def written(folder: Path, bits: int | None, layout: str, case: Case = CASE) -> Params:
    """A model and adapters for all of its matrices. Returns the tree of both."""
    form, params, config = Format(bits or 4, 32), case.params, case.config
    if bits is not None:
        params = quantize(params, config, Quantization(form, form, form, form, form))
    save(folder / "model", params, config, layout=layout)  # type: ignore[arg-type]
    adapted = with_random_adapters(params, config, ("attention", "experts", "router", "embedding", "head"))
    save_adapters(folder / "adapters", adapted, config)
    return adapted


def words(folder: Path) -> list[str]:
    places = {"--model": "model", "--adapter-path": "adapters", "--out": "out"}
    return [word for option, name in places.items() for word in (option, str(folder / name))]


@pytest.mark.parametrize(
    ("bits", "layout", "options"),
    [
        (None, "fused", []),
        (None, "split", ["--layout", "stacked"]),
        (4, "split", []),
        (8, "stacked", []),
        (4, "split", ["--dequantize"]),
    ],
)
def test_the_written_model_is_the_one_with_its_adapters(
    bits: int | None, layout: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = written(tmp_path, bits, layout)
    assert main([*words(tmp_path), *options]) == 0
    assert "adapters of 14 linears merged" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "out").layout == (options[1] if options[:1] == ["--layout"] else layout)
    found = leaves(load(tmp_path / "out")[0])
    if options == ["--dequantize"]:
        base = "transformer.blocks.1.ffn.experts.mlp.w2."
        parts = leaves(adapted)
        plain = leaves(dequantize(load(tmp_path / "model")[0], CONFIG))[f"{base}weight"]
        wanted = {f"{base}weight": plain + parts[f"{base}lora_scale"] * parts[f"{base}lora_b"] @ parts[f"{base}lora_a"]}
        assert not any(path.endswith("scales") for path in found)
    else:
        wanted = leaves(fuse_adapters(adapted, CONFIG))
        assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        # Products of one matrix and of a stack of them may round differently, and a packed integer then differs by 1.
        if leaf.dtype != mx.uint32:
            np.testing.assert_allclose(np.array(found[path]), np.array(leaf), rtol=1e-5, atol=1e-6, err_msg=path)
        else:
            assert np.mean(np.array(found[path]) == np.array(leaf)) > 0.99


def test_what_cannot_be_merged_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, None, "fused")
    given = words(tmp_path)
    given[3] = str(tmp_path / "model")
    assert main(given) == 2
    assert "is a model where adapters are expected" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapters", "model"]
    (tmp_path / "out").mkdir()
    assert main(words(tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_sum_that_the_dtype_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, None, "split")
    tensors = cast(dict[str, mx.array], mx.load(str(tmp_path / "adapters" / "adapters.safetensors")))
    # Float32 holds each number, and not their products.
    huge = {name: mx.full(leaf.shape, 1e38) for name, leaf in tensors.items() if "Wqkv" in name}
    mx.save_safetensors(str(tmp_path / "adapters" / "adapters.safetensors"), tensors | huge)
    assert main(words(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"Wqkv.weight merged with its adapter is NaN or infinite in {CONFIG.dtype}" in said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapters", "model"]


def test_a_gguf_file_is_made_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, None, "fused")
    assert main([*words(tmp_path)[:-1], str(tmp_path / "out.gguf")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is the name of a GGUF file, and fuse writes a folder: name a folder for --out" in err
    assert f"`python -m dbrx_fn.convert FOLDER {tmp_path / 'out.gguf'} --layout gguf`" in err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapters", "model"]


def test_the_tokenizer_of_a_run_is_copied_with_its_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, None, "split", WITH_WORDS)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(SMALL / "tokenizer.json", tokenizer)
    shutil.copy(SMALL / "tokenizer_config.json", tokenizer)
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main([*words(tmp_path), "--tokenizer", str(tokenizer)]) == 0
    for file in tokenizer.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    assert main([*words(tmp_path), "--tokenizer", str(tmp_path / "adapters")]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, None, "split")
    assert main([*words(tmp_path), "--tokenizer", str(SMALL)]) == 2
    assert f"has a tokenizer of 4096 tokens and the model has {CONFIG.vocab_size}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
