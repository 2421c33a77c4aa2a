"""A chat template is a stranger's program: whatever it asks for ends in seconds, in little memory, in one sentence."""

import json
import resource
import subprocess
import sys
from pathlib import Path

from tests.support.hostile_templates import cases

TOP = Path(__file__).parents[2]


def test_templates_that_ask_for_too_much_end_in_a_sentence() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))

    templates = list(cases())
    assert len(set(templates)) == len(templates) >= 380
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile_templates"],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=TOP,
        preexec_fn=limit,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(results) == len(templates)
    for number, end, said, seconds, memory in results:
        about = f"case {number} {templates[number][:300]!r}: {end}, {said}, {seconds} s, {memory} KiB"
        assert end in ("rendered", "refused"), about
        assert seconds < 20, about
        assert memory < 2 * 2**20, about
        if end == "refused":
            assert said.startswith(f"case {number} can't be rendered ("), about
            assert said.endswith("."), about
            assert said.isprintable(), about
            assert len(said) < 500, about
