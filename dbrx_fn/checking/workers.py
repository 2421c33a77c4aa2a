"""Runs checks in several processes, whose kernels are compiled side by side.

On an NVIDIA GPU most of the time goes into compiling kernels: about 3 s each on one core, and one at a time in each
process. A CPU gains nothing, since one process uses all its cores. A Mac's kernels come compiled with MLX.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from dbrx_fn.checking.checks import Check, Outcome, run_checks
from dbrx_fn.checking.compiled_kernels import compiled_in, kernel_folder, lend_kernels, share_kernels
from dbrx_fn.checking.worker import Plan, Worker
from dbrx_fn.runtime.device import backend, on_cpu

_MOST = 12
_MEMORY = 2 * 2**30
"""Bytes for a process, on the GPU (half a GB for its CUDA context) and outside."""
PATIENCE = 60.0
"""A check hangs if it compiles no kernel for this many seconds and doesn't end."""
_TURN = 0.5
"""Seconds between two looks at the clock and the kernels."""


def worker_count() -> int:
    """The number of processes for this machine. 1 means that the checks run in this one."""
    if on_cpu() or backend() != "cuda":
        return 1
    cores = 3 * (os.cpu_count() or 1) // 4
    outside = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(_MOST, cores, int(mx.device_info()["free_memory"]) // _MEMORY, outside // _MEMORY))


def run_in_workers(
    checks: Sequence[Check], plan: Plan, until: float, workers: int, patience: float = PATIENCE
) -> list[Outcome]:
    """Runs checks in several processes. Those that haven't ended at `until` (`time.monotonic`) are left out.

    A check whose process dies, or that hangs, is wrong, and a new process takes the others. If no process can start,
    for example because the GPU is reserved for one, the checks run in this process.

    Args:
        checks: what `plan` returns.
        plan: makes the same checks in a process.
        until: the end.
        workers: the largest number of processes.
        patience: as `PATIENCE`.
    """
    bar = tqdm(total=len(checks), desc="checking", unit="check", disable=None, leave=False)
    with tempfile.TemporaryDirectory(prefix="dbrx_fn-check-") as folder, bar:
        crew = _Crew(checks, plan, Path(folder), patience)
        try:
            for _ in range(min(workers, len(crew.families))):
                crew.hire()
            while crew.at_work and len(crew.outcomes) < len(checks) and time.monotonic() < until:
                crew.take_turn()
                bar.update(len(crew.outcomes) - bar.n)
        finally:
            crew.end()
    rest = [n for n in range(len(checks)) if n not in crew.outcomes]
    if not crew.able:
        crew.outcomes.update(zip(rest, run_checks([checks[n] for n in rest], until), strict=True))
    elif not crew.at_work:
        crew.outcomes.update((n, Outcome(checks[n], 0.0, None, "no process can start any more")) for n in rest)
    return [crew.outcomes.get(n, Outcome(check)) for n, check in enumerate(checks)]


@dataclass
class _Task:
    """A worker's present check, as its index, and the family that it is from. `since`: when it last showed progress."""

    family: deque[int] = field(default_factory=deque)
    check: int | None = None
    started: float = 0.0
    since: float = 0.0


class _Crew:
    """The workers, what they are at, what is left to do, and what is done. `able`: whether any process could start."""

    def __init__(self, checks: Sequence[Check], plan: Plan, folder: Path, patience: float) -> None:
        self.checks, self.plan, self.folder, self.patience = checks, plan, folder, patience
        self.kept = kernel_folder()
        self.at_work: dict[Worker, _Task] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.able = False
        by_kernels: dict[object, deque[int]] = {}
        for n, check in enumerate(checks):
            same = (check.family or check.group, check.backend, check.compiles, check.kernels)
            by_kernels.setdefault(same, deque()).append(n)
        self.families = list(by_kernels.values())
        self.untaken = deque(self.families)

    def hire(self) -> None:
        kernels = Path(tempfile.mkdtemp(dir=self.folder))
        lend_kernels(self.kept, kernels)
        self.at_work[Worker(self.plan, kernels)] = _Task()

    def end(self) -> None:
        """Ends all processes, and keeps the kernels that they have compiled."""
        for worker in self.at_work:
            worker.kill()
        for worker, task in self.at_work.items():
            worker.ended()
            self._share(worker, task)

    def take_turn(self) -> None:
        """Listens to the workers, shares their kernels, and ends what hangs."""
        ready = wait([worker.link for worker in self.at_work], _TURN)
        for worker in [worker for worker in self.at_work if worker.link in ready]:
            self._listen(worker)
        for worker, task in list(self.at_work.items()):
            self._share(worker, task)
            if task.check is not None and time.monotonic() - task.since > self.patience:
                worker.kill()
                worker.ended()
                self._lose(worker, f"it hangs: it made no progress in {self.patience:g} s")

    def _listen(self, worker: Worker) -> None:
        task = self.at_work[worker]
        try:
            answer = worker.answer()
        except EOFError:
            self._lose(worker, f"its process ended with {worker.ended()}")
            return
        self.able = True
        if answer is not None and task.check is not None:
            self.outcomes[task.check] = Outcome(self.checks[task.check], *answer)
        task.check = None
        self._share(worker, task)
        task.check = self._next(task)
        task.started = task.since = time.monotonic()
        if task.check is not None:
            worker.start(task.check)

    def _lose(self, worker: Worker, problem: str) -> None:
        """Takes a new worker for one that ended in a check. One that couldn't start isn't replaced."""
        task = self.at_work.pop(worker)
        if task.check is not None:
            check = self.checks[task.check]
            self.outcomes[task.check] = Outcome(check, time.monotonic() - task.started, None, problem)
            self.hire()

    def _next(self, task: _Task) -> int | None:
        """A check of the same family, or else of one that nobody has taken, or else of the one with most left."""
        if not task.family:
            task.family = self.untaken.popleft() if self.untaken else max(self.families, key=len)
        return task.family.popleft() if task.family else None

    def _share(self, worker: Worker, task: _Task) -> None:
        new = compiled_in(worker.kernels, idle=task.check is None)
        if new:
            share_kernels(new, worker.kernels, [self.kept, *(other.kernels for other in self.at_work)])
            task.since = time.monotonic()
