"""`python -m dbrx_fn.convert`: what it prints, refuses and survives."""

import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.convert import main
from dbrx_fn.model.quantization import Quantization, tree_formats
from dbrx_fn.ops.formats import Format
from tests.support import checkpoints
from tests.support.checkpoints import QUANTIZABLE
from tests.support.layouts_written import write_gguf

Done = Callable[..., str]
Refused = Callable[..., str]
KILLS = 100
# A file for each linear, so that a conversion of a tiny model takes a while, and shards begin and end all the time.
ALONE = ["--shard-size", "1e-9"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused checkpoint in bfloat16, of two shards."""
    folder = tmp_path_factory.mktemp("source") / "dbrx"
    tensors = checkpoints.random_tensors(QUANTIZABLE, np.random.default_rng(0))
    checkpoints.write_fused(folder, QUANTIZABLE, tensors, shards=2, dtype="bfloat16")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Done:
    """Runs the command, which must succeed, and returns what it printed."""

    def run(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must end with status 2 and one sentence that has these words."""

    def run(*arguments: object, words: str | tuple[str, ...] = ()) -> str:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        lines = [line for line in err.splitlines() if not line.startswith("going on after")]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert lines[0].endswith(".")
        for word in (words,) if isinstance(words, str) else words:
            assert word in lines[0]
        return lines[0]

    return run


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, whatever lies below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def work_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.converting"


def started(*arguments: object) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    command = [sys.executable, "-m", "dbrx_fn.convert", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# What it writes and prints


def test_a_quantized_model_for_here_and_mlx_lm(source: Path, tmp_path: Path, done: Done) -> None:
    out = done(source, tmp_path / "new" / "dbrx-4bit", "--quantize", "4")
    assert out.startswith(str(tmp_path / "new" / "dbrx-4bit"))
    assert "uint32, affine 4 bits, groups of 64" in out
    assert names(tmp_path / "new") == ["dbrx-4bit"]
    assert names(tmp_path / "new" / "dbrx-4bit") == ["config.json", "model.safetensors", "tokenizer.json"]
    formats = tree_formats(*load(tmp_path / "new" / "dbrx-4bit"))
    assert set(formats.values()) == {Format(4, 64)}
    assert not any(".router." in path for path in formats)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--quantize", "3:32"], Quantization(*[Format(3, 32)] * 4)),
        (["--quantize", "mxfp4"], Quantization(*[Format(4, 32, "mxfp4")] * 4)),
        (["--quantize", "4", "--experts", "none"], Quantization(None)),
        (["--experts", "2:128"], Quantization(Format(2, 128), None, None, None)),
        (
            ["--quantize", "4", "--attention", "nvfp4", "--embedding", "8", "--head", "6:32", "--router", "8"],
            Quantization(Format(4, 64), Format(4, 16, "nvfp4"), Format(8, 64), Format(6, 32), Format(8, 64)),
        ),
    ],
)
def test_formats_of_each_kind(
    options: list[str], expected: Quantization, source: Path, tmp_path: Path, done: Done
) -> None:
    done(source, tmp_path / "new", *options)
    formats = tree_formats(*load(tmp_path / "new"))
    kinds = {
        ".experts.": "experts",
        ".attn.": "attention",
        ".wte.": "embedding",
        "lm_head": "head",
        ".router.": "router",
    }
    found = {kind: {form for path, form in formats.items() if mark in path} for mark, kind in kinds.items()}
    assert found == {kind: set() if (form := getattr(expected, kind)) is None else {form} for kind in kinds.values()}


def test_dequantized_again_it_is_dense(source: Path, tmp_path: Path, done: Done, refused: Refused) -> None:
    done(source, tmp_path / "four", "--quantize", "4")
    refused(tmp_path / "four", tmp_path / "new", "--quantize", "8", words=("quantized already", "--dequantize"))
    refused(tmp_path / "four", tmp_path / "new", "--layout", "fused", words="can't hold quantized experts")
    done(tmp_path / "four", tmp_path / "dense", "--dequantize", "--layout", "fused")
    assert not tree_formats(*load(tmp_path / "dense"))
    done(tmp_path / "four", tmp_path / "eight", "--dequantize", "--quantize", "8")
    assert set(tree_formats(*load(tmp_path / "eight")).values()) == {Format(8, 64)}


