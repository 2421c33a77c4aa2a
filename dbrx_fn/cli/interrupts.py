"""Ctrl-C during a command's imports ends the process at once, without a traceback.

Python turns Ctrl-C into an exception from the start, and nothing can catch it while modules are imported. So the
system's default action, which ends the process, is set until `dbrx_fn.cli.command.run` takes over. A program that
imports the package keeps its own handler.
"""

import os
import signal
import sys

SCRIPT = "dbrx-fn"
"""The console script's name."""

_started = sys.argv[0] if sys.argv else ""

BY_SCRIPT = os.path.basename(_started).split(".")[0] == SCRIPT
"""Whether this process was started by the console script."""

# "-m" is Python's name for a module that it is still looking for. Another package may be importing this one.
_BY_MODULE = _started == "-m" and any(word.removeprefix("-m").split(".")[0] == "dbrx_fn" for word in sys.orig_argv)

IS_COMMAND = BY_SCRIPT or _BY_MODULE
"""Whether this process is one of the package's commands."""

# A shell lets background processes ignore Ctrl-C, and that is kept.
if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
