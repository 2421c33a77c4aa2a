"""Runs conversions in processes that are killed, without starting a Python for each: they are forked off this one.

A line on standard input asks for one: JSON of `arguments`, and of `seconds` after which it is killed, or of the number
of the file `operation` before which it is. The second of `arguments` is the folder to write. `command` is `fuse`, or
`convert` if it isn't given. With `interrupted`, the signal is Ctrl-C's, and the process may end as it likes. A line on
standard output has its `status` (negative: the signal), what it printed as `error`, how many `operations` it came to,
and how long it `took`.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dbrx_fn import convert, fuse

# Audit events (https://docs.python.org/3/library/audit_events.html) are raised before what they tell of happens.
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def converted(main: Callable[[list[str]], int], arguments: list[str], operation: int | None, place: Path) -> NoReturn:
    """Never returns; what it prints goes into files in `place`."""
    count = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _CHANGES or (event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = details[0]
        # Within an open work folder, names have no folder before them.
        if not isinstance(path, int) and (Path(arguments[1]).name in str(path) or "/" not in str(path)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        with (place / "out").open("w") as out, (place / "err").open("w") as err:
            sys.stdout, sys.stderr = out, err
            sys.addaudithook(hook)
            status = main(arguments)
            operations = count
        (place / "operations").write_text(str(operations))
    except KeyboardInterrupt:
        # It came before the command takes the signal, or after its end.
        status = 130
    finally:
        os._exit(status)


def serve() -> None:
    """Answers until standard input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            child = os.fork()
            if not child:
                main = {"convert": convert.main, "fuse": fuse.main}[asked.get("command", "convert")]
                converted(main, asked["arguments"], asked.get("operation"), place)
            began = time.monotonic()
            deadline = began + asked.get("seconds", 60)
            ended = False
            while not ended and time.monotonic() < deadline:
                time.sleep(0.001)
                ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            took = time.monotonic() - began
            os.kill(child, signal.SIGINT if asked.get("interrupted") else signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            told = {file.name: file.read_text() for file in place.iterdir()}
        operations = int(told.get("operations") or 0)
        answer = {"status": status, "error": told.get("err", ""), "operations": operations, "took": took}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
