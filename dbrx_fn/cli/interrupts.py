"""Ctrl-C while a command is still being imported: it ends at once and without a traceback, as later.

Python turns Ctrl-C into an exception from its first moment on, and nothing can catch one that comes while modules are
imported. So the system's own action, which ends the process, is in force until `dbrx_fn.cli.command.run` takes over. A
program that imports the package keeps whatever it has set.
"""

import os
import signal
import sys

SCRIPT = "dbrx-fn"
"""The console script's name."""

_started = sys.argv[0] if sys.argv else ""

BY_SCRIPT = os.path.basename(_started).split(".")[0] == SCRIPT
"""Whether this process was started by the console script."""

# Python's name for a module that it is still looking for; another package may be the one that imports this by then.
_BY_MODULE = _started == "-m" and any(word.removeprefix("-m").split(".")[0] == "dbrx_fn" for word in sys.orig_argv)

IS_COMMAND = BY_SCRIPT or _BY_MODULE
"""Whether this process is one of the package's commands."""

# A shell has what it starts in the background ignore Ctrl-C: that stays.
if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
