"""The training loop of a run: it computes, logs, evaluates and saves, from the folder's last step to the end."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

import mlx.core as mx
from mlx.utils import tree_map
from tqdm import tqdm

from dbrx_fn.cli.stop_signals import deferred_stop
from dbrx_fn.cli.terminal import print_message, print_result
from dbrx_fn.data.batches import Batches
from dbrx_fn.data.token_file import TokenFile, check_ids, read_token_file
from dbrx_fn.drawing.figure import check_matplotlib, write_picture
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.perplexity import Evaluation, evaluate
from dbrx_fn.generation.sampling import random_key
from dbrx_fn.model.params import param_count
from dbrx_fn.model.partition import joined
from dbrx_fn.model.shard import Shard
from dbrx_fn.model.tree import Params
from dbrx_fn.runs.checkpoint import leaves
from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.runs.metrics_file import cut_metrics, evaluation_line, number, read_metrics, step_line, write_line
from dbrx_fn.runs.pictures import draw_expert_load, draw_losses
from dbrx_fn.runs.plan import Plan
from dbrx_fn.runs.start import model_sums, start_parts
from dbrx_fn.runs.together import Parallel, own_plan, whole_plan
from dbrx_fn.runtime.device import memory_size
from dbrx_fn.runtime.group import group
from dbrx_fn.runtime.memory import limited, wired
from dbrx_fn.training.memory_plan import plan_memory
from dbrx_fn.training.shared_state import whole_state
from dbrx_fn.training.step import Measured, State, init_state, learning_rate, train_step

_SMALLER = "a smaller --batch-size, more --micro-batches, or --recompute"


def train(folder: RunFolder, plan: Plan, steps: int | None = None, parallel: Parallel = "data") -> None:
    """Trains to the end and writes the model. The caller holds the folder's lock.

    Args:
        folder: a run that has been set up.
        plan: its settings.
        steps: the total number of steps, instead of the plan's. It must be more than are done.
        parallel: what several processes divide. All of them read the folder, and only the leader writes.

    Raises:
        InputError: if the folder's files don't belong together, if `steps` are done already, or if a step needs too
            much memory.
        CheckpointError: if all checkpoints are damaged.
        TrainingError: if a number becomes NaN or infinite.
        KeyboardInterrupt: after a signal, when the state has been saved.
    """
    if steps is not None:
        plan = plan.with_steps(steps)
    plan, replica = own_plan(plan, parallel)
    data = _open_data(folder, plan)
    folder.check_made_of(data.fingerprints, model_sums(plan))
    state, frozen, start, planned = _load_state(folder, plan, data)
    if group().share(start) != start:
        raise InputError(f"The processes read different checkpoints of {folder.path}: give all the same folder.")
    done = plan.recipe.steps
    if done < start or steps == start:
        raise InputError(
            f"{folder.settings_file if steps is None else '--steps'} asks for {done:,} steps where {start:,} are done:"
            f" give --resume with --steps of more than {start:,}."
        )
    if start < done:
        folder.check_model()
    if group().leads:
        cut_metrics(folder.metrics_file, start, plan.config)
        if steps is not None:
            folder.change_steps(steps)
    _tell(whole_plan(plan), data, start, planned, trained=sum(array.size for _, array in leaves(state["params"])))
    # Processes that share a run take less, each.
    alone = start < done and group().size == 1
    within = limited(_told_memory(plan, state["params"], frozen)) if alone else nullcontext()
    # Only the loop may hold the first state. Another reference would keep its memory until the last step.
    first = [state]
    del state
    with within:
        state = _go_on(folder, plan, data, first.pop, frozen, start, replica)
    state = whole_state(state, plan.config)
    if group().leads:
        _finish(folder, whole_plan(plan), state, frozen)


@dataclass(frozen=True, eq=False)
class _Data:
    """A run's open token files. `fingerprints` are by the names of their folders."""

    train: TokenFile
    held_out: TokenFile | None
    batches: Batches

    @property
    def fingerprints(self) -> dict[str, str]:
        held_out = {} if self.held_out is None else {"held_out": self.held_out.fingerprint}
        return {"train": self.train.fingerprint, **held_out}


