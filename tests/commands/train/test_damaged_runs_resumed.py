"""Runs that were damaged, that left the range of numbers, or whose disk was full: what is kept, and what is said."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.model.params import init_params
from dbrx_fn.runs.folder import RunFolder
from tests.support.tiny_runs import (
    TINY,
    arguments,
    contents,
    metrics,
    names,
    parameters,
    write_config,
    write_text,
)

Trained = Callable[..., str]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "training/state.json", "training/state.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "noise", "a bit"])
def test_damaged_checkpoints(file: str, damage: str, copy: Path, finished: Path, trained: Trained) -> None:
    """The one before is gone on from, which is told, and the damaged one is made again; what is left of it stays."""
    checkpoint = copy / "checkpoints" / "step-00000012"
    damaged = checkpoint / file
    content = bytearray(damaged.read_bytes())
    if damage == "gone":
        damaged.unlink()
    elif damage == "cut":
        damaged.write_bytes(content[: len(content) // 2])
    else:
        content[-20:] = content[-20:-1] + bytes([content[-1] ^ 1]) if damage == "a bit" else b"\xff" * 20
        damaged.write_bytes(content)
    said = trained(["--out", str(copy), "--resume"])
    aside = [entry for entry in (copy / "checkpoints").iterdir() if entry.name.startswith("damaged-step-00000012-")]
    assert len(aside) == 1
    assert f"warning: The checkpoint {checkpoint} is damaged (" in said
    assert f"and is now called {aside[0].name}: the run goes on after step 8 instead." in said
    assert "resumed after step 8" in said
    shutil.rmtree(aside[0])
    for part in ("checkpoints", "model"):
        assert contents(copy / part) == contents(finished / part)
    assert metrics(copy) == metrics(finished)


def test_no_checkpoint_is_whole(copy: Path, finished: Path, refused: Refused, trained: Trained) -> None:
    """Nothing is moved; without them the run begins again, as is said."""
    for step in (8, 12):
        file = copy / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    said = refused(["--out", str(copy), "--resume"], "holds no whole checkpoint", "--resume begins with the first step")
    assert all(f"step-{step:08d}: " in said for step in (8, 12))
    assert names(copy / "checkpoints") == ["step-00000008", "step-00000012"]
    shutil.rmtree(copy / "checkpoints")
    trained(["--out", str(copy), "--resume"])
    for part in ("checkpoints", "model"):
        assert contents(copy / part) == contents(finished / part)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(copy: Path, finished: Path, trained: Trained) -> None:
    (copy / "checkpoints" / "step-00000012").rename(copy / "checkpoints" / "step-00000011")
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000011 is damaged (it is of step 12)" in said
    assert "resumed after step 8" in said
    assert contents(copy / "model") == contents(finished / "model")


def test_a_checkpoint_that_holds_nan_is_not_the_last_good(copy: Path, trained: Trained) -> None:
    """As an earlier version might have saved it, without sums."""
    checkpoint = copy / "checkpoints" / "step-00000012"
    weights = dict(mx.load(str(checkpoint / "model.safetensors")))  # type: ignore[arg-type]
    weights["lm_head.weight"][3, 3] = float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), weights, {"format": "pt"})
    note = json.loads((checkpoint / "training" / "state.json").read_text())
    (checkpoint / "training" / "state.json").write_text(json.dumps({key: note[key] for key in ("step", "tensors")}))
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000012 is damaged (params.lm_head.weight holds NaN or infinity)" in said
    assert "resumed after step 8" in said


def test_checkpoints_of_an_earlier_version_are_taken_with_a_warning(
    copy: Path, finished: Path, trained: Trained
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    shutil.rmtree(copy / "model")
    file = copy / "checkpoints" / "step-00000008" / "training" / "state.json"
    note = json.loads(file.read_text())
    file.write_text(json.dumps({key: note[key] for key in ("step", "tensors")}))
    said = trained(["--out", str(copy), "--resume"])
    assert "step-00000008 has no checksums, as an earlier version wrote it: damage isn't seen." in said
    assert contents(copy / "model") == contents(finished / "model")


def test_a_checkpoint_of_another_run(
    copy: Path, text: Path, tmp_path: Path, refused: Refused, trained: Trained
) -> None:
    other = write_config(tmp_path / "config.json", n_layers=1)
    trained(arguments(tmp_path / "other", other, [text], steps=16))
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000016", copy / "checkpoints" / "step-00000016")
    said = refused(["--out", str(copy), "--resume"], "step-00000016 belongs to another run")
    assert "config.n_layers is 2 here and 1 there" in said
    assert names(copy / "checkpoints") == ["step-00000008", "step-00000012", "step-00000016"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "n_heads"), 2),
        (("config", "attn_config", "kv_n_heads"), 4),
        (("config", "ffn_config", "moe_loss_weight"), 0.5),
        (("recipe", "learning_rate"), 0.5),
        (("recipe", "dtype"), "bfloat16"),
        (("batch_size",), 8),
        (("sequence_length",), 8),
        (("seed",), 1),
    ],
)
def test_settings_that_the_checkpoints_were_not_made_with(
    path: tuple[str, ...], value: object, copy: Path, refused: Refused
) -> None:
    settings = json.loads((copy / "run.json").read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (copy / "run.json").write_text(json.dumps(settings))
    before = contents(copy)
    said = refused(["--out", str(copy), "--resume"], "belongs to another run, or this one was changed")
    assert f"{'.'.join(path)} is {value!r} here and" in said
    assert contents(copy) == before


def test_what_decides_nothing_may_be_changed(copy: Path, finished: Path, trained: Trained) -> None:
    settings = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(settings | {"save_every": 3, "log_every": 1, "eval_every": 6, "keep": 1}))
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    trained(["--out", str(copy), "--resume"])
    assert contents(copy / "model") == contents(finished / "model")
    assert names(copy / "checkpoints") == ["step-00000012"]


def test_data_of_another_run(copy: Path, config: Path, tmp_path: Path, refused: Refused, trained: Trained) -> None:
    """Whole files, which say that they are of another text."""
    other = tmp_path / "other"
    trained(arguments(other, config, [write_text(tmp_path / "other.md", seed=5)], tokenizer=copy / "tokenizer"))
    for name in ("train", "held_out"):
        shutil.rmtree(copy / "data" / name)
        shutil.copytree(other / "data" / name, copy / "data" / name)
        refused(["--out", str(copy), "--resume"], "isn't made of what run.json notes", "data.")


@pytest.mark.parametrize("what", ["changed", "gone", "added"])
def test_a_tokenizer_that_is_another(what: str, copy: Path, refused: Refused) -> None:
    file = copy / "tokenizer" / ("added_tokens.json" if what == "added" else "tokenizer.json")
    if what == "gone":
        file.unlink()
    else:
        file.write_text("{}")
    shutil.rmtree(copy / "checkpoints")
    refused(["--out", str(copy), "--resume"], "isn't made of what run.json notes", f"tokenizer.{file.name}")


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_metrics(line: bytes, copy: Path, refused: Refused) -> None:
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    (copy / "metrics.jsonl").write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    refused(["--out", str(copy), "--resume"], "metrics.jsonl, line 2")


# Numbers that leave their range


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "run"
    given = arguments(out, config, [text], steps=200, warmup=200, learning_rate=1e6, save_every=1, clip_norm=1e9)
    said = refused(given, "training stops", "the last good checkpoint is", "lower --learning-rate")
    run = RunFolder(out)
    last = run.saved_steps()[-1]
    assert str(run.checkpoint(last)) in said
    assert any(f"step {step}," in said for step in (last + 1, last + 2))
    assert all(np.isfinite(array).all() for array in parameters(run.checkpoint(last)).values())
    lines = (out / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert "Infinity" not in lines
    assert not (out / "model").exists()


def test_a_last_update_that_leaves_the_range_is_not_saved(
    config: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    """Though loss and gradients were finite."""
    more = {"warmup": 0, "learning_rate": 1e38, "weight_decay": 1e3, "held_out_share": 0}
    given = arguments(tmp_path / "run", config, [text], steps=1, **more)
    refused(given, "holds NaN or infinity after step 1", "no checkpoint was saved yet")
    assert RunFolder(tmp_path / "run").saved_steps() == []


def test_held_out_text_whose_loss_leaves_the_range(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    more = {"warmup": 0, "learning_rate": 1e38, "weight_decay": 1e3}
    refused(
        arguments(tmp_path / "run", config, [text], steps=1, **more), "held-out text's loss became nan after step 1"
    )
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_weights_that_hold_nan(text: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    config = config_from_dict(TINY)
    params = init_params(config, mx.random.key(0))
    params["lm_head"]["weight"][3, 3] = float("nan")
    save(tmp_path / "model", params, config, tokenizer_files=finished / "model")
    given = arguments(tmp_path / "run", None, [text], model=tmp_path / "model")
    refused(given, "The loss became nan at step 1", "no checkpoint was saved yet")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mount"), reason="needs Linux's tmpfs")
@pytest.mark.parametrize("left", [0, 50_000, 300_000, 590_000])
def test_a_full_disk(
    left: int, copy: Path, finished: Path, small_disk: Path, refused: Refused, trained: Trained
) -> None:
    """However much of a checkpoint still fits: what was there stays, and with room the run ends as it should."""
    for part in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(copy / part)
    run = Path(shutil.copytree(copy, small_disk / "run"))
    filler = small_disk / "filler"
    # Room for the lines of metrics.jsonl, which are written before.
    size = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 8192 - left
    filler.write_bytes(bytes(size))
    refused(["--out", str(run), "--resume"], "No space left")
    assert names(run / "checkpoints") == ["step-00000008"]
    assert contents(run / "checkpoints") == {
        name: content for name, content in contents(finished / "checkpoints").items() if "-00000008" in name
    }
    filler.unlink()
    trained(["--out", str(run), "--resume"])
    assert metrics(run) == metrics(finished)
    for part in ("checkpoints", "model"):
        assert contents(run / part) == contents(finished / part)


def test_files_that_may_not_grow(copy: Path, finished: Path, refused: Refused, trained: Trained) -> None:
    """As of a quota: the same, on any machine."""
    for part in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(copy / part)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        refused(["--out", str(copy), "--resume"], "step-00000012 can't be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(copy / "checkpoints") == ["step-00000008"]
    trained(["--out", str(copy), "--resume"])
    assert contents(copy / "checkpoints") == contents(finished / "checkpoints")


def test_a_disk_that_is_full_before_the_run_begins(config: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        refused(arguments(tmp_path / "run", config, [text]), "can't be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