@pytest.mark.parametrize("options", [[], ["--quantize", "3:128", *ALONE], ["--layout", "stacked"]])
def test_a_dry_run_says_what_will_be_written_and_writes_nothing(
    options: list[str], source: Path, tmp_path: Path, done: Done
) -> None:
    before = contents(source)
    planned = done(source, tmp_path / "new", *options, "--dry-run", "--json")
    table = done(source, tmp_path / "new", *options, "--dry-run")
    assert names(tmp_path) == []
    assert contents(source) == before

    said: dict[str, Any] = json.loads(planned)
    assert json.loads(done(source, tmp_path / "new", *options, "--json")) == said
    written = {file.name: file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors")}
    assert {file["file"]: file["bytes"] for file in said["files"]} == written
    assert said["bytes"] == sum(written.values())
    assert f"in {len(written)} file" in table
    assert sum(int(line.split()[0].replace(",", "")) for line in table.splitlines()[:-2]) == len(said["tensors"])
    assert said["from"] == "fused"


def test_it_runs_as_a_module(source: Path, tmp_path: Path) -> None:
    process = started(source, tmp_path / "new", "--json")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["layout"] == "split"


# What it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "7"], "--quantize is 7: bits and group_size are 7 and 64"),
        (["--quantize", "four"], "--quantize is 'four' where bits (4)"),
        (["--quantize", "4:"], "--quantize is '4:'"),
        (["--quantize", ""], "--quantize is ''"),
        (["--router", "4:48"], "--router is 4:48"),
        (["--shard-size", "0"], "--shard-size is 0"),
        (["--shard-size", "nan"], "--shard-size is nan"),
        (["--shard-size", "inf"], "--shard-size is inf"),
        (["--layout", "fused", "--quantize", "4"], "can't hold quantized experts"),
    ],
)
def test_wrong_options(options: list[str], words: str, source: Path, tmp_path: Path, refused: Refused) -> None:
    refused(source, tmp_path / "new", *options, words=words)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "options", [["--layout", "ggml"], ["--type", "q6_k"], ["--dtype", "int8"], ["--shard-size", "big"], ["--bits", "4"]]
)
def test_options_that_do_not_exist(
    options: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(source), str(tmp_path / "new"), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m dbrx_fn.convert: error: ")
    assert names(tmp_path) == []


def test_a_source_that_is_missing_or_damaged(source: Path, tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / "none", tmp_path / "new", words="none doesn't exist")
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "model-00002-of-00002.safetensors").unlink()
    refused(damaged, tmp_path / "new", words="lacks model-00002-of-00002.safetensors")
    assert names(tmp_path) == ["damaged"]


def test_what_exists_is_left_alone(source: Path, tmp_path: Path, refused: Refused) -> None:
    for name in ("folder", "file", "link"):
        out = tmp_path / name
        if name == "folder":
            out.mkdir()
        elif name == "file":
            out.write_text("mine")
        else:
            out.symlink_to("nothing")
        refused(source, out, words="exists already")
        refused("some/repository", out, words="exists already")
    assert names(tmp_path) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"
    refused(source, tmp_path / "file" / "new", words="can't be written")
    refused(source, ".", words="exists already")


RESIDENT = """
import sys
from pathlib import Path
from dbrx_fn.convert import main

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
assert main(sys.argv[1:]) == 0
print("\\ntook", 1024 * (kib("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused checkpoint of 400 MB in bfloat16, its experts in tensors of 64 MiB."""
    ffn = {"ffn_hidden_size": 4096, "moe_num_experts": 16, "moe_top_k": 4}
    config = QUANTIZABLE | {"d_model": 512, "ffn_config": ffn}
    narrow = config | {"ffn_config": ffn | {"ffn_hidden_size": 1}}
    tensors = checkpoints.random_tensors(narrow, np.random.default_rng(0))
    for name in tensors:
        if ".experts." in name:
            tensors[name] = np.resize(tensors[name], (16 * 4096, 512))
    folder = tmp_path_factory.mktemp("large") / "dbrx"
    checkpoints.write_fused(folder, config, tensors, dtype="bfloat16")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much was resident at most")
