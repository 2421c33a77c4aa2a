"""A short measurement of speed beside the machine's limits. It doesn't affect the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from dbrx_fn.benchmarks.inference import Figure, make_weights, measure_inference, our_program
from dbrx_fn.benchmarks.machine import MachineLimits, measure_limits
from dbrx_fn.benchmarks.plan import Cases, plan_random
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.costs import weight_bytes
from dbrx_fn.model.params import param_count
from dbrx_fn.model.quantization import Quantization, wanted_formats
from dbrx_fn.runtime.device import memory_size, on_cpu

_SHARE = 100
"""The weights take about one hundredth of the memory."""
_LAYERS = (4, 20)
"""The smallest and the largest number of layers."""


@dataclass(frozen=True)
class Speed:
    """The measured model and its figures. Sizes are in bytes."""

    model: str
    size: int
    limits: MachineLimits
    figures: Sequence[Figure]


def measure_speed() -> Speed:
    """Measures a prompt and decoding with some hundred MB of random weights. This takes 10 to 30 s.

    The weights are in 4 bits, as in large models. On a CPU, where quantized products are slow, they are floats.
    """
    quantization = None if on_cpu() else Quantization()
    config = _sized(512 if on_cpu() else 1024, quantization)
    planned = plan_random("speed", config, None, config.dtype, quantization)
    limits = measure_limits(config.dtype)
    params, _ = make_weights(planned)
    prompt = 128 if on_cpu() else 512
    cases = Cases(prompts=(prompt,), contexts=(256,), batch_sizes=(1,), tokens=16, repeats=2)
    figures = measure_inference([our_program(params, config)], planned, cases, limits)
    del params
    mx.clear_cache()
    active = param_count(config, active=True)
    name = f"{config.n_layers} layers, {param_count(config) / 1e6:,.0f}M parameters, {active / 1e6:,.0f}M active"
    form = config.dtype if quantization is None else f"4 bits, {config.dtype}"
    return Speed(f"{name}, {form}", weight_bytes(config, planned.formats), limits, figures)


def _sized(d_model: int, quantization: Quantization | None) -> Config:
    """A config with DBRX's proportions. The number of layers depends on the machine's memory."""
    fewest, most = _LAYERS
    one = Config(
        d_model=d_model,
        n_heads=8,
        n_layers=1,
        max_seq_len=2048,
        vocab_size=16_384,
        attn=AttnConfig(8.0, 2, 5e5),
        ffn=FFNConfig(d_model * 7 // 4, 16, 4),
        dtype="float32" if on_cpu() else "bfloat16",
    )
    layer = weight_bytes(one, {} if quantization is None else wanted_formats(one, quantization))
    return replace(one, n_layers=max(fewest, min(most, memory_size() // _SHARE // layer)))
