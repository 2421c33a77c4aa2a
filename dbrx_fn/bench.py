"""`python -m dbrx_fn.bench`: the speed of inference and training beside the machine's limits, speculation, and serving.

python -m dbrx_fn.bench inference --shape dbrx --quantize 4 --layers 4
python -m dbrx_fn.bench speculation --shape small
python -m dbrx_fn.bench training --shape 1.3b --dtype bfloat16
python -m dbrx_fn.bench serving --rate 1 2 4

`docs/bench.md` describes the measurements and their bounds.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dbrx_fn.benchmarks.inference import Figure, make_weights, measure_inference, our_program
from dbrx_fn.benchmarks.llama_cpp import NAME as LLAMA_CPP
from dbrx_fn.benchmarks.llama_cpp import check_llama_cpp, llama_cpp_program
from dbrx_fn.benchmarks.load import Limits, Workload, loads_of
from dbrx_fn.benchmarks.machine import MachineLimits, measure_limits
from dbrx_fn.benchmarks.mlx_lm import NAME as MLX_LM
from dbrx_fn.benchmarks.mlx_lm import check_mlx_lm, mlx_lm_program
from dbrx_fn.benchmarks.plan import Cases, Planned, check_cases, plan_checkpoint, plan_random
from dbrx_fn.benchmarks.roofline import draw_roofline, roofline_points
from dbrx_fn.benchmarks.speculation import check_texts, measure_speculation, speculation_table
from dbrx_fn.benchmarks.tables import scaled, table, time_text
from dbrx_fn.benchmarks.training import BILLION, measure_training, training_table
from dbrx_fn.checkpoints.adapter_reader import read_adapters
from dbrx_fn.checkpoints.config_file import config_to_dict, read_config, read_config_file
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.cli.bench_options import (
    add_inference_options,
    add_serving_options,
    add_speculation_options,
    add_training_options,
)
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.quantize_options import chosen_quantization
from dbrx_fn.cli.terminal import print_result, size_text
from dbrx_fn.drawing.figure import check_new_picture, write_picture
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import DBRX, Config
from dbrx_fn.model.costs import weight_bytes
from dbrx_fn.model.params import param_count
from dbrx_fn.model.shard import own_shard
from dbrx_fn.runtime.group import group
from dbrx_fn.runtime.memory import wired
from dbrx_fn.serving.access import KEY_VARIABLE

_COUNTS = {
    *("batch_size", "sequence_length", "steps", "prompt", "context", "tokens", "repeats", "clients", "requests"),
    *("decode_concurrency", "capacity", "together"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C, 143 after
    SIGTERM."""
    # SIGTERM must end a server that is measured, too.
    return run(
        _run,
        parser(),
        arguments,
        smaller="take a smaller --shape or --batch-size, or a larger machine",
        takes_sigterm=True,
        together=True,
    )


def _run(chosen: argparse.Namespace) -> None:
    for name in _COUNTS & vars(chosen).keys():
        given = getattr(chosen, name)
        lowest = min(given) if isinstance(given, list) else given
        if lowest is not None and lowest < 1:
            raise InputError(f"--{name.replace('_', '-')} is {lowest} where it must be at least 1.")
    chosen.run(chosen)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("bench"), description="Measure the speed of inference, speculation, training or serving."
    )
    commands = options.add_subparsers(required=True, metavar="inference | speculation | training | serving")
    add_inference_options(commands, _inference, peers=(MLX_LM, LLAMA_CPP))
    add_speculation_options(commands, _speculation)
    add_training_options(commands, _training)
    add_serving_options(commands, _serving, KEY_VARIABLE)
    return options


