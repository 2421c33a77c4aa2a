"""`write_random_checkpoint` and `python -m dbrx_fn.random_checkpoint`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import dbrx_fn.random_checkpoint
from dbrx_fn.checkpoints.config_file import read_config
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import check_params, init_params, param_count
from dbrx_fn.random_checkpoint import main, write_random_checkpoint
from dbrx_fn.text.tokenizer import read_tokenizer

SMALL = Config(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=600,
    vocab_size=320,
    attn=AttnConfig(clip_qkv=2.0, kv_n_heads=2, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)
SIZES = [
    *("--d-model", "32", "--n-heads", "4", "--n-layers", "2"),
    *("--ffn-hidden-size", "24", "--experts", "4", "--top-k", "2"),
]
KEY = mx.random.key(0)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_loads(dtype: Dtype, tmp_path: Path) -> None:
    config = replace(SMALL, dtype=dtype)
    write_random_checkpoint(tmp_path / "dbrx", config, KEY)
    params, loaded = load(tmp_path / "dbrx")
    assert loaded == config
    check_params(params, config)
    expected = dict(tree_flatten(init_params(config, KEY)))
    for path, leaf in dict(tree_flatten(params)).items():
        assert mx.array_equal(leaf, expected[path]), path


def test_files_are_those_of_the_released_checkpoint(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "dbrx", SMALL, KEY)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(content(tmp_path / "dbrx")) == names
    assert [path.name for path in tmp_path.iterdir()] == ["dbrx"]
    assert (tmp_path / "dbrx").stat().st_mode & 0o777 == 0o755
    assert json.loads((tmp_path / "dbrx" / "config.json").read_text())["model_type"] == "dbrx"
    tensors, metadata = mx.load(str(tmp_path / "dbrx" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    weights: Any = tensors
    assert weights["transformer.blocks.0.ffn.experts.mlp.w2"].shape == (4 * 24, 32)
    assert sum(array.size for array in weights.values()) == param_count(SMALL)


def test_tokens_are_bytes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "dbrx", SMALL, KEY)
    tokenizer = load_tokenizer(tmp_path / "dbrx")
    text = "".join(map(chr, range(1, 256))) + "日本 😀"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.vocab_size == 260
    assert tokenizer.stop_tokens == set(tokenizer.encode("<|endoftext|><|im_end|>"))


def test_every_token_has_a_text(tmp_path: Path) -> None:
    """Or a random model could go on and print nothing."""
    assert main([str(tmp_path / "random"), "--n-layers", "1"]) == 0
    tokenizer = read_tokenizer(tmp_path / "random")
    assert tokenizer.vocab_size == read_config(tmp_path / "random").vocab_size
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.vocab_size))


def test_keys(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, SMALL, mx.random.key(seed))
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["tokenizer.json"] == c["tokenizer.json"]


def test_folders_above_are_made(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "new" / "folder", SMALL, KEY)
    assert (tmp_path / "new" / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_left_as_it_is(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    if kind == "folder":
        there.mkdir()
        (there / "mine").write_text("mine")
    else:
        there.write_text("mine")
    with pytest.raises(InputError, match="there exists already: name a new folder"):
        write_random_checkpoint(there, SMALL, KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (there / "mine" if kind == "folder" else there).read_text() == "mine"


def test_vocabulary_that_does_not_hold_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 259 where the byte tokenizer needs at least 260"):
        write_random_checkpoint(tmp_path / "new" / "dbrx", replace(SMALL, vocab_size=259), KEY)
    assert list(tmp_path.iterdir()) == []
    write_random_checkpoint(tmp_path / "dbrx", replace(SMALL, vocab_size=260), KEY)


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left on device"), InputError), (KeyboardInterrupt(), None)]
)
def test_failure_on_the_way_leaves_nothing(
    error: BaseException, raised: type[BaseException] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is written after the weights."""

    def fail() -> Any:
        assert [path.name.startswith(".dbrx-") for path in tmp_path.iterdir()] == [True]
        raise error

    monkeypatch.setattr(dbrx_fn.random_checkpoint, "_byte_tokenizer", fail)
    with pytest.raises(raised or type(error)):
        write_random_checkpoint(tmp_path / "dbrx", SMALL, KEY)
    assert list(tmp_path.iterdir()) == []


# The command


def ran(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dbrx_fn.random_checkpoint", str(tmp_path / "dbrx"), *SIZES, "--seed", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{tmp_path / 'dbrx'}: a random DBRX of 2 layers, 4 experts\n"
    params, config = load(tmp_path / "dbrx")
    assert (config.d_model, config.n_layers, config.ffn.moe_top_k, config.dtype) == (32, 2, 2, "float32")
    expected = dict(tree_flatten(init_params(config, mx.random.key(4))))
    assert mx.array_equal(params["lm_head"]["weight"], expected["lm_head.weight"])


def test_command_refuses_what_exists_unless_it_may_keep_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dbrx"
    assert ran([folder, *SIZES], capsys)[0] == 0
    before = content(folder)
    status, out, err = ran([folder, *SIZES, "--seed", 1], capsys)
    assert (status, out, err) == (2, "", f"error: {folder} exists already: name a new folder.\n")
    status, out, err = ran([folder, *SIZES, "--seed", 1, "--keep"], capsys)
    assert (status, err) == (0, "")
    assert content(folder) == before
    assert ran([tmp_path / "new", *SIZES, "--keep"], capsys)[0] == 0
    assert content(tmp_path / "new") == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n-heads", "5"], "n_heads is 5 where it must be a divisor of d_model"),
        (["--n-layers", "0"], "n_layers is 0 where it must be a positive integer"),
        (["--kv-n-heads", "3"], "attn_config.kv_n_heads is 3"),
        (["--top-k", "5"], "ffn_config.moe_top_k is 5 where it must be at most moe_num_experts"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**64)], "seed"),
    ],
)
def test_values_that_cannot_work(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = ran([tmp_path / "dbrx", *SIZES, *options], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "dbrx", tmp_path / "file" / "more" / "dbrx", tmp_path / ("x" * 300)):
        status, out, err = ran([folder, *SIZES], capsys)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {folder} can't be written (")
        assert err.count("\n") == 1


def test_nothing_of_transformers_or_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from dbrx_fn.random_checkpoint import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dbrx"), *SIZES]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stderr) == (0, "")
