"""A cache's file: what is loaded is what was saved, and whatever else a file holds is one sentence."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.generation.cache_file import load_cache, save_cache
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.cache_rows import rewind
from dbrx_fn.model.config import DBRX, AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward
from tests.support.trees import relative_error

CONFIG = Config(
    d_model=24,
    n_heads=4,
    n_layers=2,
    vocab_size=30,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    initializer_range=0.2,
    dtype="float32",
)
# The examples of a test share its folder, and each writes the file anew.
SHARED_FOLDER = [HealthCheck.function_scoped_fixture]


def filled(lengths: list[int], dtype: Dtype = "float32", capacity: int = 12) -> Cache:
    """A cache whose rows hold so many tokens, with what no token means behind them."""
    config = replace(CONFIG, dtype=dtype)
    cache = init_cache(config, len(lengths), capacity)
    if any(lengths):
        tokens = mx.random.randint(0, config.vocab_size, (len(lengths), capacity), key=mx.random.key(0))
        _, cache = forward(init_params(config, mx.random.key(1)), tokens, cache)
        cache = rewind(cache, lengths)
    return cache


def assert_same(loaded: Cache, saved: Cache) -> None:
    assert loaded.lengths == saved.lengths
    assert loaded.config == saved.config
    for actual, expected in zip(loaded.keys + loaded.values, saved.keys + saved.values, strict=True):
        assert actual.dtype == expected.dtype
        for row, length in enumerate(saved.lengths):
            assert mx.array_equal(actual[row, :, :length], expected[row, :, :length])
            assert not actual[row, :, length:].any()


@settings(max_examples=30, suppress_health_check=SHARED_FOLDER)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    room=st.none() | st.integers(0, 20),
)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    lengths: list[int], dtype: Dtype, room: int | None, tmp_path: Path
) -> None:
    saved, file = filled(lengths, dtype), tmp_path / "cache"
    save_cache(file, saved)
    capacity = None if room is None else max(lengths) + room
    loaded = load_cache(file, saved.config, capacity)
    assert_same(loaded, saved)
    assert loaded.capacity == (256 if capacity is None else capacity)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_loaded_cache_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    """One token at a time, bit for bit; padding sees what isn't held, and its routing may change how others round."""
    params, saved = init_params(CONFIG, mx.random.key(1)), filled([5])
    save_cache(tmp_path / "cache", saved)
    loaded = load_cache(tmp_path / "cache", CONFIG, saved.capacity)
    for token in (3, 4, 5):
        expected, saved = forward(params, mx.array([[token]]), saved)
        actual, loaded = forward(params, mx.array([[token]]), loaded)
        np.testing.assert_array_equal(np.array(actual), np.array(expected))
    assert loaded.lengths == (8,)


def test_a_loaded_batch_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    params, saved = init_params(CONFIG, mx.random.key(1)), filled([5, 0, 9])
    save_cache(tmp_path / "cache", saved)
    tokens = mx.array([[3, 4], [5, 6], [7, 8]])
    expected, _ = forward(params, tokens, saved)
    actual, after = forward(params, tokens, load_cache(tmp_path / "cache", CONFIG))
    assert relative_error(actual, expected) < 1e-5
    assert after.lengths == (7, 2, 11)


def test_numbers_that_are_none_are_kept(tmp_path: Path) -> None:
    cache = filled([2])
    cache = replace(cache, keys=tuple(mx.full(key.shape, float("nan")) for key in cache.keys))
    save_cache(tmp_path / "cache", cache)
    assert mx.isnan(load_cache(tmp_path / "cache", CONFIG).keys[0][:, :, :2]).all()


def test_a_file_has_only_what_is_held(tmp_path: Path) -> None:
    """Anybody's tool can read it, and what was rewound isn't there for them."""
    save_cache(tmp_path / "cache", filled([3, 1], capacity=500))
    with safe_open(tmp_path / "cache", framework="numpy") as file:
        assert sorted(file.keys()) == ["keys.0", "keys.1", "values.0", "values.1"]
        assert file.get_tensor("keys.0").shape == (2, 4, 6)
        assert json.loads(file.metadata()["lengths"]) == [3, 1]
    assert (tmp_path / "cache").stat().st_size < 4 * 2 * 4 * 6 * 4 + 1500


