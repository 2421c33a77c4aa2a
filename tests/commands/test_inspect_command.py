"""`python -m dbrx_fn.inspect`: what it says of checkpoints of every kind, right or wrong, at full size too."""

import functools
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dbrx_fn.checkpoints.config_file import config_from_dict, config_to_dict
from dbrx_fn.checkpoints.conversion import Request, convert, plan_conversion
from dbrx_fn.checkpoints.description import PARTS, describe
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.layouts import Layout, sources
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.inspect import main
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import DBRX, Config
from dbrx_fn.model.params import param_spec
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import memory_size
from tests.support import checkpoints, layouts_written

RAW: dict[str, Any] = checkpoints.QUANTIZABLE
TENSORS = checkpoints.random_tensors(RAW, np.random.default_rng(0))
OLD_CONVERSION = Quantization(embedding=None, router=Format(4, 64))
"""mlx-community/dbrx-instruct-4bit, of March 2024: a router of 4 bits and a dense embedding, in float16."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Inspect = Callable[..., tuple[int, Any]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Runs the command with `--json`; returns its exit status and what it said, or the error."""

    def run(checkpoint: Path, *options: str) -> tuple[int, Any]:
        status = main([str(checkpoint), "--json", *options])
        out, err = capsys.readouterr()
        if status == 2:
            assert out == ""
            assert re.fullmatch(r"error: [^\n]+\.\n", err), err
            return status, err
        assert err == ""
        return status, json.loads(out)

    return run


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return with_tokenizer(tmp_path / "dbrx", lambda folder: checkpoints.write_fused(folder, RAW, TENSORS))