def _inference(chosen: argparse.Namespace) -> None:
    if chosen.model is not None and chosen.shape is not None:
        raise InputError(
            "--model and --shape are both given: give --model for a checkpoint, or --shape for random weights."
        )
    if chosen.adapter_path is not None and (chosen.shape is not None or chosen.peer or chosen_quantization(chosen)):
        raise InputError("--adapter-path can't be combined with --shape, --peer or --quantize: leave one out.")
    if chosen.picture is not None:
        check_new_picture(chosen.picture)
    layers, dtype, quantization = chosen.layers, chosen.dtype, chosen_quantization(chosen)
    if chosen.shape is not None:
        planned = plan_random(chosen.shape, _config(chosen.shape), layers, dtype, quantization)
    else:
        planned = plan_checkpoint(chosen.model or str(SMALL), layers, dtype, quantization)
    cases = Cases(
        tuple(chosen.prompt),
        tuple(chosen.context),
        tuple(chosen.batch_size),
        chosen.tokens,
        chosen.repeats,
        tuple(chosen.together),
    )
    planned = replace(planned, config=replace(planned.config, shard=own_shard()), adapters=chosen.adapter_path)
    check_cases(planned, cases, beside=bool(chosen.peer))
    if chosen.peer:
        group().refuse_others("--peer")
    if MLX_LM in chosen.peer:
        check_mlx_lm(planned.config)
    if LLAMA_CPP in chosen.peer:
        check_llama_cpp(planned)
    # Before the weights are made, since the largest models' leave little memory.
    if chosen.adapter_path is not None:
        # Bad ones are refused before anything is measured.
        read_adapters(chosen.adapter_path, planned.config)
    limits = measure_limits(planned.config.dtype)
    params, made = make_weights(planned)
    programs = [our_program(params, planned.config)]
    if MLX_LM in chosen.peer:
        programs.append(mlx_lm_program(params, planned.stored, planned.formats))
    with ExitStack() as stack:
        if LLAMA_CPP in chosen.peer:
            programs.append(stack.enter_context(llama_cpp_program(params, planned)))
        stack.enter_context(wired(params))
        figures = [made, *measure_inference(programs, planned, cases, limits)]
    print_result(
        json.dumps(_described(planned, limits, figures), indent=2)
        if chosen.json
        else _inference_text(planned, limits, figures)
    )
    if chosen.picture is not None:
        points = roofline_points(figures)
        # The highest rate of any point, so that no point is above the roof.
        bandwidth = max(limits.bandwidth(point.bytes) for point in points)
        write_picture(draw_roofline(points, limits.matmul_rate, bandwidth), chosen.picture)


def _speculation(chosen: argparse.Namespace) -> None:
    group().refuse_others("bench speculation")
    shape, prompt, tokens = chosen.shape, chosen.prompt, chosen.tokens
    planned = plan_random(shape, _config(shape), chosen.layers, chosen.dtype, chosen_quantization(chosen))
    check_texts(planned.config, prompt, tokens)
    check_cases(planned, Cases((prompt,), (prompt,), (1,), tokens, repeats=1))
    params, _ = make_weights(planned)
    speeds = measure_speculation(params, planned.config, planned.formats, prompt, tokens, chosen.repeats)
    print_result(
        json.dumps([asdict(speed) | {"gain": speed.gain} for speed in speeds], indent=2)
        if chosen.json
        else speculation_table(speeds)
    )


def _training(chosen: argparse.Namespace) -> None:
    group().refuse_others("bench training")
    speeds = [
        measure_training(
            shape,
            _config(shape),
            chosen.batch_size,
            chosen.sequence_length,
            dtype,
            recompute=chosen.recompute,
            steps=chosen.steps,
        )
        for shape in chosen.shape
        for dtype in chosen.dtype
    ]
    print_result(json.dumps([asdict(speed) for speed in speeds], indent=2) if chosen.json else training_table(speeds))


