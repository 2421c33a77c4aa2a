"""Each of several processes reads its own part of a checkpoint, whatever the layout."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.layouts import WRITTEN, Written
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.raw import bits_in_file, read_part
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import CheckpointError, ConfigError
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import own_part, param_spec, quantized_spec
from dbrx_fn.model.quantization import Quantization, quantize, tree_formats
from dbrx_fn.model.shard import Shard
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from tests.support import layouts_written
from tests.support.checkpoints import QUANTIZABLE, random_config, random_tensors, write_fused, write_split

Writer = Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]

WRITERS: dict[str, Writer] = {
    "fused": partial(write_fused, shards=3, dtype="bfloat16"),
    "split": write_split,
    "stacked": layouts_written.write_stacked,
    "converted": layouts_written.write_converted,
    "mlp_experts, q, k and v apart": partial(layouts_written.write_mlp_experts, w2_transposed=False, qkv_apart=True),
    "nxd": layouts_written.write_nxd,
    "nxd_inference": partial(layouts_written.write_nxd, form="inference"),
    "gguf": lambda folder, *model: layouts_written.write_gguf(folder / "model.gguf", *model, quantization="q8_0"),
}


def flat(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def assert_own_parts(path: Path, size: int) -> None:
    """Every process's leaves are its parts of the whole ones, bit for bit, and fit its description."""
    whole, config = load(path)
    spec = quantized_spec(param_spec(config), tree_formats(whole, config))
    for rank in range(size):
        shard = Shard(rank, size)
        own, own_config = load(path, shard=shard)
        assert own_config.shard == shard
        assert list(flat(own)) == list(flat(whole))
        for name, leaf in flat(own).items():
            assert leaf.dtype == flat(whole)[name].dtype
            assert mx.array_equal(leaf, own_part(flat(whole)[name], spec[name].cut, shard)).item(), name
        described = quantized_spec(param_spec(own_config), tree_formats(own, own_config))
        assert {name: leaf.shape for name, leaf in flat(own).items()} == {
            name: leaf.shape for name, leaf in described.items()
        }


@pytest.mark.parametrize("layout", WRITERS)
def test_each_process_has_its_part_of_every_leaf(layout: str, tmp_path: Path) -> None:
    raw = QUANTIZABLE | {"attn_config": QUANTIZABLE["attn_config"] | {"kv_n_heads": 4}}
    WRITERS[layout](tmp_path, raw, random_tensors(raw, np.random.default_rng(1)))
    path = tmp_path / "model.gguf" if layout == "gguf" else tmp_path
    for size in (2, 4):
        assert_own_parts(path, size)


@pytest.mark.parametrize(
    "form", [Format(4, 64), Format(8, 32), Format(3, 32), Format(4, 32, "mxfp4"), Format(4, 16, "nvfp4")], ids=str
)
@pytest.mark.parametrize("layout", [layout for layout in WRITTEN if layout != "fused"])
def test_quantized_matrices_are_cut_between_groups(layout: Written, form: Format, tmp_path: Path) -> None:
    write_fused(tmp_path / "dense", QUANTIZABLE, random_tensors(QUANTIZABLE, np.random.default_rng(2)))
    params, config = load(tmp_path / "dense")
    save(tmp_path / "small", quantize(params, config, Quantization(*[form] * 4)), config, layout=layout)
    assert_own_parts(tmp_path / "small", 2)


@pytest.mark.parametrize("seed", range(4))
def test_odd_shapes_are_cut_too(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    raw = random_config(rng)
    heads = 2 * int(rng.integers(1, 4))
    raw |= {"n_heads": heads, "d_model": heads * 6, "vocab_size": 3 * 2 * int(rng.integers(10, 20))}
    raw["attn_config"]["kv_n_heads"] = heads
    raw["ffn_config"]["ffn_hidden_size"] = 2 * int(rng.integers(3, 30))
    write_fused(tmp_path, raw, random_tensors(raw, rng), dtype="float16")
    assert_own_parts(tmp_path, 2)


def test_a_number_of_processes_that_divides_no_heads_is_refused() -> None:
    message = "3 processes can't share this model evenly, since it has 4 key heads.*: start 1, 2 or 4 processes"
    with pytest.raises(ConfigError, match=message):
        Config(attn=Config().attn.__class__(kv_n_heads=4), shard=Shard(0, 3))


def test_a_cut_within_a_group_is_refused(tmp_path: Path) -> None:
    write_fused(tmp_path / "dense", QUANTIZABLE, random_tensors(QUANTIZABLE, np.random.default_rng(2)))
    params, config = load(tmp_path / "dense")
    save(tmp_path / "small", quantize(params, config, Quantization(*[Format(4, 128)] * 4)), config)
    with pytest.raises(CheckpointError, match=r"2 processes can't share .*groups of .*out_proj.* start a single proc"):
        load(tmp_path / "small", shard=Shard(0, 2))


def test_a_file_that_was_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bits").write_bytes(bytes(4000))
    whole = bits_in_file(tmp_path / "bits", 0, (10, 100), mx.float32)
    (tmp_path / "bits").write_bytes(bytes(3000))
    with pytest.raises(ValueError, match="ends too early"):
        read_part(tmp_path / "bits", 0, whole, whole[5:])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's reads")
@pytest.mark.parametrize("layout", ["fused", "split", "4 bits"])
def test_half_of_a_checkpoint_is_read(layout: str, tmp_path: Path) -> None:
    ffn = {"ffn_hidden_size": 2048, "moe_num_experts": 4, "moe_top_k": 2}
    raw = QUANTIZABLE | {"d_model": 512, "n_layers": 1, "ffn_config": ffn}
    write_fused(tmp_path / "fused", raw, random_tensors(raw, np.random.default_rng(3)), dtype="bfloat16")
    if layout != "fused":
        params, config = load(tmp_path / "fused")
        params = quantize(params, config) if layout == "4 bits" else params
        save(tmp_path / layout, params, config, layout="split")
    size = sum(file.stat().st_size for file in (tmp_path / layout).glob("*.safetensors"))
    before = bytes_read()
    load(tmp_path / layout, shard=Shard(1, 2))
    assert 0.4 < (bytes_read() - before) / size < 0.55


def bytes_read() -> int:
    """The bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_view_of_a_tensor_is_read_from_its_file(data: st.DataObject, tmp_path: Path) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    start = data.draw(st.integers(0, 9))
    bits = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    (tmp_path / "bits").write_bytes(bytes(start) + bits.tobytes())
    whole = bits_in_file(tmp_path / "bits", start, shape, mx.bfloat16)
    axes = data.draw(st.permutations(range(len(shape))))
    slices = []
    for size in whole.transpose(axes).shape:
        first = data.draw(st.integers(0, size - 1))
        slices.append(slice(first, data.draw(st.integers(first + 1, size))))
    part = whole.transpose(axes)[tuple(slices)]
    assert np.array_equal(read_part(tmp_path / "bits", start, whole, part), bits.transpose(axes)[tuple(slices)])
