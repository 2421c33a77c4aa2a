"""Conversions between layouts, dtypes and formats: to the last bit what loading and saving give."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors import safe_open

from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion
from dbrx_fn.checkpoints.layouts import WRITTEN, Written
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format, format_of_mode
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support import checkpoints, layouts_written
from tests.support.checkpoints import QUANTIZABLE, FileDtype
from tests.support.trees import case_of, tree

# No two sizes are the same, so that nothing fits where it doesn't belong.
RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 40,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
}
CASE = case_of(RAW, np.random.default_rng(0))
WIDE = case_of(QUANTIZABLE, np.random.default_rng(0))
FORMATS = [Format(bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
FORMATS += [format_of_mode(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
MIXED = Quantization(Format(3, 64), Format(8, 128), Format(6, 32), Format(4, 16, "nvfp4"), Format(8, 64))

Writer = Callable[..., None]


def in_megablocks_names(folder: Path, *given: Any, **options: Any) -> None:
    layouts_written.write_megablocks(folder, *given, **options, fuse_norm_attn_norm=False)


def in_gguf(folder: Path, *given: Any, dtype: str = "float32") -> None:
    kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    layouts_written.write_gguf(folder.with_suffix(".gguf"), *given, quantization=kind)  # type: ignore[arg-type]


pytestmark = pytest.mark.filterwarnings("ignore:The new checkpoint has no tokenizer")

WRITERS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "fused": (checkpoints.write_fused, {}),
    "fused, sharded": (checkpoints.write_fused, {"shards": 4}),
    "split": (checkpoints.write_split, {}),
    "split, sharded": (checkpoints.write_split, {"shards": 3}),
    "stacked": (layouts_written.write_stacked, {}),
    "converted, w2 upright": (layouts_written.write_converted, {"w2_transposed": True}),
    "converted, w2 as fused": (layouts_written.write_converted, {"w2_transposed": False}),
    "mlp_experts": (layouts_written.write_mlp_experts, {"w2_transposed": False, "qkv_apart": True}),
    "mlp_experts, Wqkv": (layouts_written.write_mlp_experts, {}),
    "nxd": (layouts_written.write_nxd, {}),
    "nxd, GQA's names": (layouts_written.write_nxd, {"form": "qkv_linear"}),
    "nxd for inference": (layouts_written.write_nxd, {"form": "inference"}),
    "MegaBlocks": (layouts_written.write_megablocks, {}),
    "MegaBlocks, not fused": (in_megablocks_names, {}),
    "gguf": (in_gguf, {}),
}


def written(folder: Path, name: str, dtype: FileDtype = "float32") -> Path:
    """`CASE`'s tensors in one of the forms."""
    write, options = WRITERS[name]
    write(folder, RAW, CASE.tensors, dtype=dtype, **options)
    return folder.with_suffix(".gguf") if name == "gguf" else folder