@pytest.fixture
def quantized(dense: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "quantized"
    convert(plan_conversion(open_checkpoint(dense), Request(quantization=Quantization())), folder)
    return folder


@functools.cache
def small() -> Checkpoint:
    return open_checkpoint(SMALL)


def with_tokenizer(folder: Path, write: Callable[[Path], None]) -> Path:
    write(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def changed(folder: Path, **fields: Any) -> None:
    """Changes fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def write_holes(
    folder: Path, config: Config, layout: Layout, formats: Mapping[str, Format] | None = None, **fields: Any
) -> None:
    """A checkpoint of any size that takes no room on the disk: truthful headers, and holes for the data."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(config) | fields))
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config.dtype]
    header: dict[str, Any] = {}
    end = 0
    for source in sources(config, layout, formats).values():
        dtype = {None: kind, "uint32": "U32", "uint8": "U8"}[source.leaf.dtype]
        size = getattr(mx, source.leaf.dtype or config.dtype).size
        for stored in source.stored:
            start, end = end, end + size * int(np.prod(stored.shape))
            header[stored.name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content)
    os.truncate(file, 8 + len(content) + end)


# The released model


def test_the_released_model(said: Inspect, tmp_path: Path) -> None:
    write_holes(tmp_path / "dbrx", DBRX, "fused")
    status, dbrx = said(tmp_path / "dbrx")
    assert status == 0
    assert dbrx["layout"] == "fused"
    assert dbrx["parameters"] == 131_596_523_520
    assert dbrx["active_parameters"] == 36_469_708_800
    assert dbrx["weight_bytes"] == 2 * 131_596_523_520
    assert round(dbrx["weight_bytes"] / 2**30, 1) == 245.1
    assert 0 < dbrx["file_bytes"] - dbrx["weight_bytes"] < 100_000
    assert dbrx["bits_per_weight"] == 16
    assert dbrx["cache"] == {
        "bytes_per_token": 163_840,
        "context": 32_768,
        "batch_size": 1,
        "capacity": 32_768,
        "bytes": 5 * 2**30,
    }
    # All that is active, with one row of the embedding in place of the whole.
    assert dbrx["bytes_per_token"] == 2 * (36_469_708_800 - (100_352 - 1) * 6144)
    assert dbrx["memory"]["needed"] == dbrx["weight_bytes"] + 5 * 2**30
    assert dbrx["config"]["rope_theta"] == 500_000
    assert {dbrx["config"][name] for name in ("n_layers", "n_heads", "kv_n_heads")} == {40, 48, 8}
    assert dbrx["problems"] == dbrx["mixed"] == []


def test_the_community_s_old_conversion(said: Inspect, tmp_path: Path) -> None:
    config = config_from_dict(config_to_dict(DBRX) | {"torch_dtype": "float16"})
    formats = wanted_formats(config, OLD_CONVERSION)
    write_holes(tmp_path / "dbrx", config, "split", formats, quantization={"group_size": 64, "bits": 4})
    status, dbrx = said(tmp_path / "dbrx", "--context", "1000", "--batch-size", "3")
    assert status == 0
    # Listed with 69.766 GiB on the Hub, headers included.
    assert abs(dbrx["file_bytes"] / 2**30 - 69.766) < 0.002
    assert {part: round(dbrx["parts"][part]["bits_per_weight"], 3) for part in PARTS} == {
        "experts": 4.5,
        "attention": 4.5,
        "router": 4.5,
        "embedding": 16,
        "head": 4.5,
        "norms": 16,
    }
    assert dbrx["parts"]["experts"]["formats"] == {"affine 4:64": 120}
    assert dbrx["cache"]["capacity"] == 1024
    assert dbrx["cache"]["bytes"] == 3 * 1024 * 163_840
    # 4.5 bits for each active weight, but for norms and the row of the embedding.
    assert abs(dbrx["bytes_per_token"] / 1e9 - 20.2) < 0.05
    assert [text for text in dbrx["surprises"] if "router is quantized (affine 4:64)" in text]
    assert not [text for text in dbrx["surprises"] if text.startswith("config.json")]


@given(share=st.floats(0.2, 5), batch=st.integers(1, 4))
def test_it_fits_exactly_when_the_memory_holds_weights_and_cache(share: float, batch: int) -> None:
    checkpoint = small()
    per_token = describe(checkpoint).cache.bytes_per_token
    context = max(1, min(2**31 - 1, int(share * memory_size() / per_token / batch)))
    description = describe(checkpoint, context=context, batch_size=batch)
    needed = description.weight_bytes + batch * description.cache.capacity * per_token
    assert description.cache.capacity >= context
    assert description.memory.needed == needed
    assert description.memory.left == memory_size() - needed
    assert description.memory.fits == (needed <= memory_size())


# Sizes are those of what is loaded


def loaded_bytes(folder: Path) -> int:
    params, _ = load(folder)
    return sum(cast(mx.array, array).nbytes for array in dict(tree_flatten(params)).values())


def test_sizes_are_those_of_the_loaded_tree_and_its_cache(dense: Path, quantized: Path, said: Inspect) -> None:
    for folder in (dense, quantized, SMALL):
        status, found = said(folder, "--context", "64", "--batch-size", "2")
        assert status == 0
        assert found["weight_bytes"] == loaded_bytes(folder)
        assert sum(part["bytes"] for part in found["parts"].values()) == found["weight_bytes"]
        assert sum(part["parameters"] for part in found["parts"].values()) == found["parameters"]
        cache = init_cache(open_checkpoint(folder).config, batch_size=2, capacity=256)
        assert found["cache"]["bytes"] == cache.nbytes
        assert found["files"] == 1
        assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size
        assert found["surprises"] == []
        assert found["tokenizer"] == "tokenizer.json"


def test_every_layout_is_named(tmp_path: Path, said: Inspect) -> None:
    writers: dict[str, Callable[..., None]] = {
        "fused": layouts_written.write_megablocks,
        "split": checkpoints.write_split,
        "stacked": layouts_written.write_stacked,
        "converted": layouts_written.write_converted,
        "mlp_experts": layouts_written.write_mlp_experts,
        "nxd": layouts_written.write_nxd,
        "nxd_inference": functools.partial(layouts_written.write_nxd, form="inference"),
    }
    for layout, write in writers.items():
        write(tmp_path / layout, RAW, TENSORS)
        status, found = said(tmp_path / layout)
        assert (status, found["layout"], found["problems"]) == (0, layout, [])
        assert found["weight_bytes"] == 4 * found["parameters"]


def test_gguf(tmp_path: Path, said: Inspect) -> None:
    layouts_written.write_gguf(tmp_path / "dbrx.gguf", RAW, TENSORS, quantization="q4_0")
    status, found = said(tmp_path / "dbrx.gguf")
    assert (status, found["layout"], found["tokenizer"]) == (0, "gguf", None)
    assert found["parts"]["experts"]["formats"] == {"affine 4:32": 6}
    assert found["parts"]["router"]["formats"] == {"float32": 2}
    assert found["parts"]["experts"]["bits_per_weight"] == 5
    assert found["file_bytes"] == (tmp_path / "dbrx.gguf").stat().st_size


# What is wrong


def test_tensors_that_are_not_the_config_s_are_listed_and_exit_with_1(dense: Path, said: Inspect) -> None:
    arrays = {name: mx.array(tensor) for name, tensor in TENSORS.items()}
    del arrays["lm_head.weight"]
    arrays["extra.weight"] = mx.zeros((3,))
    arrays["transformer.norm_f.weight"] = mx.zeros((5,))
    arrays["transformer.wte.weight"] = mx.zeros(arrays["transformer.wte.weight"].shape, mx.int32)
    arrays["transformer.blocks.0.ffn.router.layer.weight"] = mx.zeros((4, 128), mx.bfloat16)
    mx.save_safetensors(str(dense / "model.safetensors"), arrays)
    status, found = said(dense)
    assert status == 1
    assert found["problems"] == [
        "extra.weight [3] in model.safetensors is unexpected",
        "lm_head.weight [40, 128] is missing",
        "transformer.norm_f.weight is [5] where [128] is expected",
        "transformer.wte.weight is I32 where one of float32, bfloat16, float16 is expected",
    ]
    assert len(found["mixed"]) == 1
    assert "router.layer.weight is bfloat16 where float32" in found["mixed"][0]
    assert found["parts"]["router"]["formats"] == {"bfloat16": 1, "float32": 1}
    assert found["parts"]["head"]["formats"] == {}
    assert found["parts"]["head"]["bits_per_weight"] is None


def test_bits_are_of_the_matrices_that_are_there(quantized: Path, said: Inspect) -> None:
    before = said(quantized)[1]["parts"]
    changed(quantized, n_layers=3)
    status, found = said(quantized)
    assert (status, len(found["problems"])) == (1, 17)
    for part in PARTS:
        assert found["parts"][part]["bits_per_weight"] == before[part]["bits_per_weight"]
        assert found["parts"][part]["formats"] == before[part]["formats"]
    assert found["surprises"] == []


def test_floats_of_several_dtypes_alone_exit_with_0(dense: Path, said: Inspect) -> None:
    """Since loading with `dtype`, and converting, take them."""
    arrays = {name: mx.array(t).astype(mx.float16 if "norm_1" in name else mx.float32) for name, t in TENSORS.items()}
    mx.save_safetensors(str(dense / "model.safetensors"), arrays)
    status, found = said(dense)
    assert (status, len(found["mixed"])) == (0, 2)


def test_the_table_shows_a_few_problems_and_counts_the_rest(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(dense, n_layers=9)
    assert main([str(dense)]) == 1
    out, _ = capsys.readouterr()
    assert "don't fit the config:\n  transformer.blocks.2.ffn.experts.mlp.v1 [1024, 128] is missing\n" in out
    assert f"and {7 * 8 - 12} more, which --json lists" in out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read as JSON"),
        (lambda folder: changed(folder, model_type="llama", architectures=[]), "only DBRX"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors file"),
        (lambda folder: mx.save_safetensors(str(folder / "more.safetensors"), {"a": mx.zeros(1)}), "unexpected"),
    ],
)
def test_what_can_t_be_described_is_one_sentence_and_exits_with_2(
    damage: Callable[[Path], object], words: str, dense: Path, said: Inspect
) -> None:
    damage(dense)
    status, found = said(dense)
    if words == "unexpected":
        assert (status, len(found["problems"])) == (1, 1)
    else:
        assert (status, words in found) == (2, True)


@pytest.mark.parametrize("options", [("--context", "0"), ("--batch-size", "-1"), ("--context", str(2**31))])
def test_sizes_that_nothing_can_have(options: tuple[str, ...], said: Inspect) -> None:
    status, error = said(SMALL, *options)
    assert status == 2
    assert f"is {options[1]} where" in error


# What is surprising


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: changed(folder, rope_parameters={"rope_theta": 10000}), "rope_parameters.rope_theta 10000 is"),
        (lambda folder: changed(folder, torch_dtype="bfloat16"), "says 'bfloat16' and most tensors are float32"),
        (lambda folder: changed(folder, quantization=None, quantization_config=None), "doesn't say that matrices are"),
        (lambda folder: changed(folder, quantization={"bits": 4, "group_size": 64}), "quantization_config differ"),
        (
            lambda folder: changed(
                folder,
                quantization={"bits": 8, "group_size": 64},
                quantization_config={"bits": 8, "group_size": 64},
            ),
            "says affine 8:64 where the tensors are affine 4:64 (transformer.wte.weight and 29 more)",
        ),
        (
            lambda folder: changed(
                folder,
                quantization={"bits": 4, "group_size": 64, "lm_head": False},
                quantization_config={"bits": 4, "group_size": 64, "lm_head": False},
            ),
            "says none where the tensors are affine 4:64 (lm_head.weight)",
        ),
        (
            lambda folder: changed(folder, quantization=None, quantization_config={"quant_method": "gptq", "bits": 4}),
            "names the quantization 'gptq'",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "No tokenizer.json"),
        (lambda folder: (folder / "generation_config.json").unlink(), "Neither generation_config.json nor"),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), "Neither generation_config.json nor"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 40}'), "tokens below 40"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": []}'), "Neither"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"1"), "not read (1 MiB): pytorch_model.bin"),
    ],
)
def test_surprises(change: Callable[[Path], object], words: str, quantized: Path, said: Inspect) -> None:
    change(quantized)
    status, found = said(quantized)
    assert status == 0
    assert [words in text for text in found["surprises"]] == [True], found["surprises"]