def _open_data(folder: RunFolder, plan: Plan) -> _Data:
    train = read_token_file(folder.train_data)
    held_out = read_token_file(folder.held_out_data) if os.path.lexists(folder.held_out_data) else None
    for file in (train,) if held_out is None else (train, held_out):
        check_ids(file, plan.config)
    return _Data(train, held_out, Batches(train, plan.batch_size, plan.sequence_length, plan.seed))


def _load_state(folder: RunFolder, plan: Plan, data: _Data) -> tuple[State, Params | None, int, int | None]:
    """The state to continue from, the parameters that aren't trained, the state's step, and the planned number of steps
    (as in `RunFolder.load`)."""
    init_key, run_key = mx.random.split(random_key(plan.seed))
    trained, frozen = start_parts(plan, init_key, outline=bool(folder.saved_steps()))
    state, start, planned = folder.load(init_state(trained, plan.recipe, run_key), plan, data.fingerprints)
    return state, frozen, start, planned


def _tell(plan: Plan, data: _Data, start: int, planned: int | None, *, trained: int) -> None:
    """Prints the run's size, and the step that it resumes from."""
    config, steps = plan.config, plan.recipe.steps
    part = f", {trained:,} trained" if plan.trains_part else ""
    print_message(
        f"{param_count(config):,} parameters, {param_count(config, active=True):,} active{part}; {len(data.train):,}"
        f" tokens to train on, {0 if data.held_out is None else len(data.held_out):,} held out; {steps:,} steps of"
        f" {plan.batch_size * plan.sequence_length:,} tokens, {data.batches.epochs(steps):.2f} epochs"
        + (f"; resumed after step {start:,}" if start else "")
    )
    if planned is not None and planned != steps:
        last = learning_rate(replace(plan.recipe, steps=planned), start - 1)
        print_message(
            f"{steps:,} steps in place of {planned:,}: the learning rate is from here on that of a run of {steps:,}"
            f" steps, {learning_rate(plan.recipe, start):.3g} in step {start + 1:,} after {last:.3g} in step {start:,}"
        )


def _told_memory(plan: Plan, trained: Params, frozen: Params | None) -> int:
    """Prints what the steps will take, and returns its bytes."""
    with _within_memory():
        needed = plan_memory(
            trained,
            frozen,
            config=plan.config,
            recipe=plan.recipe,
            batch_size=plan.batch_size,
            sequence_length=plan.sequence_length,
        )
    weights = "" if frozen is None else f"{_size(needed.frozen)} of weights that stay as they are, "
    print_message(
        f"memory: {weights}{_size(needed.state)} of parameters to train with their optimizer, {_size(needed.step)} of"
        f" activations and gradients: about {_size(needed.peak)} at the peak"
    )
    if needed.peak > memory_size():
        print_message(f"warning: this machine has {_size(memory_size())}: take {_SMALLER}")
    return needed.peak


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