def converted(source: Path, folder: Path, **wanted: Any) -> Path:
    convert(plan_conversion(open_checkpoint(source), Request(**wanted)), folder)
    assert not list(folder.parent.glob(f".{folder.name}*"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, and with it its dtype and shape."""
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in mx.load(str(file)).items():  # type: ignore[union-attr]
            found[name] = f"{array.dtype} {array.shape} ".encode() + bits(array)
    return found


def bits(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def assert_same(params: Params, other: Params) -> None:
    """To the last bit: then logits are the same too."""
    found: dict[str, mx.array] = dict(tree_flatten(params))
    expected: dict[str, mx.array] = dict(tree_flatten(other))
    assert list(found) == list(expected)
    for path, leaf in found.items():
        assert (leaf.dtype, leaf.shape) == (expected[path].dtype, expected[path].shape), path
        assert bits(leaf) == bits(expected[path]), path


# Layouts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_the_same_tree_and_becomes_every_written_one(
    name: str, dtype: Dtype, tmp_path: Path
) -> None:
    expected = tree(replace(CASE.config, dtype=dtype), checkpoints.rounded(CASE.tensors, dtype))
    source = written(tmp_path / "source", name, dtype)
    if name == "gguf":
        # Norms and routers are float32 there, so that one dtype must be asked for.
        assert_same(load(source, dtype=dtype)[0], expected)
    else:
        assert_same(load(source)[0], expected)
    for layout in WRITTEN:
        params, config = load(converted(source, tmp_path / layout, layout=layout, dtype=dtype, shard_bytes=20_000))
        assert_same(params, expected)
        assert len(list((tmp_path / layout).glob("*.safetensors"))) > 2
        assert config == replace(CASE.config, dtype=dtype)
        assert open_checkpoint(tmp_path / layout).layout == layout


@pytest.mark.parametrize("layout", WRITTEN)
def test_what_is_written_is_what_saving_writes(layout: Written, tmp_path: Path) -> None:
    """Whichever way it went before."""
    save(tmp_path / "saved", CASE.params, CASE.config, layout=layout, shard_bytes=20_000)
    there = converted(written(tmp_path / "source", "nxd"), tmp_path / "there", layout="split")
    back = converted(there, tmp_path / "back", layout=layout, shard_bytes=20_000)
    assert tensors_of(back) == tensors_of(tmp_path / "saved")
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((back / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text())


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), target=st.sampled_from(WRITTEN), shard_bytes=st.integers(1, 10**6))
def test_any_shape_in_any_number_of_files(
    seed: int, target: Written, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("case")
    raw = checkpoints.random_config(rng)
    case = case_of(raw, rng)
    writers = [writer for writer in WRITERS if writer != "gguf"]
    write, options = WRITERS[writers[int(rng.integers(len(writers)))]]
    write(folder / "source", raw, case.tensors, **options)
    square = raw["d_model"] == raw["ffn_config"]["ffn_hidden_size"]
    if square and not options.get("w2_transposed", True):
        return
    assert_same(load(folder / "source")[0], case.params)
    assert_same(
        load(converted(folder / "source", folder / "new", layout=target, shard_bytes=shard_bytes))[0], case.params
    )


def test_two_layouts_at_once_are_refused_with_a_name_of_each(tmp_path: Path) -> None:
    tensors = CASE.tensors | checkpoints.split_tensors(RAW, CASE.tensors)
    checkpoints.write_fused(tmp_path / "both", RAW, tensors)
    with pytest.raises(CheckpointError, match=r"mix layouts .*experts\.mlp\.v1 and .*experts\.0\.v1\.weight"):
        open_checkpoint(tmp_path / "both")


def test_unknown_names_are_listed(tmp_path: Path) -> None:
    strange = {name.replace(".experts.mlp.", ".experts.bmm."): tensor for name, tensor in CASE.tensors.items()}
    checkpoints.write_fused(tmp_path / "strange", RAW, strange)
    with pytest.raises(CheckpointError, match=r"No known layout .*blocks\.0\.ffn\.experts\.bmm\.v1"):
        open_checkpoint(tmp_path / "strange")
    checkpoints.write_fused(tmp_path / "more", RAW, CASE.tensors | {"visual.weight": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"visual\.weight \[3\] in model\.safetensors is unexpected"):
        plan_conversion(open_checkpoint(tmp_path / "more"), Request())


# Dtypes


def mixed_dtypes(folder: Path) -> tuple[Path, Params]:
    """bfloat16, but for the routers, norms, and one expert's w1, which are float32; and the tree in float32."""
    short = checkpoints.rounded(CASE.tensors, "bfloat16")
    tensors = checkpoints.split_tensors(RAW, CASE.tensors)
    wide = [name for name in tensors if "norm_1" in name or "norm_2" in name or ".router." in name]
    wide.append("transformer.blocks.0.ffn.experts.1.w1.weight")
    arrays = {
        name: mx.array(np.ascontiguousarray(tensor)).astype(mx.float32 if name in wide else mx.bfloat16)
        for name, tensor in tensors.items()
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(RAW))
    full = {name: CASE.tensors[name] if name in wide else tensor for name, tensor in short.items()}
    experts = full["transformer.blocks.0.ffn.experts.mlp.w1"].reshape(3, 24, 32).copy()
    experts[1] = CASE.tensors["transformer.blocks.0.ffn.experts.mlp.w1"].reshape(3, 24, 32)[1]
    full["transformer.blocks.0.ffn.experts.mlp.w1"] = experts.reshape(72, 32)
    return folder, tree(CASE.config, full)


@pytest.mark.parametrize("layout", WRITTEN)
def test_mixed_dtypes_become_one_without_rounding_twice(layout: Written, tmp_path: Path) -> None:
    source, exact = mixed_dtypes(tmp_path / "source")
    assert_same(load(converted(source, tmp_path / "wide", layout=layout, dtype="float32"))[0], exact)
    params, config = load(converted(source, tmp_path / "half", layout=layout, dtype="float16"))
    assert config.dtype == "float16"
    assert_same(params, load(source, dtype="float16")[0])


def test_mixed_dtypes_are_not_rounded_unless_asked(tmp_path: Path) -> None:
    """As when loading."""
    source, _ = mixed_dtypes(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"w1.weight is float32 where bfloat16 is expected, as most are"):
        converted(source, tmp_path / "new")


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes_are_those_of_loading(stored: Dtype, asked: Dtype, tmp_path: Path) -> None:
    source = written(tmp_path / "source", "fused", stored)
    assert_same(load(converted(source, tmp_path / "new", dtype=asked))[0], load(source, dtype=asked)[0])


# Quantized


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_quantizing_is_that_of_the_tree(stored: Dtype, form: Format, tmp_path: Path) -> None:
    checkpoints.write_fused(tmp_path / "source", QUANTIZABLE, WIDE.tensors, dtype=stored)
    wanted = Quantization(form, form, form, form)
    params, config = load(tmp_path / "source")
    save(tmp_path / "saved", quantize(params, config, wanted), config, layout="split", shard_bytes=50_000)
    new = converted(tmp_path / "source", tmp_path / "new", quantization=wanted, shard_bytes=50_000)
    assert tensors_of(new) == tensors_of(tmp_path / "saved")
    assert (new / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


@pytest.mark.parametrize("asked", ["float32", "float16", None])
def test_quantizing_each_kind_otherwise_in_another_dtype(asked: Dtype | None, tmp_path: Path) -> None:
    checkpoints.write_split(tmp_path / "source", QUANTIZABLE, WIDE.tensors, dtype="bfloat16")
    params, config = load(tmp_path / "source", dtype=asked)
    new = converted(tmp_path / "source", tmp_path / "new", quantization=MIXED, dtype=asked, layout="stacked")
    assert_same(load(new)[0], quantize(params, config, MIXED))


def quantized(folder: Path, wanted: Quantization = MIXED) -> Path:
    save(folder, quantize(WIDE.params, WIDE.config, wanted), WIDE.config, layout="split")
    return folder


def test_quantized_matrices_only_move_between_layouts(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source")
    stacked = converted(source, tmp_path / "stacked", layout="stacked", shard_bytes=30_000)
    assert_same(load(stacked)[0], load(source)[0])
    again = converted(stacked, tmp_path / "again", layout="split")
    assert tensors_of(again) == tensors_of(source)
    assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("asked", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("layout", WRITTEN)
def test_dequantizing_is_that_of_the_tree(layout: Written, asked: Dtype | None, tmp_path: Path) -> None:
    source = quantized(tmp_path / "source")
    params, config = load(source, dtype=asked)
    new = converted(source, tmp_path / "new", layout=layout, dequantize=True, dtype=asked)
    assert_same(load(new)[0], dequantize(params, config))
    assert "quantization" not in json.loads((new / "config.json").read_text())


def test_quantized_otherwise_after_dequantizing(tmp_path: Path) -> None:
    source, other = quantized(tmp_path / "source"), Quantization(Format(8, 32), Format(8, 32), None, None)
    params, config = load(source)
    new = converted(source, tmp_path / "new", dequantize=True, quantization=other)
    assert_same(load(new)[0], quantize(dequantize(params, config), config, other))


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source", Quantization(None, Format(4, 64), None, None))
    checkpoint = open_checkpoint(source)
    with pytest.raises(InputError, match=r"attn\.Wqkv\.weight is quantized already.*--dequantize"):
        plan_conversion(checkpoint, Request(quantization=Quantization(attention=Format(8, 64))))
    # The same format is no second quantization, and other kinds are free.
    new = converted(source, tmp_path / "new", quantization=Quantization())
    assert_same(load(new)[0], quantize(WIDE.params, WIDE.config))


def test_fused_experts_can_not_be_quantized(tmp_path: Path) -> None:
    checkpoints.write_fused(tmp_path / "source", QUANTIZABLE, WIDE.tensors)
    checkpoint = open_checkpoint(tmp_path / "source")
    with pytest.raises(InputError, match="'fused', which can't hold quantized experts"):
        plan_conversion(checkpoint, Request(layout="fused", quantization=Quantization()))
    plan_conversion(checkpoint, Request(layout="fused", quantization=Quantization(experts=None)))


def test_group_sizes_that_do_not_divide(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "source", "fused"))
    with pytest.raises(InputError, match="group_size is 64 where a divisor of 32"):
        plan_conversion(checkpoint, Request(quantization=Quantization(attention=None, embedding=None, head=None)))


# NaN and infinity


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("transformer.blocks.1.ffn.experts.mlp.w2", "transformer.blocks.1.ffn.experts.mlp.w2.weight"),
        ("transformer.blocks.0.norm_attn_norm.norm_2.weight", "transformer.blocks.0.norm_attn_norm.norm_2.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_check_names_what_is_not_finite_and_leaves_nothing(name: str, path: str, value: float, tmp_path: Path) -> None:
    tensors = {key: tensor.copy() for key, tensor in CASE.tensors.items()}
    tensors[name].flat[-1] = value
    checkpoints.write_fused(tmp_path / "source", RAW, tensors, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=f"NaN or infinite in bfloat16 \\({path}\\)"):
        converted(tmp_path / "source", tmp_path / "new", check=True, shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    converted(tmp_path / "source", tmp_path / "unchecked")


def test_check_finds_what_becomes_infinite(tmp_path: Path) -> None:
    tensors = CASE.tensors | {"lm_head.weight": CASE.tensors["lm_head.weight"] * 1e6}
    checkpoints.write_fused(tmp_path / "source", RAW, tensors)
    converted(tmp_path / "source", tmp_path / "wide", check=True)
    with pytest.raises(CheckpointError, match=r"infinite in float16 \(lm_head\.weight\)"):
        converted(tmp_path / "source", tmp_path / "half", check=True, dtype="float16")


def test_check_changes_nothing_else(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source")
    unchecked = converted(source, tmp_path / "unchecked", layout="stacked")
    assert contents(converted(source, tmp_path / "checked", layout="stacked", check=True)) == contents(unchecked)


def test_check_looks_into_scales(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source")
    arrays: dict[str, mx.array] = dict(mx.load(str(source / "model.safetensors")))  # type: ignore[arg-type]
    scales = np.array(arrays["lm_head.scales"])
    scales[0, 0] = 0x7F
    (source / "model.safetensors").unlink()
    mx.save_safetensors(str(source / "model.safetensors"), arrays | {"lm_head.scales": mx.array(scales)})
    with pytest.raises(CheckpointError, match=r"\(lm_head\.scales\)"):
        converted(source, tmp_path / "new", check=True)


# What is carried over


def test_tokenizer_and_stop_tokens_are_carried_over(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", replace(CASE.config, vocab_size=300), mx.random.key(0))
    new = converted(tmp_path / "source", tmp_path / "new", layout="stacked")
    first, second = load_tokenizer(tmp_path / "source"), load_tokenizer(new)
    assert second.encode("To be, or") == first.encode("To be, or")
    assert second.stop_tokens == first.stop_tokens


def test_metadata_says_what_was_done(tmp_path: Path) -> None:
    checkpoints.write_fused(tmp_path / "source", QUANTIZABLE, WIDE.tensors, dtype="bfloat16")
    new = converted(tmp_path / "source", tmp_path / "new", quantization=Quantization(attention=None))
    with safe_open(new / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {
            "format": "mlx",
            "layout": "split",
            "converted_from": "fused, bfloat16",
            "converted_to": "split, affine 4 bits in groups of 64; bfloat16",
            "converted_by": "dbrx_fn",
        }


def test_progress_ends_at_the_bytes_that_are_written(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    conversion = plan_conversion(open_checkpoint(written(tmp_path / "source", "fused")), Request(shard_bytes=20_000))
    convert(conversion, tmp_path / "new", progress=lambda done, total: calls.append((done, total)))
    files = [path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors")]
    assert calls[-1] == (sum(files), sum(files)) == (conversion.nbytes, conversion.nbytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tree_does_not_depend_on_the_order_of_reading(tmp_path: Path) -> None:
    """Tensors that serve two leaves are there for both."""
    source = written(tmp_path / "source", "nxd for inference")
    assert_same(load(converted(source, tmp_path / "new", layout="stacked", shard_bytes=1))[0], CASE.params)