def _serving(chosen: argparse.Namespace) -> None:
    group().refuse_others("bench serving")
    if chosen.url is not None and (
        chosen.exact or chosen.decode_concurrency or chosen.capacity or chosen.adapter_path is not None
    ):
        raise InputError(
            "--exact, --decode-concurrency, --capacity and --adapter-path are for the server that is started: leave"
            " them out with --url."
        )
    workload = Workload(chosen.requests, chosen.prompt, chosen.tokens, chosen.spread, chosen.seed)
    loads = loads_of(chosen.rate, chosen.clients)
    limits = Limits(chosen.ttft, chosen.gap)
    if not 0 <= chosen.temp <= 2:
        raise InputError(f"--temp is {chosen.temp:g} where it must be from 0 to 2.")
    if chosen.picture is not None:
        check_new_picture(chosen.picture)
    try:
        from dbrx_fn.benchmarks.serving_report import draw_serving, serving_object, serving_text
        from dbrx_fn.benchmarks.serving_run import run_serving
    except ImportError as error:
        if error.name != "h11":
            raise
        raise InputError("bench serving needs h11, which isn't installed: pip install 'dbrx-fn[serve]'.") from None

    options = ["--model", chosen.model or str(SMALL), *(["--exact"] if chosen.exact else [])]
    for name in ("decode_concurrency", "capacity"):
        if getattr(chosen, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    if chosen.adapter_path is not None:
        options += ["--adapter-path", str(chosen.adapter_path.absolute())]
    key = os.environ.get(KEY_VARIABLE)
    server = options if chosen.url is None else chosen.url
    measured = run_serving(server, chosen.model, key, chosen.temp, workload, loads, limits)
    print_result(json.dumps(serving_object(measured), indent=2) if chosen.json else serving_text(measured))
    if chosen.picture is not None:
        write_picture(draw_serving(measured), chosen.picture)


def _config(shape: str) -> Config:
    if shape == "small":
        return read_config(SMALL)
    known = {"1.3b": BILLION, "dbrx": DBRX}
    return known[shape] if shape in known else read_config_file(Path(shape))


def _described(planned: Planned, limits: MachineLimits, figures: Sequence[Figure]) -> dict[str, Any]:
    config, formats = planned.config, planned.formats
    return {
        "processes": group().size,
        "model": {
            "name": planned.name,
            "random": planned.checkpoint is None,
            "parameters": param_count(planned.stored),
            "active_parameters": param_count(planned.stored, active=True),
            "weight_bytes": weight_bytes(config, formats),
            "formats": {path: f"{form.mode} {form.bits}:{form.group_size}" for path, form in formats.items()},
            "config": config_to_dict(config),
        },
        "machine": asdict(limits),
        "figures": [asdict(figure) for figure in figures],
    }


def _inference_text(planned: Planned, limits: MachineLimits, figures: Sequence[Figure]) -> str:
    config = planned.config
    size = weight_bytes(config, planned.formats)
    blas = "" if limits.blas is None else f", matrix products by {limits.blas}"
    fastest = max(rate for _, rate in limits.memory_rates)
    columns: dict[str, Callable[[Figure], str]] = {
        "program": lambda f: f.program,
        "dtype": lambda f: f.dtype,
        "what": lambda f: f.what,
        "tokens": lambda f: f"{f.tokens:,}" if f.tokens else "",
        "batch": lambda f: f.batch_text,
        "first": lambda f: time_text(f.first),
        "median": lambda f: time_text(f.seconds),
        "spread": lambda f: f"{time_text(f.fastest)} - {time_text(f.slowest)}" if f.repeats > 1 else "",
        "host": lambda f: time_text(f.host),
        "tokens/s": lambda f: "" if f.tokens_per_second is None else f"{f.tokens_per_second:,.1f}",
        "operations": lambda f: "" if f.operations is None else scaled(f.operations),
        "bytes": lambda f: "" if f.bytes is None else scaled(f.bytes) + "B",
        "bound": lambda f: time_text(f.bound),
        "of": lambda f: f.bound_by or "",
        "of bound": lambda f: "" if f.fraction_of_bound is None else f"{100 * f.fraction_of_bound:.1f}%",
        "memory": lambda f: "" if f.peak_memory is None else size_text(f.peak_memory),
    }
    missing = [figure for figure in figures if figure.missing is not None]
    return "\n".join(
        [
            f"{planned.name}: {config.n_layers} layers, {param_count(planned.stored) / 1e6:,.1f}M parameters,"
            f" {param_count(planned.stored, active=True) / 1e6:,.1f}M active,"
            f" {8 * size / param_count(config):.2f} bits a weight, {config.dtype},"
            f" {size_text(size)}{' of random weights' if planned.checkpoint is None else ''}"
            + (f" in each of {group().size} processes" if group().size > 1 else ""),
            f"{limits.backend}, {limits.device}, {size_text(limits.memory)}, MLX {limits.mlx}{blas}: reads"
            f" {limits.memory_rates[-1][1] / 1e9:,.1f} GB/s from memory and at most {fastest / 1e9:,.1f} from caches,"
            f" multiplies {limits.matmul_rate / 1e12:,.3f} TFLOP/s in {limits.dtype}",
            table(columns, [figure for figure in figures if figure.missing is None]),
            *(f"missing: {f.program} {f.what} {f.tokens:,} x {f.batch_text or 1}: {f.missing}" for f in missing),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
