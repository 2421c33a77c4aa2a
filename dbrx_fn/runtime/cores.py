"""The cores that this process may use."""

import os


def usable_cores() -> int:
    """How many cores this process may use: fewer than the machine's, if `taskset` or a container says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