def test_several_formats_within_a_part_and_a_quantized_router(tmp_path: Path, said: Inspect) -> None:
    config = config_from_dict(RAW | {"torch_dtype": "float16"})
    formats = {path: Format(4, 32) for path, leaf in param_spec(config).items() if not leaf.is_norm}
    formats["transformer.blocks.1.ffn.experts.mlp.w2.weight"] = Format(8, 64)
    del formats["transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"]
    with_tokenizer(
        tmp_path / "dbrx", lambda folder: write_holes(folder, config, "stacked", formats, quantization={"bits": 4})
    )
    status, found = said(tmp_path / "dbrx")
    assert status == 0
    texts = "\n".join(found["surprises"])
    assert "experts: several formats, by numbers of matrices: affine 4:32 in 5, affine 8:64 in 1." in texts
    assert "attention: several formats, by numbers of matrices: affine 4:32 in 3, float16 in 1." in texts
    assert "The router is quantized (affine 4:32)" in texts


def test_a_dense_checkpoint_whose_config_says_quantized(dense: Path, said: Inspect) -> None:
    changed(dense, quantization={"bits": 4, "group_size": 64})
    assert said(dense)[1]["surprises"] == [
        "config.json says that matrices are quantized, and none is: the tensors count."
    ]


def test_stop_tokens_that_only_config_json_names(dense: Path, said: Inspect) -> None:
    (dense / "generation_config.json").unlink()
    changed(dense, eos_token_id=[1])
    assert said(dense)[1]["surprises"] == []
    changed(dense, eos_token_id="<|endoftext|>")
    (surprise,) = said(dense)[1]["surprises"]
    assert surprise == "config.json's eos_token_id is '<|endoftext|>' where tokens below 40 are expected."