@pytest.mark.parametrize("options", [["--layout", "split"], ["--layout", "stacked"], ["--quantize", "4"]])
def test_memory_is_that_of_few_tensors(
    options: list[str], large: Path, tmp_path: Path, measured: Callable[[str, float], float]
) -> None:
    """The files' own pages count too."""
    command = [sys.executable, "-c", RESIDENT, str(large), str(tmp_path / "new"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    took = int(done.stdout.split()[-1]) / 2**26
    assert measured(f"times the largest tensor resident, {' '.join(options)}", took) < 3


def test_a_gguf_file_gets_another_checkpoints_tokenizer(tmp_path: Path, done: Done, refused: Refused) -> None:
    config = QUANTIZABLE | {"vocab_size": 4096}
    file = tmp_path / "dbrx.gguf"
    write_gguf(file, config, checkpoints.random_tensors(config, np.random.default_rng(0)), quantization="q8_0")
    done(file, tmp_path / "bare")
    assert names(tmp_path / "bare") == ["config.json", "model.safetensors"]
    done(file, tmp_path / "new", "--tokenizer", SMALL)
    assert load_tokenizer(tmp_path / "new").encode("To be") == load_tokenizer(SMALL).encode("To be")
    refused(file, tmp_path / "none", "--tokenizer", tmp_path / "bare", words="has no tokenizer.json")
    assert not (tmp_path / "none").exists()


def test_a_gguf_file_is_written_and_read(tmp_path: Path, done: Done, refused: Refused) -> None:
    file = tmp_path / "new.gguf"
    assert "5  blk.*.ffn_down_exps.weight     16 x 256 x 64  Q4_0" in done(
        SMALL, file, "--layout", "gguf", "--type", "q4_0"
    )
    assert names(tmp_path) == ["new.gguf"]
    assert load_tokenizer(file).encode("To be") == load_tokenizer(SMALL).encode("To be")
    refused(SMALL, file, "--layout", "gguf", "--type", "q4_0", words="exists already")
    told = json.loads(done(file, tmp_path / "b.gguf", "--layout", "gguf", "--dry-run", "--json"))
    assert {tensor["type"] for tensor in told["tensors"] if tensor["exact"]} == {"Q4_0"}
    done(file, tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder").fingerprint() == load_tokenizer(SMALL).fingerprint()
    assert names(tmp_path) == ["folder", "new.gguf"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("new.gguf", [], "new.gguf is the name of a GGUF file: give --layout gguf too, or name a folder."),
        ("new", ["--type", "q8_0"], "--type is for GGUF files: give --layout gguf too"),
        ("new", ["--layout", "gguf"], "new is the name of a folder where a GGUF file is written: name it new.gguf."),
        ("new.gguf", ["--layout", "gguf"], "bits in groups of 64, which no type of GGUF"),
        ("new.gguf", ["--layout", "gguf", "--quantize", "4"], "make formats of MLX, which a GGUF file doesn't have"),
        ("new.gguf", ["--layout", "gguf", "--shard-size", "5"], "--shard-size is for the other layouts"),
        ("new.gguf", ["--layout", "gguf", "--type", "f16", "--dtype", "float16"], "both say what floats become"),
    ],
)
def test_wrong_options_of_gguf_files(
    name: str, options: list[str], words: str, tmp_path: Path, refused: Refused
) -> None:
    refused(SMALL, tmp_path / name, *options, words=words)
    assert names(tmp_path) == []


def test_check_names_the_tensor(tmp_path: Path, refused: Refused, done: Done) -> None:
    tensors = checkpoints.random_tensors(QUANTIZABLE, np.random.default_rng(0))
    tensors["transformer.blocks.1.ffn.experts.mlp.v1"][300, 5] = np.nan
    checkpoints.write_fused(tmp_path / "bad", QUANTIZABLE, tensors)
    refused(tmp_path / "bad", tmp_path / "new", "--check", words="(transformer.blocks.1.ffn.experts.mlp.v1.weight)")
    assert names(tmp_path) == ["bad"]
    done(tmp_path / "bad", tmp_path / "new")


# Interruption


class Interrupted:
    """Conversions that are killed; whatever happens, the folder may only be absent or complete."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self.server, self.folder = server, folder
        self.expected: dict[str, str] = {}

    def run(self, *arguments: object, **killed: float) -> dict[str, Any]:
        """What `tests.support.convert_and_kill` says of it."""
        asked = {"arguments": [str(argument) for argument in arguments], **killed}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        if self.folder.exists():
            assert contents(self.folder) == self.expected
        return answer


@pytest.fixture
def interrupted(server: "subprocess.Popen[str]", tmp_path: Path) -> Interrupted:
    (tmp_path / "disturbed").mkdir()
    return Interrupted(server, tmp_path / "disturbed" / "dbrx")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 51 linears and norms, each of which becomes a file of its own with `ALONE`."""
    config = QUANTIZABLE | {"n_layers": 6, "d_model": 64}
    config["ffn_config"] = {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}
    folder = tmp_path_factory.mktemp("deep") / "dbrx"
    checkpoints.write_fused(folder, config, checkpoints.random_tensors(config, np.random.default_rng(0)), shards=2)
    return folder


@pytest.mark.parametrize(
    "options",
    [["--quantize", "4"], ["--layout", "stacked", "--dtype", "bfloat16"], ["--layout", "fused"], ["--check"]],
)
def test_killed_at_random_moments(
    options: list[str], deep: Path, tmp_path: Path, interrupted: Interrupted, done: Done
) -> None:
    arguments = [deep, interrupted.folder, *options, *ALONE]
    before = contents(deep)
    done(deep, tmp_path / "undisturbed", *options, *ALONE)
    interrupted.expected = contents(tmp_path / "undisturbed")
    assert len(interrupted.expected) == 51 + 2
    took = 1.0
    moments = random.Random(0)
    kills = resumed = 0
    while kills < KILLS // 4:
        begun = any(work_of(interrupted.folder).glob("checkpoint/*.safetensors"))
        resumed += begun
        answer = interrupted.run(*arguments, seconds=moments.random() * took)
        if answer["status"] == -signal.SIGKILL:
            kills += 1
            # Whatever else the machine has to do, some get far.
            took *= 1.1
            if not interrupted.folder.exists() or (work_of(interrupted.folder) / "plan.json").exists():
                continue
            # Killed when all was done but for what it leaves, which the same command can only say and clean up.
            answer = interrupted.run(*arguments)
            assert (answer["status"], "exists already" in answer["error"]) == (2, True), answer["error"]
            answer["status"] = 0
        assert answer["status"] == 0, answer["error"]
        if not begun:
            took = answer["took"]
        assert contents(interrupted.folder) == interrupted.expected
        assert names(interrupted.folder.parent) == ["dbrx"]
        shutil.rmtree(interrupted.folder)
    assert resumed
    assert interrupted.run(*arguments)["status"] == 0
    assert contents(interrupted.folder) == interrupted.expected
    assert names(interrupted.folder.parent) == ["dbrx"]
    assert contents(deep) == before


def test_killed_before_each_of_its_file_operations(
    source: Path, tmp_path: Path, interrupted: Interrupted, done: Done
) -> None:
    """Also between the last rename and the removal of what only the conversion needed."""
    arguments = [source, interrupted.folder, "--shard-size", "1e-3"]
    done(source, tmp_path / "undisturbed", *arguments[2:])
    interrupted.expected = contents(tmp_path / "undisturbed")
    operations = interrupted.run(*arguments)["operations"]
    assert operations > 20
    complete, told = 0, []
    for operation in range(1, operations + 1):
        shutil.rmtree(interrupted.folder)
        assert interrupted.run(*arguments, operation=operation)["status"] == -signal.SIGKILL
        complete += interrupted.folder.exists()
        again = interrupted.run(*arguments)
        assert contents(interrupted.folder) == interrupted.expected
        assert names(interrupted.folder.parent) == ["dbrx"]
        if again["status"]:
            told.append(again["error"].strip())
    assert complete >= 2
    # Of the last operation, which removes the empty work folder: all was done before.
    assert all(error.endswith("dbrx exists already: choose another name, or remove it.") for error in told)
    assert len(told) <= 2


def killed(interrupted: Interrupted, *arguments: object) -> int:
    """Leaves an interrupted conversion behind; returns how many shards it had finished."""
    for operation in range(60, 10, -10):
        assert interrupted.run(*arguments, operation=operation)["status"] == -signal.SIGKILL
        finished = len(list(work_of(interrupted.folder).glob("checkpoint/*.safetensors")))
        if finished:
            return finished
    raise AssertionError("nothing was finished")


def test_finished_shards_are_not_written_again(
    deep: Path, interrupted: Interrupted, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(deep), str(interrupted.folder), *ALONE]
    finished = killed(interrupted, *arguments)
    first = work_of(interrupted.folder) / "checkpoint" / "model-00001-of-00051.safetensors"
    before = first.stat()
    assert main(arguments) == 0
    assert capsys.readouterr().err == f"going on after {finished} of 51 shards\n"
    after = (interrupted.folder / first.name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_a_conversion_with_other_options_left_is_not_used(
    deep: Path, tmp_path: Path, interrupted: Interrupted, done: Done
) -> None:
    killed(interrupted, deep, interrupted.folder, *ALONE, "--dtype", "float16")
    done(deep, interrupted.folder, *ALONE)
    done(deep, tmp_path / "undisturbed", *ALONE)
    assert contents(interrupted.folder) == contents(tmp_path / "undisturbed")
    assert names(interrupted.folder.parent) == ["dbrx"]


def test_a_source_that_changed_in_between(deep: Path, tmp_path: Path, interrupted: Interrupted, done: Done) -> None:
    changing = Path(shutil.copytree(deep, tmp_path / "changing"))
    killed(interrupted, changing, interrupted.folder, *ALONE)
    file = changing / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    done(changing, interrupted.folder, *ALONE)
    done(changing, tmp_path / "undisturbed", *ALONE)
    assert contents(interrupted.folder) == contents(tmp_path / "undisturbed")
    assert names(interrupted.folder.parent) == ["dbrx"]


def test_what_another_put_there_in_between_is_left_alone(
    deep: Path, interrupted: Interrupted, refused: Refused
) -> None:
    killed(interrupted, deep, interrupted.folder, *ALONE)
    interrupted.folder.mkdir()
    refused(deep, interrupted.folder, *ALONE, words="exists already")
    assert names(interrupted.folder) == []


def test_two_at_once(deep: Path, interrupted: Interrupted, done: Done, refused: Refused) -> None:
    """The second is refused and leaves the first alone, whose place is free when it is gone."""
    killed(interrupted, deep, interrupted.folder, *ALONE)
    before = contents(work_of(interrupted.folder))
    opened = os.open(work_of(interrupted.folder), os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    refused(deep, interrupted.folder, *ALONE, words="is being written by another conversion")
    refused(deep, interrupted.folder, "--quantize", "4", words="is being written by another conversion")
    assert contents(work_of(interrupted.folder)) == before
    os.close(opened)
    done(deep, interrupted.folder, *ALONE)


def test_many_at_once(deep: Path, tmp_path: Path, done: Done) -> None:
    """Of processes that begin together, one writes, and the others say so, or that the folder is there."""
    processes = [started(deep, tmp_path / "new", *ALONE) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2]
    for process, error in zip(processes, errors, strict=True):
        if process.returncode:
            assert "is being written by another conversion" in error or "exists already" in error, error
    done(deep, tmp_path / "undisturbed", *ALONE)
    assert contents(tmp_path / "new") == contents(tmp_path / "undisturbed")
    assert names(tmp_path) == ["new", "undisturbed"]


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_has_no_room_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, small_disk: Path, refused: Refused, done: Done
) -> None:
    small = done(source, tmp_path / "small", "--quantize", "4", "--json")
    filler = small_disk / "filler"
    room = json.loads(small)["bytes"] // 2
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - room))
    refused(source, small_disk / "new", "--quantize", "4", words=("GiB free", "make room"))
    assert names(small_disk) == ["filler"]
    filler.unlink()
    done(source, small_disk / "new", "--quantize", "4")
    assert contents(small_disk / "new") == contents(tmp_path / "small")


def test_a_disk_that_becomes_full_keeps_what_is_finished(
    source: Path, tmp_path: Path, small_disk: Path, refused: Refused, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quantize", "4", *ALONE]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 300_000))
    # As if another had taken the room after it was checked.
    with monkeypatch.context() as patched:
        patched.setattr("dbrx_fn.checkpoints.conversion._check_space", lambda *_: None)
        refused(source, small_disk / "new", *arguments, words=("No space left", "goes on where it was"))
    assert names(small_disk) == [".new.converting", "filler"]
    finished = names(work_of(small_disk / "new") / "checkpoint")
    assert finished[0] == "model-00001-of-00019.safetensors"
    assert not any(name.startswith(".") for name in finished)
    filler.unlink()
    done(source, small_disk / "new", *arguments)
    done(source, tmp_path / "undisturbed", *arguments)
    assert contents(small_disk / "new") == contents(tmp_path / "undisturbed")


def test_files_that_may_not_grow(source: Path, tmp_path: Path, refused: Refused, done: Done) -> None:
    """As of a quota: on any machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(source, tmp_path / "new", words=("can't be written (File too large)", "goes on where it was"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
    done(source, tmp_path / "new")
