"""Measures the speed of training, as a fraction of the rate at which this machine multiplies matrices.

The bound is arithmetic: a step's operations, counted from the config, divided by the rate of a large dense product in
the same dtype, measured in the same run. Recomputed activations aren't counted, since they could be avoided, so their
time counts as lost. The benchmark waits for each step, which training doesn't. On CUDA, float32 products use TF32 on
both sides, unless MLX_ENABLE_TF32=0.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from tqdm import tqdm

from dbrx_fn.benchmarks.machine_rates import matmul_rate
from dbrx_fn.benchmarks.tables import table
from dbrx_fn.model.config import AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.costs import training_operations
from dbrx_fn.model.params import init_params, param_count
from dbrx_fn.runtime.memory import wired
from dbrx_fn.training.step import Recipe, check_memory, init_state, train_step

BILLION = Config(
    d_model=2048,
    n_heads=16,
    n_layers=6,
    max_seq_len=4096,
    vocab_size=50_304,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=8, rope_theta=500_000.0),
    ffn=FFNConfig(ffn_hidden_size=1792, moe_num_experts=16, moe_top_k=4, moe_jitter_eps=0.01, moe_loss_weight=0.05),
)
"""A model of 1.3B parameters. As in DBRX, each token uses 4 of 16 experts. They are 7/8 of d_model wide (DBRX: 7/4)."""


@dataclass(frozen=True)
class TrainingSpeed:
    """One measurement. Times are in seconds, memory in bytes, rates in operations per second.

    `first_step` includes tracing and, on first use, the compilation of kernels. `step` is the median of later steps.
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
    with wired(state):
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


def training_table(speeds: Sequence[TrainingSpeed]) -> str:
    """The measurements as a table, a line each."""
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
    return table(columns, speeds)