def test_a_context_that_the_model_was_not_made_for(dense: Path, said: Inspect) -> None:
    assert "65 tokens is longer than the 64" in said(dense, "--context", "65")[1]["surprises"][0]
    assert said(dense, "--context", "64")[1]["surprises"] == []


def test_the_released_tokenizer_is_tiktoken_s(dense: Path, said: Inspect) -> None:
    (dense / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4"}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    found = said(dense)[1]
    assert found["tokenizer"] == "tiktoken's gpt-4, downloaded on first use"
    assert found["surprises"] == []


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMALL), "--context", "1000"]) == 0
    out, _ = capsys.readouterr()
    for line in (
        "layout        split (mlx-lm's: a matrix for each expert)",
        "parameters    6,871,808",
        "active        3,922,688 to a token",
        "              2.5 MiB for 1 x 1,000 tokens (room for 1,024)",
    ):
        assert line in out.splitlines()
    assert re.search(r"\nexperts +3,932,160 +4\.2 MiB +9\.00  affine 8:64\n", out)
    assert max(map(len, out.splitlines())) <= 100
    assert "\nfits          yes, " in out


def test_as_a_command_whose_reader_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dbrx_fn.inspect", str(SMALL), "--json"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_module_does_not_shadow_the_standard_library_s() -> None:
    assert inspect.getfile(inspect) != inspect.getfile(main)
    assert inspect.signature(main).parameters.keys() == {"arguments"}


# Repositories


@dataclass(frozen=True)
class Said:
    """What the command said of a repository, and how many bytes of its files it was sent."""

    status: int
    out: str
    err: str
    sent: int


