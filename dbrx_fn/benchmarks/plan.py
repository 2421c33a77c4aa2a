"""What a bench of inference is to measure, and the weights for it: cases, a model, whether both fit this machine."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from dbrx_fn.benchmarks.random_weights import random_params
from dbrx_fn.checkpoints.checkpoint import open_checkpoint, require_fit
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.costs import Formats, cache_bytes, weight_bytes
from dbrx_fn.model.quantization import Quantization, quantize, wanted_formats
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import backend, memory_size

ANSWER = 100
"""Tokens that are asked for where the first is measured."""
WARM_STEPS = 4
"""Decoding steps before any is timed: the first traces and compiles, the next reuse its buffers."""


@dataclass(frozen=True)
class Cases:
    """What to measure: every prompt alone, and every context with every batch size.

    `prompts`, `contexts`: in tokens. `tokens`: to decode in one repetition.
    """

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    tokens: int
    repeats: int

    @property
    def steps(self) -> int:
        """Tokens that decoding adds to a context."""
        return WARM_STEPS + self.repeats * self.tokens + 1


@dataclass(frozen=True)
class Planned:
    """What is to be measured, before any weight is there; `checkpoint` is `None` for random weights.

    `config`: its dtype is what this package computes in.
    `stored`: with the dtype that the checkpoint has, or would have, which is what others compute in.
    """

    name: str
    config: Config
    stored: Config
    formats: Formats
    checkpoint: Path | None = None
    quantization: Quantization | None = None


def plan_random(
    name: str, config: Config, layers: int | None, dtype: Dtype | None, quantization: Quantization | None
) -> Planned:
    """Random weights of a config, in its dtype if none is given; on a CPU they become float32 then, as a checkpoint's.

    Raises:
        InputError: if it has fewer layers than are asked for, or can't be quantized like this.
    """
    stored = _cut(replace(config, dtype=dtype or config.dtype), layers)
    computed = stored if dtype or backend() != "cpu" else replace(stored, dtype="float32")
    return Planned(name, computed, stored, {} if quantization is None else wanted_formats(stored, quantization))


def plan_checkpoint(
    path_or_repo: str, layers: int | None, dtype: Dtype | None, quantization: Quantization | None
) -> Planned:
    """A checkpoint's weights, in the dtype that `generate` takes if none is given, quantized if that is asked for.

    Raises:
        InputError: as `plan_random`, or if matrices that are to be quantized are so already.
        ConfigError, CheckpointError: as `load`.
    """
    checkpoint = open_checkpoint(path_or_repo)
    require_fit(checkpoint, one_dtype=dtype is None)
    stored = _cut(replace(checkpoint.config, dtype=dtype or checkpoint.config.dtype), layers)
    config = replace(stored, dtype=dtype or computing_dtype(checkpoint.path) or stored.dtype)
    kept = {path: form for path, form in checkpoint.formats.items() if _is_in(path, config)}
    wanted = {} if quantization is None else wanted_formats(config, quantization)
    for path in kept.keys() & wanted.keys():
        raise InputError(f"{path} of {checkpoint.path} is quantized already: measure it as it is.")
    return Planned(str(path_or_repo), config, stored, kept | wanted, checkpoint.path, quantization)


def check_cases(planned: Planned, cases: Cases, *, beside: bool = False) -> None:
    """Raises `InputError` for what can't be measured with this model or on this machine.

    Args:
        planned: the model.
        cases: what to measure.
        beside: whether another program is measured too, for which the weights are there as they are stored.
    """
    config = planned.config
    for name, tokens in (
        *(("prompt", prompt) for prompt in cases.prompts),
        *(("context", context + cases.steps) for context in cases.contexts),
    ):
        if tokens > config.max_seq_len:
            more = "" if name == "prompt" else f", the {cases.steps} of decoding included,"
            raise InputError(
                f"--{name} comes to {tokens} tokens{more} and the model's context holds {config.max_seq_len}: ask for"
                " fewer."
            )
    weights, cache = weight_bytes(config, planned.formats), _largest_cache(config, cases)
    if beside and planned.stored != config:
        weights += weight_bytes(planned.stored, planned.formats)
    if weights + cache > memory_size():
        raise InputError(
            f"The weights need {weights / 2**30:.1f} GiB and the largest cache {cache / 2**30:.1f} GiB and this machine"
            f" has {memory_size() / 2**30:.1f} GiB: quantize, take fewer --layers, or a smaller --context and"
            " --batch-size."
        )


def drawn_weights(planned: Planned) -> Params:
    """Random weights of the model, all in memory."""
    float_type = getattr(mx, planned.config.dtype)
    drawn = random_params(planned.stored, planned.formats, mx.random.key(0))
    params: Params = tree_map(
        lambda leaf: leaf.astype(float_type) if mx.issubdtype(leaf.dtype, mx.floating) else leaf, drawn
    )
    del drawn
    _evaluate_leaves(params)
    return params


def loaded_weights(path: Path, planned: Planned) -> Params:
    """The checkpoint's weights as planned, all in memory.

    Raises:
        CheckpointError: as `load`.
    """
    wanted = planned.config
    if planned.quantization is None and open_checkpoint(path).config.n_layers == wanted.n_layers:
        return load(path, dtype=wanted.dtype)[0]
    params, _ = load(path, dtype=wanted.dtype, lazy=True)
    transformer = params["transformer"]
    params = {**params, "transformer": {**transformer, "blocks": transformer["blocks"][: wanted.n_layers]}}
    if planned.quantization is not None:
        params = quantize(params, wanted, planned.quantization)
    _evaluate_leaves(params)
    return params


def _evaluate_leaves(params: Params) -> None:
    """One by one, so that what they are made of is never there for all of them at once."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    for leaf in leaves.values():
        mx.eval(leaf)
        # Or the buffers of one would be kept beside the next.
        mx.clear_cache()


def _cut(config: Config, layers: int | None) -> Config:
    if layers is not None and not 1 <= layers <= config.n_layers:
        raise InputError(f"--layers is {layers} where 1 to {config.n_layers}, all that the model has, are expected.")
    return replace(config, n_layers=layers or config.n_layers)


def _is_in(path: str, config: Config) -> bool:
    """Whether a matrix is in a model of so many layers."""
    _, mark, rest = path.partition(".blocks.")
    return not mark or int(rest.partition(".")[0]) < config.n_layers


def _largest_cache(config: Config, cases: Cases) -> int:
    largest = max(cases.batch_sizes) * max(capacity_bucket(context + cases.steps) for context in cases.contexts)
    longest = max(cases.prompts)
    return cache_bytes(config, max(largest, capacity_bucket(min(longest + ANSWER - 1, config.max_seq_len))))
