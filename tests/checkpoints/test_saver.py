"""Written checkpoints: read back to the last bit, complete or not there at all."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from dbrx_fn.checkpoints.layouts import Written
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.checkpoints.saver import save, write_tensors
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.files.atomic import new_folder, write_file
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support.trees import case_of

RAW: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 40,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3, "moe_top_k": 2, "moe_normalize_expert_weights": None},
}
CASE = case_of(RAW, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
SMALL = Quantization(Format(4, 32), Format(8, 64), Format(3, 32), Format(6, 64), None)
ONLY_ATTENTION = Quantization(None, Format(4, 64), None, None, None)


def assert_same(params: Params, other: Params) -> None:
    """To the last bit, and in the same order."""
    found: dict[str, mx.array] = dict(tree_flatten(params))
    expected: dict[str, mx.array] = dict(tree_flatten(other))
    assert list(found) == list(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        assert mx.array_equal(leaf, expected[path]), path


def in_dtype(dtype: Any) -> tuple[Params, Config]:
    config = replace(CONFIG, dtype=dtype)
    return init_params(config, mx.random.key(0)), config


# What is written is read back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("quantization", "layout"),
    [(None, "fused"), (None, "split"), (SMALL, "split"), (ONLY_ATTENTION, "fused"), (ONLY_ATTENTION, "split")],
)
def test_round_trip(quantization: Quantization | None, layout: Written, dtype: Any, tmp_path: Path) -> None:
    params, config = in_dtype(dtype)
    if quantization is not None:
        params = quantize(params, config, quantization)
    save(tmp_path / "new" / "dbrx", params, config, layout=layout)
    again, read = load(tmp_path / "new" / "dbrx")
    assert read == config
    assert_same(again, params)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dbrx"]
    assert sorted(path.name for path in (tmp_path / "new" / "dbrx").iterdir()) == ["config.json", "model.safetensors"]


def test_float_modes_round_trip(tmp_path: Path) -> None:
    form, other = Format(4, 32, "mxfp4"), Format(4, 16, "nvfp4")
    params = quantize(PARAMS, CONFIG, Quantization(form, Format(8, 32, "mxfp8"), other, other, form))
    save(tmp_path / "dbrx", params, CONFIG)
    assert_same(load(tmp_path / "dbrx")[0], params)


@pytest.mark.parametrize("quantization", [None, ONLY_ATTENTION, SMALL])
def test_the_layout_is_the_released_models_wherever_it_can_be(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    params = PARAMS if quantization is None else quantize(PARAMS, CONFIG, quantization)
    save(str(tmp_path / "dbrx"), params, CONFIG)
    names = set(mx.load(str(tmp_path / "dbrx" / "model.safetensors")))
    fused = "transformer.blocks.0.ffn.experts.mlp.w1" in names
    assert fused == (quantization is not SMALL)
    assert ("transformer.blocks.0.ffn.experts.2.w1.scales" in names) == (quantization is SMALL)


def test_lazily_read_trees_can_be_written(tmp_path: Path) -> None:
    save(tmp_path / "one", PARAMS, CONFIG)
    params, config = load(tmp_path / "one", lazy=True)
    save(tmp_path / "two", quantize(params, config, SMALL), config)
    assert_same(load(tmp_path / "two")[0], quantize(PARAMS, CONFIG, SMALL))


def test_config_says_how_it_is_quantized_as_mlx_lm_does(tmp_path: Path) -> None:
    save(tmp_path / "dbrx", quantize(PARAMS, CONFIG, SMALL), CONFIG)
    content = json.loads((tmp_path / "dbrx" / "config.json").read_text())
    eight, six, three = ({"group_size": g, "bits": b, "mode": "affine"} for b, g in ((8, 64), (6, 64), (3, 32)))
    expected = {"group_size": 32, "bits": 4, "mode": "affine"}
    expected |= {"transformer.wte": three, "lm_head": six}
    for n in range(2):
        for name in ("Wqkv", "out_proj"):
            expected[f"transformer.blocks.{n}.norm_attn_norm.attn.{name}"] = eight
    assert content["quantization"] == expected
    assert content["quantization_config"] == expected


def test_dense_config_says_nothing_of_it(tmp_path: Path) -> None:
    save(tmp_path / "dbrx", PARAMS, CONFIG)
    content = json.loads((tmp_path / "dbrx" / "config.json").read_text())
    assert not any("quantization" in key for key in content)
    assert content["torch_dtype"] == "float32"


@pytest.mark.parametrize(("layout", "framework"), [("fused", "pt"), ("split", "mlx")])
def test_metadata(layout: Written, framework: str, tmp_path: Path) -> None:
    save(tmp_path / "dbrx", PARAMS, CONFIG, layout=layout, metadata={"step": "3"})
    with safe_open(tmp_path / "dbrx" / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": framework, "step": "3"}


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=300)
    write_random_checkpoint(tmp_path / "one", config, mx.random.key(0))
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "one" / "secret.json").write_text("{}")
    save(tmp_path / "two", init_params(config, mx.random.key(1)), config, tokenizer_files=tmp_path / "one")
    first, second = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert second.encode("To be, or") == first.encode("To be, or")
    assert second.stop_tokens == first.stop_tokens == {256, 259}
    assert second.chat_format.template == "{{ messages[0].content }}"
    assert load(tmp_path / "two")[1] == config
    assert not (tmp_path / "two" / "secret.json").exists()


def test_stop_tokens_that_only_the_config_names_are_kept(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=300)
    write_random_checkpoint(tmp_path / "one", config, mx.random.key(0))
    (tmp_path / "one" / "generation_config.json").unlink()
    content = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(content | {"eos_token_id": [7, 8]}))
    save(tmp_path / "two", init_params(config, mx.random.key(1)), config, tokenizer_files=tmp_path / "one")
    assert load_tokenizer(tmp_path / "two").stop_tokens == {7, 8}


# Or not at all


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes past that fail, as on a disk that is full, with another reason (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link"])
def test_what_exists_is_left_alone(what: str, tmp_path: Path) -> None:
    place = tmp_path / "dbrx"
    if what == "file":
        place.write_text("precious")
    elif what == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        if what == "folder":
            (place / "precious").write_text("precious")
    before = everything_in(tmp_path)
    with pytest.raises(InputError, match=r"dbrx exists already: name a new folder\."):
        save(place, PARAMS, CONFIG)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("size", [0, 600, 10_000, 100_000])
def test_writing_that_fails_leaves_nothing(size: int, tmp_path: Path) -> None:
    """While config.json is written, and the header and the data of the tensors."""
    with no_file_larger_than(size), pytest.raises(InputError) as caught:
        save(tmp_path / "dbrx", PARAMS, CONFIG)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'dbrx'} can't be written (")
    assert text.endswith("): free some room, or name another place.")
    assert "\n" not in text
    assert everything_in(tmp_path) == {}


def test_tensors_that_can_not_be_written_say_why(tmp_path: Path) -> None:
    with no_file_larger_than(1000), pytest.raises(OSError, match="File too large") as caught:
        write_tensors(tmp_path / "state.safetensors", {"a": mx.zeros(1000)}, {})
    assert caught.value.errno == errno.EFBIG


def test_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match=r"file/dbrx can't be written \((Not a directory|File exists)"):
        save(tmp_path / "file" / "dbrx", PARAMS, CONFIG)
    with pytest.raises(InputError, match="File name too long"):
        save(tmp_path / ("x" * 300), PARAMS, CONFIG)
    assert len(everything_in(tmp_path)) == 1


def test_tree_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="don't fit the config"):
        save(tmp_path / "dbrx", PARAMS, replace(CONFIG, vocab_size=41))
    assert everything_in(tmp_path) == {}


def test_layout_that_can_not_hold_quantized_experts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout is 'fused', which can't hold quantized experts"):
        save(tmp_path / "dbrx", quantize(PARAMS, CONFIG, SMALL), CONFIG, layout="fused")
    assert everything_in(tmp_path) == {}


def test_tokenizer_files_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer_files is .*nowhere, which isn't a folder"):
        save(tmp_path / "dbrx", PARAMS, CONFIG, tokenizer_files=tmp_path / "nowhere")
    assert everything_in(tmp_path) == {}


def test_weights_whose_file_is_gone(tmp_path: Path) -> None:
    save(tmp_path / "one", PARAMS, CONFIG)
    params, config = load(tmp_path / "one", lazy=True)
    os.truncate(tmp_path / "one" / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"can't be read or computed \("):
        save(tmp_path / "two", params, config)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# Folders and files


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_folder_of_a_block_that_ends_badly(error: type[BaseException], tmp_path: Path) -> None:
    def block() -> None:
        with new_folder(tmp_path / "new") as beside:
            (beside / "part").write_text("half")
            assert beside.parent == tmp_path
            assert beside.name.startswith(".new-")
            assert not (tmp_path / "new").exists()
            raise error

    with pytest.raises(error):
        block()
    assert everything_in(tmp_path) == {}


def test_folder_that_another_made_in_the_meantime(tmp_path: Path) -> None:
    def block() -> None:
        with new_folder(tmp_path / "new") as beside:
            (beside / "part").write_text("ours")
            (tmp_path / "new").mkdir()

    with pytest.raises(InputError, match="exists already"):
        block()
    assert everything_in(tmp_path) == {str(tmp_path / "new"): b""}


def test_folders_of_folders(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as beside:
        (beside / "c").mkdir()
        (beside / "c" / "file").write_text("whole")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "whole"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    # As anything that is made there, so that others may read what they may read elsewhere.
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folder_of_a_process_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from dbrx_fn.files.atomic import new_folder
with new_folder(Path({str(tmp_path / "new")!r})) as beside:
    (beside / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[2])
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=100)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert all(path.name.startswith(".new-") for path in tmp_path.iterdir())


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_file(file, b"first")
    assert file.read_bytes() == b"first"
    with file.open("rb") as reader:
        write_file(file, b"second, and longer")
        # Whoever has it open keeps what was there.
        assert reader.read() == b"first"
    assert everything_in(tmp_path) == {str(file): b"second, and longer"}


def test_file_that_can_not_be_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_file(file, b"first")
    with no_file_larger_than(10), pytest.raises(InputError, match=r"state can't be written \(File too large\)"):
        write_file(file, bytes(100))
    assert everything_in(tmp_path) == {str(file): b"first"}
    with pytest.raises(InputError, match=r"state can't be written \(No such file or directory\)"):
        write_file(tmp_path / "nowhere" / "state", b"")
