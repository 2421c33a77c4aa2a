"""Runs commands as processes that end as real ones do, but fast: each is forked once all is imported.

    python tests/support/forked_commands.py < cases.json > results.json

A case has the command's `name`, its `arguments`, and what it finds for standard `output` and `error`: "file" (the
result tells its content), "gone" (a pipe without a reader), "full" or "closed". A result has the exit `status`,
negative for a signal, and both texts.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST = 60
"""Seconds, after which a command is ended by SIGALRM."""


def set_up(number: int, kind: str, file: Path) -> None:
    """Makes a standard stream what the case asks for."""
    if kind == "closed":
        os.close(number)
        return
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if kind == "full" else file, os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, number)
    os.close(writer)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Runs a case and returns its result, or `None` in the process that is to become the command."""
    kinds = {1: case.get("output", "file"), 2: case.get("error", "file")}
    files = {number: folder / str(number) for number in kinds}
    for file in files.values():
        file.write_bytes(b"")
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        for number, kind in kinds.items():
            set_up(number, kind, files[number])
        # As Python finds them when it starts.
        if kinds[1] == "closed":
            sys.stdout = None
        if kinds[2] == "closed":
            sys.stderr = None
        return None
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output, error = (files[number].read_text(errors="replace") for number in (1, 2))
    return {"status": status, "output": output, "error": error}


def main() -> int:
    """Runs all cases; in each child, becomes its command."""
    cases = json.load(sys.stdin)
    for case in cases:
        import_module(f"dbrx_fn.{case['name']}")
    results = []
    # Not a TemporaryDirectory, which each child would remove at its end.
    folder = Path(tempfile.mkdtemp())
    for case in cases:
        result = run(case, folder)
        if result is None:
            status: int = import_module(f"dbrx_fn.{case['name']}").main(case["arguments"])
            return status
        results.append(result)
    shutil.rmtree(folder)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
