"""GGUF files that are written: the gguf package reads the values and metadata that llama.cpp's converter writes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from numpy.typing import NDArray

import dbrx_fn
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion
from dbrx_fn.checkpoints.gguf_conversion import GGUF_TYPES, GgufRequest, GgufType, plan_gguf, write_gguf
from dbrx_fn.checkpoints.gguf_file import gguf_config
from dbrx_fn.checkpoints.gguf_quantize import blocks_of_floats
from dbrx_fn.checkpoints.gguf_types import TYPES
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.errors import CheckpointError, InputError, TokenizerError
from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.quantization import Quantization, dequantize
from dbrx_fn.ops.formats import Format
from tests.support import checkpoints, layouts_written
from tests.support.layouts_written import gguf_tensors

RAW = checkpoints.QUANTIZABLE
TENSORS = checkpoints.random_tensors(RAW, np.random.default_rng(0))
EXPECTED = gguf_tensors(RAW, TENSORS)
DTYPES: dict[str, Dtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

pytestmark = pytest.mark.filterwarnings("ignore:The new (file|checkpoint) has no tokenizer")
every_type = pytest.mark.parametrize("kind", GGUF_TYPES)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "dbrx"
    checkpoints.write_fused(folder, RAW, TENSORS)
    return folder


def written(source: Path, file: Path, request: GgufRequest | None = None) -> Path:
    plan = plan_gguf(open_checkpoint(source), request or GgufRequest())
    write_gguf(plan, file)
    assert file.stat().st_size == plan.nbytes
    return file


def data_of(file: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(file).tensors}


def bits(folder: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load(folder)[0]))


@every_type
def test_tensors_are_those_of_the_gguf_package_bit_for_bit(fused: Path, tmp_path: Path, kind: GgufType) -> None:
    found = data_of(written(fused, tmp_path / "new.gguf", GgufRequest(kind)))
    assert found.keys() == EXPECTED.keys()
    for name, tensor in EXPECTED.items():
        wanted = layouts_written.gguf_type(name, tensor, kind)
        expected: NDArray[Any] = quants.quantize(tensor, wanted)
        assert found[name] == (wanted, expected.tobytes()), name


def test_metadata_is_what_llama_cpp_s_converter_writes(fused: Path, tmp_path: Path) -> None:
    file, theirs = written(fused, tmp_path / "new.gguf"), tmp_path / "theirs.gguf"
    layouts_written.write_gguf(theirs, RAW, TENSORS)
    found, expected = (
        {
            key: field.contents()
            for key, field in GGUFReader(path).fields.items()
            if key.startswith(("dbrx.", "general."))
        }
        for path in (file, theirs)
    )
    assert expected.items() <= found.items()
    assert found.keys() - expected.keys() == {
        *("general.type", "general.name", "general.quantization_version", "general.file_type", "dbrx.vocab_size"),
    }
    assert gguf_config(file) == replace(open_checkpoint(fused).config, ffn=gguf_config(theirs).ffn)


@every_type
def test_what_is_written_is_read_and_written_again_bit_for_bit(fused: Path, tmp_path: Path, kind: GgufType) -> None:
    first = written(fused, tmp_path / "a.gguf", GgufRequest(kind))
    assert data_of(written(first, tmp_path / "b.gguf")) == data_of(first)
    assert data_of(written(first, tmp_path / "c.gguf", GgufRequest(kind))) == data_of(first)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_checkpoint_made_of_a_gguf_file_becomes_it_again(fused: Path, tmp_path: Path, kind: GgufType) -> None:
    first = written(fused, tmp_path / "a.gguf", GgufRequest(kind))
    convert(plan_conversion(open_checkpoint(first), Request("split", dtype="float32")), tmp_path / "folder")
    assert data_of(written(tmp_path / "folder", tmp_path / "b.gguf")) == data_of(first)


def test_four_bits_in_groups_of_32_are_q4_1_if_their_scales_are_float16(fused: Path, tmp_path: Path) -> None:
    usual = Format(4, 32)
    quantization = Quantization(experts=usual, attention=usual, embedding=usual, head=usual, router=None)
    for dtype in get_args(Dtype):
        request = Request("split", quantization, dtype=dtype)
        convert(plan_conversion(open_checkpoint(fused), request), tmp_path / dtype)
    file = written(tmp_path / "float16", tmp_path / "new.gguf")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    assert kinds == {"Q4_1", "F32"}
    found, expected = (
        dict(tree_flatten(dequantize(*load(path, dtype="float32")))) for path in (file, tmp_path / "float16")
    )
    assert all(mx.array_equal(found[path], expected[path]) for path in expected)
    with pytest.raises(
        InputError,
        match=r"^transformer\.wte\.weight has affine 4 bits in groups of 32, which no type .*--type, such as q8_0",
    ):
        plan_gguf(open_checkpoint(tmp_path / "float32"), GgufRequest())


def test_what_gguf_cannot_hold_is_written_from_floats_if_that_is_asked_for(tmp_path: Path) -> None:
    source = open_checkpoint(SMALL)
    with pytest.raises(InputError, match="has affine 8 bits in groups of 64, which no type of GGUF"):
        plan_gguf(source, GgufRequest())
    params, config = load(SMALL)
    expected = dict(tree_flatten(dequantize(params, config)))
    for request in (GgufRequest("f32"), GgufRequest(dequantize=True)):
        found = dict(tree_flatten(load(written(SMALL, tmp_path / f"{request.kind}.gguf", request))[0]))
        assert all(mx.array_equal(found[path], expected[path]) for path in expected)


def test_rows_that_are_no_whole_blocks_stay_floats(tmp_path: Path) -> None:
    raw = RAW | {"ffn_config": RAW["ffn_config"] | {"ffn_hidden_size": 40}}
    checkpoints.write_fused(tmp_path / "odd", raw, checkpoints.random_tensors(raw, np.random.default_rng(1)))
    kinds = {
        name: kind.name
        for name, (kind, _) in data_of(written(tmp_path / "odd", tmp_path / "odd.gguf", GgufRequest("q8_0"))).items()
    }
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 10), kind=st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]))
def test_quantizing_is_the_gguf_package_s_for_all_floats(seed: int, exponent: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    floats = (rng.standard_normal((5, 64)) * 2.0**exponent).astype(np.float32)
    floats[rng.random(floats.shape) < 0.2] = 0
    floats[0, :32], floats[1, :32] = 0, floats[1, 0]
    number = GGMLQuantizationType[kind]
    with np.errstate(all="ignore"):
        expected = quants.quantize(floats, number)
    assert np.array_equal(blocks_of_floats(floats, TYPES[number]).ravel(), expected.ravel())


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    found = load_tokenizer(written(SMALL, tmp_path / "new.gguf", GgufRequest("q8_0")))
    expected = load_tokenizer(SMALL)
    assert found.fingerprint() == expected.fingerprint()
    assert found.stop_tokens == expected.stop_tokens
    messages = [{"role": "user", "content": "Who goes there?"}]
    assert dbrx_fn.render_chat(messages, found.chat_format) == dbrx_fn.render_chat(messages, expected.chat_format)


def test_a_tokenizer_that_llama_cpp_would_take_for_another_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((SMALL / name).read_bytes())
    content = (SMALL / "tokenizer.json").read_text()
    for old, new, words in (
        ("{1,3}", "{1,4}", "cuts or normalizes texts in a way that llama.cpp has no name for"),
        ('"normalizer": null', '"normalizer": {"type": "NFC"}', "cuts or normalizes"),
        ('"rstrip": false', '"rstrip": true', "finds '<|endoftext|>' by the characters around it"),
    ):
        assert old in content
        (tmp_path / "tokenizer.json").write_text(content.replace(old, new, 1))
        with pytest.raises(TokenizerError, match=rf"^{tmp_path} has a tokenizer that {words[:20]}.*--tokenizer\.$"):
            plan_gguf(open_checkpoint(SMALL), GgufRequest("f32", tokenizer=tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e39),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "warm"),
        ("top_p", float("nan")),
        ("top_p", True),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", 2**40),
        ("top_k", 2.5),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_setting_for_drawing_that_is_no_such_number_is_refused(tmp_path: Path, name: str, value: object) -> None:
    shutil.copytree(SMALL, tmp_path / "source")
    file = tmp_path / "source" / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.5, name: value}))
    with pytest.raises(
        TokenizerError, match=rf"^{file}: {name} is .* from 0 to (1|2147483647) is expected: mend or remove it\.$"
    ):
        plan_gguf(open_checkpoint(tmp_path / "source"), GgufRequest(dequantize=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "top_p": 0.875, "temperature": None},
        {"do_sample": True, "temperature": 0.5, "top_k": 0, "min_p": 0.125},
        {"do_sample": False, "temperature": 0.5},
    ],
    ids=json.dumps,
)
def test_tokens_are_drawn_from_the_file_as_from_its_source(tmp_path: Path, settings: dict[str, object]) -> None:
    shutil.copytree(SMALL, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    with tokenizer_files(written(tmp_path / "source", tmp_path / "new.gguf", GgufRequest(dequantize=True))) as files:
        assert read_generation_config(files.folder) == read_generation_config(tmp_path / "source")


def test_settings_that_a_file_cannot_hold_give_a_warning(tmp_path: Path) -> None:
    shutil.copytree(SMALL, tmp_path / "source")
    settings = {"repetition_penalty": 1.3, "max_new_tokens": 9, "stop_strings": ["O"]}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="can't hold repetition_penalty, max_new_tokens, stop_strings of .*source/gen"):
        plan_gguf(open_checkpoint(tmp_path / "source"), GgufRequest(dequantize=True))


@pytest.mark.parametrize(("name", "value"), [("rope_theta", 1e39), ("clip_qkv", 1e39), ("clip_qkv", 1e-60)])
def test_a_number_that_float32_cannot_hold_is_refused(tmp_path: Path, name: str, value: float) -> None:
    raw = RAW | {"attn_config": RAW["attn_config"] | {name: value}}
    checkpoints.write_fused(tmp_path / "odd", raw, checkpoints.random_tensors(RAW, np.random.default_rng(1)))
    with pytest.raises(InputError, match=rf"^attn_config.{name} is 1e.*, and float32, as GGUF has it, can't hold that"):
        plan_gguf(open_checkpoint(tmp_path / "odd"), GgufRequest("f32"))


def test_a_template_with_half_a_character_is_written_as_it_is_rendered(tmp_path: Path) -> None:
    shutil.copytree(SMALL, tmp_path / "source")
    settings = tmp_path / "source" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "\ud800{{ messages }}"}))
    found = load_tokenizer(written(tmp_path / "source", tmp_path / "new.gguf", GgufRequest("q8_0")))
    assert (
        found.chat_format.template == load_tokenizer(tmp_path / "source").chat_format.template == "\ufffd{{ messages }}"
    )


def test_without_a_tokenizer_the_file_says_so(fused: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"The new file has no tokenizer: {fused} has no tokenizer"):
        file = written(fused, tmp_path / "new.gguf")
    assert GGUFReader(file).fields["tokenizer.ggml.model"].contents() == "no_vocab"
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(file)


def test_a_model_that_llama_cpp_would_compute_in_another_way_is_refused(tmp_path: Path) -> None:
    for key, value in (("moe_normalize_expert_weights", 2), ("ffn_act_fn", {"name": "gelu"})):
        raw = RAW | {"ffn_config": RAW["ffn_config"] | {key: value}}
        checkpoints.write_fused(tmp_path / key, raw, TENSORS)
        with pytest.raises(InputError, match=rf"^ffn_config\.{key} is .*llama\.cpp computes DBRX only with"):
            plan_gguf(open_checkpoint(tmp_path / key), GgufRequest())


def test_a_file_appears_whole_or_not_at_all(fused: Path, tmp_path: Path) -> None:
    plan, file = plan_gguf(open_checkpoint(fused), GgufRequest("q4_0")), tmp_path / "in" / "new.gguf"
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(plan, file, progress=interrupt)
    assert list(file.parent.iterdir()) == []
    assert len(seen) > 3
    write_gguf(plan, file)
    content = file.read_bytes()
    with pytest.raises(InputError, match=r"new\.gguf exists already"):
        write_gguf(plan, file)
    assert file.read_bytes() == content
    with pytest.raises(InputError, match=r"new is the name of a folder .* name it new\.gguf\."):
        write_gguf(plan, file.with_suffix(""))


def test_a_file_of_somebody_else_that_appears_meanwhile_is_kept(fused: Path, tmp_path: Path) -> None:
    plan, file = plan_gguf(open_checkpoint(fused), GgufRequest("q4_0")), tmp_path / "new.gguf"

    def make(done: int, total: int) -> None:
        file.write_text("mine")

    with pytest.raises(InputError, match=r"new\.gguf exists already"):
        write_gguf(plan, file, progress=make)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_check_names_the_tensor_that_is_not_finite(tmp_path: Path) -> None:
    tensors = {name: tensor.copy() for name, tensor in TENSORS.items()}
    tensors["transformer.blocks.1.ffn.experts.mlp.v1"][300, 5] = np.nan
    checkpoints.write_fused(tmp_path / "bad", RAW, tensors)
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite \(transformer\.blocks\.1\.ffn\.experts\.mlp\.v1\.weight\)"
    ):
        written(tmp_path / "bad", tmp_path / "new.gguf", GgufRequest(check=True))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_no_clip_becomes_a_clamp_of_0(tmp_path: Path) -> None:
    raw = RAW | {"attn_config": RAW["attn_config"] | {"clip_qkv": None}}
    checkpoints.write_fused(tmp_path / "free", raw, TENSORS)
    config: Config = gguf_config(written(tmp_path / "free", tmp_path / "new.gguf"))
    assert config.attn.clip_qkv is None