@contextmanager
def _within_memory() -> Iterator[None]:
    """Says what to do about a step that can't be computed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"The first step can't be computed ({shorten(str(error), 200, placeholder='…')}), most likely for lack of"
            f" memory: start again in another --out with {_SMALLER}."
        ) from None


class _Journal:
    """Prints and logs the progress of training, and measures the speed of steps."""

    def __init__(self, plan: Plan, batches: Batches, metrics: TextIO, bar: "tqdm[Any]", start: int) -> None:
        self._plan, self._batches, self._metrics, self._bar = plan, batches, metrics, bar
        self._start = self._since = start
        self._clock = time.perf_counter()
        self._evaluation: Evaluation | None = None
        bar.set_description("compiling" if start < plan.recipe.steps else "done")

    def is_due(self, step: int) -> bool:
        """Whether this step is logged, which waits for its result."""
        return self._is_noted(step) or step == self._start + 1

    def step(self, measured: Measured, step: int) -> None:
        """After each step."""
        self._bar.update()
        if not self.is_due(step):
            return
        plan, now = self._plan, time.perf_counter()
        tokens = plan.batch_size * plan.sequence_length
        rate = (step - self._since) * tokens / (now - self._clock)
        self._clock, self._since = now, step
        line = step_line(measured, step, self._batches.epochs(step), rate)
        said = self._described(line)
        self._bar.set_description(said)
        if self._is_noted(step):
            write_line(self._metrics, line)
            if self._bar.disable:
                left = tqdm.format_interval(tokens * (plan.recipe.steps - step) / rate)
                print_message(f"step {step:6d}  {said}, {left} left")

    def evaluated(self, evaluation: Evaluation, measured: Measured, step: int) -> None:
        """After each evaluation."""
        self._evaluation = evaluation
        write_line(self._metrics, evaluation_line(evaluation, step))
        print_message(
            f"step {step:6d}  training {number(measured.parts.cross_entropy):.4f}  held out"
            f" {evaluation.nats_per_token:.4f} nats/token {evaluation.bits_per_byte:.4f} bits/byte  busiest expert"
            f" {evaluation.busiest_expert:.2f}x"
        )

    def flush(self) -> None:
        """Waits until all lines are on the disk."""
        os.fsync(self._metrics.fileno())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Excludes the time within the block from the steps' time."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _is_noted(self, step: int) -> bool:
        return step % self._plan.log_every == 0 or step == self._plan.recipe.steps

    def _described(self, line: Mapping[str, float]) -> str:
        held_out = "" if self._evaluation is None else f", held out {self._evaluation.bits_per_byte:.3f} bits/byte"
        return (
            f"loss {line['cross_entropy']:.3f}{held_out}, busiest expert {line['busiest_expert']:.2f}x,"
            f" {line['tokens_per_second']:,.0f} tokens/s"
        )


@contextmanager
def _journal(folder: RunFolder, plan: Plan, batches: Batches, start: int) -> Iterator[_Journal]:
    with (
        (folder.metrics_file if group().leads else Path(os.devnull)).open("a") as metrics,
        tqdm(total=plan.recipe.steps, initial=start, unit="step", disable=None, smoothing=0.05) as bar,
    ):
        yield _Journal(plan, batches, metrics, bar, start)


def _go_on(
    folder: RunFolder,
    plan: Plan,
    data: _Data,
    first: Callable[[], State],
    frozen: Params | None,
    start: int,
    replica: Shard,
) -> State:
    """Runs the steps after `start`. `first` returns the first state."""
    state = first()
    previous: Measured | None = None
    with (
        wired([state, frozen or {}]),
        deferred_stop(_tell_stop) as stop,
        _journal(folder, plan, data.batches, start) as journal,
    ):
        for step in range(start + 1, plan.recipe.steps + 1):
            # The first step is waited for, since it shows whether memory is enough.
            with _within_memory() if step == start + 1 else nullcontext():
                state, measured = _step(state, frozen, data.batches, step, plan, replica)
                # Nobody has the state from before now, so its memory is free for the next one's.
                mx.async_eval(state, measured)
                if step == start + 1:
                    mx.eval(measured)
            # The previous step's results are read while this one runs.
            if previous is not None:
                _check_finite(previous, step - 1, folder)
            previous = measured
            last, stopping = step == plan.recipe.steps, group().share(stop.requested)
            evaluates = data.held_out is not None and (last or step % plan.eval_every == 0)
            saves = last or stopping or step % plan.save_every == 0
            if journal.is_due(step) or evaluates or saves:
                # This waits for the step, so that its time isn't counted as that of saving or evaluating.
                _check_finite(measured, step, folder)
            journal.step(measured, step)
            with journal.apart():
                if evaluates and data.held_out is not None:
                    journal.evaluated(_evaluate(state, frozen, plan, data.held_out, step, folder), measured, step)
                if saves:
                    whole = whole_state(state, plan.config)
                    if group().leads:
                        # The lines before a checkpoint must be on the disk before the checkpoint is.
                        journal.flush()
                        folder.save(whole, step, whole_plan(plan), data.fingerprints)
                    del whole
            if stopping:
                raise stop.error()
    return state


def _tell_stop() -> None:
    print_message("stopping after this step, which is saved; once more ends at once")


def _step(
    state: State, frozen: Params | None, batches: Batches, step: int, plan: Plan, replica: Shard
) -> tuple[State, Measured]:
    """A step that hasn't begun."""
    tokens, mask = batches[step - 1]
    return train_step(
        state,
        mx.array(tokens),
        mx.array(mask),
        config=plan.config,
        recipe=plan.recipe,
        frozen=frozen,
        replica=replica,
    )