def test_what_no_cache_depends_on_may_differ(tmp_path: Path) -> None:
    saved = filled([3])
    save_cache(tmp_path / "cache", saved)
    ffn = replace(CONFIG.ffn, moe_loss_weight=0.5, moe_jitter_eps=0.1)
    other = replace(CONFIG, max_seq_len=77, initializer_range=0.5, ffn=ffn)
    assert_same(load_cache(tmp_path / "cache", other), replace(saved, config=other))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(CONFIG, n_layers=3), "n_layers is 2 where the config has 3"),
        (replace(CONFIG, dtype="bfloat16"), "dtype is 'float32' where the config has bfloat16"),
        (replace(CONFIG, attn=replace(CONFIG.attn, rope_theta=5e5)), "attn_config.rope_theta is 10000.0"),
        (replace(CONFIG, ffn=replace(CONFIG.ffn, moe_top_k=1)), "ffn_config.moe_top_k is 2"),
        (DBRX, "d_model is 24 where the config has 6144"),
    ],
)
def test_a_cache_of_another_model_is_refused(other: Config, named: str, tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", filled([3]))
    with pytest.raises(CacheError) as error:
        load_cache(tmp_path / "cache", other)
    assert "belongs to another model" in str(error.value)
    assert named in str(error.value)


def test_a_row_longer_than_the_capacity_is_refused(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", filled([3, 9]))
    with pytest.raises(CacheError, match=r"capacity is 8 where .* holds a row of 9 tokens: give at least that"):
        load_cache(tmp_path / "cache", CONFIG, 8)
    with pytest.raises(CacheError, match="capacity is -1 where"):
        load_cache(tmp_path / "cache", CONFIG, -1)
    with pytest.raises(CacheError, match=r"A cache can't have 1099511627776 rows or tokens"):
        load_cache(tmp_path / "cache", CONFIG, 2**40)


def test_rows_that_would_take_far_more_memory_than_the_file_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="1000 rows are almost empty"):
        save_cache(tmp_path / "cache", replace(init_cache(CONFIG, 1000, 12), lengths=(12,) + (0,) * 999))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a file holds that nobody damaged."""
    file = tmp_path_factory.mktemp("whole") / "cache"
    save_cache(file, filled([3, 5]))
    return file.read_bytes()


@pytest.fixture
def written(whole: bytes, tmp_path: Path) -> Path:
    (tmp_path / "cache").write_bytes(whole)
    return tmp_path / "cache"


def refusal(file: Path, config: Config = CONFIG) -> str:
    """The sentence that a file is refused with."""
    with pytest.raises(CacheError) as error:
        load_cache(file, config)
    sentence = str(error.value)
    assert sentence.startswith(str(file))
    assert len(sentence) < 1000
    return sentence


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "(No such file or directory): name a file that save_cache wrote" in refusal(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    assert "it is not a regular file" in refusal(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    refusal(tmp_path / "link")
    (tmp_path / "empty").touch()
    refusal(tmp_path / "empty")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    assert "its header doesn't say dbrx_fn_cache" in refusal(tmp_path / "other.safetensors")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    assert "is a Git LFS pointer in place of the file" in refusal(tmp_path / "pointer")


def test_a_file_cut_short_anywhere_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for size in [*range(0, 40), *range(40, len(content), 23), len(content) - 1]:
        written.write_bytes(content[:size])
        assert "can't be read as a cache" in refusal(written)
    written.write_bytes(content + b"\0")
    refusal(written)


@settings(max_examples=300, suppress_health_check=SHARED_FOLDER)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_harmless(whole: bytes, data: st.DataObject, tmp_path: Path) -> None:
    file, content = tmp_path / "cache", bytearray(whole)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(CacheError):
        assert sum(load_cache(file, CONFIG).lengths) == 8


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes a file again with another header before the same data."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def says(**texts: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(texts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (says(dbrx_fn_cache="2"), "is a cache of version '2' where 1 is expected"),
        (says(config="[]"), "its config is not a JSON object"),
        (says(config="{}"), "n_layers is None where the config has 2"),
        (says(config="[" * 100_000), "nested too deeply"),
        (says(config=""), "Expecting value"),
        (says(lengths=""), "Expecting value"),
        (says(lengths="8"), "its lengths are 8 where a list of whole numbers is expected"),
        (says(lengths="[]"), "its lengths are [] where"),
        (says(lengths="[3, 5.0]"), "its lengths are [3, 5.0] where"),
        (says(lengths="[true, 7]"), "its lengths are [True, 7] where"),
        (says(lengths="[-1, 9]"), "its lengths are [-1, 9] where"),
        (says(lengths='["3", 5]'), "its lengths are ['3', 5] where"),
        (says(lengths=f"[{10**20}]"), "where a list of whole numbers is expected"),
        (says(lengths=f"[{2**31 - 1}]"), "keys.0 is F32 [2, 8, 6] where F32 [2, 2147483647, 6] is expected"),
        (says(lengths="[3, 4]"), "keys.0 is F32 [2, 8, 6] where F32 [2, 7, 6] is expected"),
        (says(lengths=json.dumps([8] + [0] * 100_000)), "100001 rows hold 8 tokens in all"),
        (lambda header: header.pop("__metadata__"), "its header doesn't say dbrx_fn_cache"),
        (lambda header: header.update({"keys.00": header.pop("keys.0")}), "it has other tensors than"),
        (lambda header: header["keys.1"].update(shape=[4, 4, 6]), "keys.1 is F32 [4, 4, 6] where"),
        (lambda header: header["keys.1"].update(dtype="I32"), "keys.1 is I32 [2, 8, 6] where"),
        (lambda header: header["keys.1"].update(data_offsets=[0, 384]), "can't be read as a cache"),
        (lambda header: header["keys.1"].update(shape=[2**40, 2**40]), "can't be read as a cache"),
        (lambda header: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "other tensors"),
    ],
)
def test_hostile_headers_are_refused(change: Callable[[dict[str, Any]], object], named: str, written: Path) -> None:
    rewritten(written, change)
    assert named in refusal(written)


def test_a_tensor_that_is_there_twice_is_refused(written: Path) -> None:
    content = written.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    twice = b'{"keys.0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + content[9:end]
    written.write_bytes(len(twice).to_bytes(8, "little") + twice + content[end:])
    assert "'keys.0' is there twice" in refusal(written)


def test_a_header_that_claims_to_be_huge_is_not_read(written: Path) -> None:
    written.write_bytes((2**63).to_bytes(8, "little") + written.read_bytes()[8:])
    assert "its header has 9223372036854775808 bytes" in refusal(written)
    with written.open("wb") as file:
        file.write((20 * 2**20).to_bytes(8, "little"))
        file.truncate(30 * 2**20)
    assert "more than the 16777216 that are read" in refusal(written)


def test_a_file_that_can_not_be_written_leaves_the_old_one(written: Path) -> None:
    before = written.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(InputError, match=r"cache can't be written \(File too large\)"):
            save_cache(written, filled([12, 12, 12]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["cache"]
    with pytest.raises(InputError, match="No such file or directory"):
        save_cache(written.parent / "none" / "cache", filled([1]))


def test_a_loaded_cache_needs_its_file_no_more(written: Path) -> None:
    loaded = load_cache(written, CONFIG)
    written.write_bytes(bytes(written.stat().st_size))
    assert_same(loaded, filled([3, 5]))


def test_another_process_loads_it(written: Path) -> None:
    code = (
        "import sys, dbrx_fn; from tests.generation.test_cache_file import CONFIG;"
        "cache = dbrx_fn.load_cache(sys.argv[1], CONFIG); print(cache.lengths, cache.keys[1].sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(written)], capture_output=True, text=True, check=True).stdout
    assert said.split(") ")[0] == "(3, 5"
    assert float(said.split(") ")[1]) == load_cache(written, CONFIG).keys[1].sum().item()
