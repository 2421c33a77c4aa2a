"""The commands of docs/fine-tuning.md, pasted one after the other into one shell."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import mlx.core as mx

from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from tests.support.pages import ROOT, blocks, environment

PAGE = ROOT / "docs" / "fine-tuning.md"
# In the place of DBRX's 132 billion parameters.
TINY = Config(
    d_model=64,
    n_heads=2,
    n_layers=2,
    vocab_size=4096,
    max_seq_len=2048,
    attn=AttnConfig(kv_n_heads=1),
    ffn=FFNConfig(64, 4, 2),
    dtype="bfloat16",
)


def run_tutorial(folder: Path, *, peers: bool) -> dict[str, str]:
    """Runs the page's commands in a copy of its documents, and returns what they print below each heading.

    The first training is the page's. The others are of two steps, but that for PEFT if `peers`, which also keeps
    mlx-lm's commands and PEFT's script.
    """
    shutil.copytree(ROOT / "docs" / "fine-tuning", folder / "docs" / "fine-tuning")
    shutil.copy(folder / "docs" / "fine-tuning" / "miller.jsonl", folder / "my.jsonl")
    write_random_checkpoint(folder / "dbrx-instruct", TINY, mx.random.key(0))
    script = ["set -e"]
    for number, block in enumerate(blocks(PAGE.read_text())):
        script.append(f"printf '\\n# {block.heading}\\n'")
        if block.language == "sh":
            script.append(block.code if peers else without_peers(block.code))
        elif peers:
            (folder / f"{number}.py").write_text(block.code)
            script.append(f"python {number}.py")
    (folder / "script.sh").write_text(shortened("\n".join(script), peers))
    given = environment(folder)
    mlx_lm = folder / "bin" / "mlx_lm.generate"
    mlx_lm.write_text('#!/bin/sh\nexec python -m mlx_lm.generate "$@"\n')
    mlx_lm.chmod(0o755)
    ended = subprocess.run(
        ["sh", "script.sh"], cwd=folder, env=given, capture_output=True, encoding="utf-8", timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    said: dict[str, str] = {}
    for part in re.split(r"^# ", ended.stdout, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        said[heading] = said.get(heading, "") + text
    return said


def without_peers(code: str) -> str:
    return "\n".join(line for line in code.splitlines() if not line.startswith("mlx_lm."))


def shortened(script: str, peers: bool) -> str:
    """With DBRX's stand-in, and with a server in the background, on a free port, until the shell ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ready = f"until curl -sf http://127.0.0.1:{port}/v1/models > models.json; do kill -0 $server; sleep 0.2; done"
    script, served = re.subn(
        r"^(python -m dbrx_fn\.serve .*)$", rf"\1 &\nserver=$!; trap 'kill $server' EXIT\n{ready}", script, flags=re.M
    )
    assert served == 1
    if not peers:
        script = "--steps 2 ".join(script.rsplit("--steps 60 ", 1))
    changed = {"8080": port, "databricks/dbrx-instruct": "dbrx-instruct", "--steps 200": "--steps 2"}
    for words, others in changed.items():
        assert words in script
        script = script.replace(words, others)
    return script