def _check_finite(measured: Measured, step: int, folder: RunFolder) -> None:
    loss, norm = number(measured.loss), number(measured.gradient_norm)
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss became {loss}" if not math.isfinite(loss) else f"gradients' norm became {norm}"
    raise folder.not_finite(f"The {what} at", step)


def _evaluate(
    state: State, frozen: Params | None, plan: Plan, held_out: TokenFile, step: int, folder: RunFolder
) -> Evaluation:
    evaluation = evaluate(
        _computed(state, frozen, plan),
        replace(plan.config, dtype=plan.recipe.dtype),
        held_out,
        batch_size=plan.batch_size // plan.recipe.micro_batches,
        sequence_length=plan.sequence_length,
    )
    if not math.isfinite(evaluation.nats_per_token):
        raise folder.not_finite(f"The held-out text's loss became {evaluation.nats_per_token} after", step)
    return evaluation


def _computed(state: State, frozen: Params | None, plan: Plan) -> Params:
    """The parameters in the dtype of the forward pass."""
    dtype = getattr(mx, plan.recipe.dtype)
    params: Params = tree_map(lambda array: array.astype(dtype), state["params"])
    return params if frozen is None else joined(params, frozen, plan.config)


def _finish(folder: RunFolder, plan: Plan, state: State, frozen: Params | None) -> None:
    """Writes the model or the adapters, draws the metrics, and prints a summary."""
    if plan.adapters is not None:
        folder.write_adapters(state["params"], plan.config, plan.adapters)
    else:
        folder.write_model(_computed(state, frozen, plan), replace(plan.config, dtype=plan.recipe.dtype))
    lines = read_metrics(folder.metrics_file, plan.config)
    evaluated = [line for line in lines if "expert_share" in line]
    try:
        check_matplotlib()
        write_picture(draw_losses({"model": lines}), folder.path / "loss.png")
        if evaluated:
            write_picture(draw_expert_load(evaluated[-1]["expert_share"]), folder.path / "expert_load.png")
    except InputError as error:
        print_message(f"warning: {error}")
    rows = [
        ("steps", f"{plan.recipe.steps:,}"),
        ("tokens", f"{plan.recipe.steps * plan.batch_size * plan.sequence_length:,}"),
    ]
    trained = [line for line in lines if "cross_entropy" in line]
    if trained:
        rows.append(("training", f"{trained[-1]['cross_entropy']:.4f} nats/token"))
    if evaluated:
        held_out = evaluated[-1]
        rows += [
            ("held out", f"{held_out['held_out_nats_per_token']:.4f} nats/token"),
            ("", f"{held_out['held_out_bits_per_byte']:.4f} bits/byte"),
            ("busiest expert", f"{held_out['held_out_busiest_expert']:.2f} times its share"),
        ]
    rows.append(("adapters", str(folder.adapters)) if plan.adapters is not None else ("model", str(folder.model)))
    print_result("\n".join(f"{name:15} {value}" for name, value in rows))