@contextmanager
def hub(folders: Path) -> Iterator[tuple[str, Counter[str]]]:
    """A server on this machine that speaks as the Hub does, a repository `someone/NAME` for each folder.

    Yields its address, and the bytes of files that it sent by repository.
    """
    sent: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            api = re.fullmatch(r"/api/models/(someone/(\w+))(/tree|/revision)?(/.*)?", path)
            resolve = re.fullmatch(rf"/(someone/(\w+))/resolve/{COMMIT}/(.+)", path)
            if api is not None:
                files = sorted(file for file in (folders / api[2]).iterdir() if file.is_file())
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{n:040x}"}
                    for n, file in enumerate(files)
                ]
                model = {"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
                self.answer(json.dumps(tree if api[3] == "/tree" else model).encode())
            elif resolve is not None and (folders / resolve[2] / resolve[3]).is_file():
                self.send_file(resolve[1], folders / resolve[2] / resolve[3])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send_file(self, repository: str, file: Path) -> None:
            size = file.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), min(size, int(wanted[2]) + 1)) if wanted else (0, size)
            content = b""
            if self.command == "GET":
                with file.open("rb") as opened:
                    opened.seek(start)
                    content = opened.read(stop - start)
            sent[repository] += len(content)
            self.answer(content, 206 if wanted else 200, stop - start)

        def answer(self, content: bytes, status: int = 200, size: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if size is None else size))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{zlib.crc32(self.path.encode()):x}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


def without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_the_head(folder: Path) -> None:
    arrays = {name: mx.array(tensor) for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def with_names_elsewhere(folder: Path) -> None:
    (folder / "deeper").mkdir()
    (folder / "model.safetensors").rename(folder / "deeper" / "weights.safetensors")
    index = {"weight_map": {"lm_head.weight": "deeper/weights.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    checkpoints.write_fused(folder, RAW, TENSORS, shards=3)


REPOSITORIES: dict[str, Callable[[Path], object]] = {
    "without_safetensors": without_safetensors,
    "without_the_head": without_the_head,
    "with_names_elsewhere": with_names_elsewhere,
    "in_shards": in_shards,
    "without_layers": lambda folder: changed(folder, n_layers=0),
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Said]:
    """What the command said of each, in one process whose Hub is on this machine."""
    folders, cache = tmp_path_factory.mktemp("repositories"), tmp_path_factory.mktemp("cache")
    write_holes(folders / "released", DBRX, "fused")
    for name, change in REPOSITORIES.items():
        change(with_tokenizer(folders / name, lambda folder: checkpoints.write_fused(folder, RAW, TENSORS)))
    code = """
import contextlib, io, json, sys
from dbrx_fn.inspect import main
for name in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([name, "--json", "--revision", "main"])
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
    names = ["released", *REPOSITORIES]
    with hub(folders) as (address, sent):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        command = [sys.executable, "-c", code, *(f"someone/{name}" for name in names)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    return {
        name: Said(status, out, err, sent[f"someone/{name}"])
        for name, (status, out, err) in zip(names, answers, strict=True)
    }


def test_of_a_repository_only_small_files_and_headers_are_read(
    repositories: Mapping[str, Said], said: Inspect, tmp_path: Path
) -> None:
    released = repositories["released"]
    assert released.status == 0, released.err
    assert released.sent < 300_000
    write_holes(tmp_path / "released", DBRX, "fused")
    found, local = json.loads(released.out), said(tmp_path / "released")[1]
    assert found["checkpoint"] == "someone/released"
    # Headers are written anew, so that white space may differ.
    assert abs(found["file_bytes"] - local["file_bytes"]) < 20_000
    others = {"checkpoint", "file_bytes"}
    assert {k: v for k, v in found.items() if k not in others} == {k: v for k, v in local.items() if k not in others}


def test_a_repository_in_shards(repositories: Mapping[str, Said]) -> None:
    found = json.loads(repositories["in_shards"].out)
    assert (repositories["in_shards"].status, found["files"], found["problems"]) == (0, 3, [])
    assert found["surprises"] == []
    assert found["tokenizer"] == "tokenizer.json"


def test_a_repository_that_lacks_a_tensor(repositories: Mapping[str, Said]) -> None:
    answer = repositories["without_the_head"]
    assert (answer.status, json.loads(answer.out)["problems"]) == (1, ["lm_head.weight [40, 128] is missing"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without_safetensors", "The headers of someone/without_safetensors's weights can't be had from the"),
        ("with_names_elsewhere", "names 'deeper/weights.safetensors', which can't be a file beside it."),
        ("without_layers", "someone/without_layers/config.json: n_layers is 0 where it must be a positive integer."),
    ],
)
def test_repositories_that_can_t_be_described(name: str, words: str, repositories: Mapping[str, Said]) -> None:
    answer = repositories[name]
    assert (answer.status, answer.out) == (2, "")
    assert words in answer.err.splitlines()[-1]
    assert answer.err.splitlines()[-1].startswith("error: ")
