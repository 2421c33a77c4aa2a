"""`python -m dbrx_fn.bench`: how fast training is here, as a part of how fast this machine multiplies matrices.

The bound is arithmetic: the operations that a step needs, counted from the config, over the rate of a large dense
matrix product in the same dtype, measured in the same run. What recomputing activations costs isn't counted, as it
isn't needed, so it shows as time lost. Each step is waited for, which training doesn't do. On CUDA, float32 products
are TF32 on both sides, unless MLX_ENABLE_TF32=0.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from dbrx_fn.config import AttnConfig, Config, Dtype, FFNConfig, read_config, read_config_file
from dbrx_fn.errors import DbrxError, InputError
from dbrx_fn.hub import SMALL
from dbrx_fn.params import init_params, param_count
from dbrx_fn.terminal import INTERRUPTED, printed_warnings
from dbrx_fn.training import Recipe, check_memory, init_state, train_step

BILLION = Config(
    d_model=2048,
    n_heads=16,
    n_layers=6,
    max_seq_len=4096,
    vocab_size=50_304,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=8, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=1792, moe_num_experts=16, moe_top_k=4, moe_jitter_eps=0.01, moe_loss_weight=0.05),
)
"""1.3B parameters: 16 experts of which 4, as in DBRX, each 7/8 as wide as d_model where DBRX's are 7/4."""


@dataclass(frozen=True)
class TrainingSpeed:
    """One measurement. Times in seconds, memory in bytes, rates in operations per second.

    `first_step` holds tracing and, on first use, the compilation of kernels; the others are medians after it.
    """

    shape: str
    parameters: int
    active_parameters: int
    batch_size: int
    sequence_length: int
    dtype: str
    recompute: bool
    first_step: float
    step: float
    fastest_step: float
    slowest_step: float
    tokens_per_second: float
    operations_per_token: int
    matmul_rate: float
    fraction_of_bound: float
    peak_memory: int


def training_operations(config: Config, sequence_length: int) -> int:
    """Floating-point operations that training takes per token: forward, and twice that backward.

    Each active parameter but the embedding's, which is looked up, is multiplied and added once: 2 operations forward.
    Attention multiplies each query with the keys before it, half of `sequence_length` on average, and sums as many
    values: 4 operations an entry of d_model and key.
    """
    matrices = param_count(config, active=True) - config.vocab_size * config.d_model
    attention = config.n_layers * 4 * config.d_model * sequence_length // 2
    return 3 * (2 * matrices + attention)


def matmul_rate(dtype: Dtype) -> float:
    """Operations per second of the default device's dense matrix product, at its best over a few sizes."""
    best = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        one = mx.random.normal((size, size)).astype(getattr(mx, dtype))
        mx.eval(one)
        seconds = _median_seconds(functools.partial(mx.matmul, one, one), 5)
        best = max(best, 2 * size**3 / seconds)
        # A CPU has shown what it can by then, and would take minutes for the next.
        if seconds > 0.1:
            break
    return best


def measure_training(
    shape: str, config: Config, batch_size: int, sequence_length: int, dtype: Dtype, *, recompute: bool, steps: int
) -> TrainingSpeed:
    """Times `train_step` on random tokens."""
    check_memory(config)
    recipe = Recipe(steps=steps + 1, warmup=0, dtype=dtype, recompute=recompute)
    config = replace(config, dtype="float32")
    mx.reset_peak_memory()
    state = init_state(init_params(config, mx.random.key(0)), recipe, mx.random.key(1))
    tokens = mx.random.randint(0, config.vocab_size, (batch_size, sequence_length + 1), key=mx.random.key(2))
    mx.eval(state, tokens)
    times: list[float] = []
    for _ in tqdm(range(steps + 1), desc=f"{shape} {dtype}", unit="step", disable=None, leave=False):
        start = time.perf_counter()
        state, measured = train_step(state, tokens, None, config=config, recipe=recipe)
        mx.eval(state, measured)
        times.append(time.perf_counter() - start)
    step = statistics.median(times[1:])
    peak = mx.get_peak_memory()
    del state
    mx.clear_cache()
    operations, rate = training_operations(config, sequence_length), matmul_rate(dtype)
    return TrainingSpeed(
        shape=shape,
        parameters=param_count(config),
        active_parameters=param_count(config, active=True),
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        recompute=recompute,
        first_step=times[0],
        step=step,
        fastest_step=min(times[1:]),
        slowest_step=max(times[1:]),
        tokens_per_second=batch_size * sequence_length / step,
        operations_per_token=operations,
        matmul_rate=rate,
        fraction_of_bound=batch_size * sequence_length * operations / step / rate,
        peak_memory=peak,
    )


@printed_warnings()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    chosen = parser().parse_args(arguments)
    try:
        for name in ("batch_size", "sequence_length", "steps"):
            if getattr(chosen, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(chosen, name)} where it must be at least 1.")
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
    except DbrxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    print(json.dumps([asdict(speed) for speed in speeds], indent=2) if chosen.json else _table(speeds))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="python -m dbrx_fn.bench", description="Measure how fast training is here.")
    add = options.add_argument
    add("--shape", nargs="+", default=["small"], help="small, 1.3b, or the path of a config.json; %(default)s")
    add("--batch-size", type=int, default=64, help="sequences to a step; %(default)s")
    add("--sequence-length", type=int, default=256, help="tokens of a sequence; %(default)s")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="to compute in; float32")
    add("--recompute", action="store_true", help="compute activations again in the backward pass")
    add("--steps", type=int, default=10, help="to take the median of; %(default)s")
    add("--json", action="store_true", help="print JSON instead of a table")
    return options


def _config(shape: str) -> Config:
    if shape == "small":
        return read_config(SMALL)
    return BILLION if shape == "1.3b" else read_config_file(Path(shape))


def _table(speeds: Sequence[TrainingSpeed]) -> str:
    columns: dict[str, Callable[[TrainingSpeed], str]] = {
        "shape": lambda s: s.shape,
        "parameters": lambda s: f"{s.parameters / 1e6:,.1f}M",
        "active": lambda s: f"{s.active_parameters / 1e6:,.1f}M",
        "batch": lambda s: f"{s.batch_size} x {s.sequence_length}",
        "dtype": lambda s: s.dtype + (" recompute" if s.recompute else ""),
        "first step": lambda s: f"{s.first_step:.1f} s",
        "step": lambda s: f"{1e3 * s.step:,.1f} ms",
        "spread": lambda s: f"{1e3 * s.fastest_step:,.1f}-{1e3 * s.slowest_step:,.1f}",
        "tokens/s": lambda s: f"{s.tokens_per_second:,.0f}",
        "TFLOP/s": lambda s: f"{s.fraction_of_bound * s.matmul_rate / 1e12:,.3f}",
        "bound": lambda s: f"{s.matmul_rate / 1e12:,.3f}",
        "of bound": lambda s: f"{100 * s.fraction_of_bound:.1f}%",
        "memory": lambda s: f"{s.peak_memory / 2**30:.2f} GiB",
    }
    rows = [list(columns), *([show(speed) for show in columns.values()] for speed in speeds)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _median_seconds(run: Callable[[], mx.array], times: int) -> float:
    mx.eval(run())
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        mx.eval(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
