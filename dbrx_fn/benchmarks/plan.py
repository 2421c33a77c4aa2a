"""The plan of an inference benchmark: the cases, the model's weights, and whether both fit this machine."""

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
"""Number of tokens asked for when the time to the first is measured."""
WARM_STEPS = 4
"""Untimed decoding steps at the start. The first traces and compiles, the next ones reuse its buffers."""


@dataclass(frozen=True)
class Cases:
    """The cases to measure: every prompt alone, and every context with every batch size and number of tokens at once.

    `prompts`, `contexts`: lengths in tokens. `tokens`: number of decoding steps per repetition. `together`: numbers of
    new tokens of each sequence in one step.
    """

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    tokens: int
    repeats: int
    together: tuple[int, ...] = (1,)

    @property
    def steps(self) -> int:
        """Number of positions that decoding needs behind a context. Each step keeps one of its tokens."""
        return WARM_STEPS + self.repeats * self.tokens + max(self.together)


@dataclass(frozen=True)
class Planned:
    """The model to measure, before any weight is loaded. `checkpoint` is `None` for random weights.

    `config`: the model's, with the dtype that this package computes in.
    `stored`: the same with the checkpoint's dtype, in which other programs compute.
    `adapters`: folder of adapters to load beside the checkpoint, if any. Bounds don't count them.
    """

    name: str
    config: Config
    stored: Config
    formats: Formats
    checkpoint: Path | None = None
    quantization: Quantization | None = None
    adapters: Path | None = None


def plan_random(
    name: str, config: Config, layers: int | None, dtype: Dtype | None, quantization: Quantization | None
) -> Planned:
    """Plans random weights for a config. Without a dtype they have the config's, or float32 on a CPU.

    Raises:
        InputError: if more layers are asked for than the config has, or it can't be quantized like this.
    """
    stored = _cut(replace(config, dtype=dtype or config.dtype), layers)
    computed = stored if dtype or backend() != "cpu" else replace(stored, dtype="float32")
    return Planned(name, computed, stored, {} if quantization is None else wanted_formats(stored, quantization))


def plan_checkpoint(
    path_or_repo: str, layers: int | None, dtype: Dtype | None, quantization: Quantization | None
) -> Planned:
    """Plans a checkpoint's weights, perhaps to be quantized. Without a dtype they have the one that `generate` uses.

    Raises:
        InputError: as in `plan_random`, or if matrices to quantize are quantized already.
        ConfigError, CheckpointError: as in `load`.
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
    """Raises `InputError` for cases that are impossible with this model or on this machine.

    Args:
        planned: the model.
        cases: the cases to measure.
        beside: whether another program is measured too, which keeps the weights in their stored dtype in memory.
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
    """Random weights of the model, or of this process's part of it, all in memory."""
    float_type = getattr(mx, planned.config.dtype)
    own = replace(planned.stored, shard=planned.config.shard)
    drawn = random_params(own, planned.formats, mx.random.key(0))
    params: Params = tree_map(
        lambda leaf: leaf.astype(float_type) if mx.issubdtype(leaf.dtype, mx.floating) else leaf, drawn
    )
    del drawn
    _evaluate_leaves(params)
    return params


def loaded_weights(path: Path, planned: Planned) -> Params:
    """The checkpoint's weights as planned, all in memory.

    Raises:
        CheckpointError: as in `load`.
    """
    wanted = planned.config
    if planned.quantization is None and open_checkpoint(path).config.n_layers == wanted.n_layers:
        return load(path, dtype=wanted.dtype, shard=wanted.shard, adapter_path=planned.adapters)[0]
    params, _ = load(path, dtype=wanted.dtype, lazy=True, shard=wanted.shard, adapter_path=planned.adapters)
    transformer = params["transformer"]
    params = {**params, "transformer": {**transformer, "blocks": transformer["blocks"][: wanted.n_layers]}}
    if planned.quantization is not None:
        params = quantize(params, wanted, planned.quantization)
    _evaluate_leaves(params)
    return params


def _evaluate_leaves(params: Params) -> None:
    """Evaluates leaves one by one, so the arrays that they are made from are never all in memory."""
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    for leaf in leaves.values():
        mx.eval(leaf)
        # Otherwise MLX would keep one leaf's buffers during the next.
        mx.clear_cache()


def _cut(config: Config, layers: int | None) -> Config:
    if layers is not None and not 1 <= layers <= config.n_layers:
        raise InputError(f"--layers is {layers} where 1 to {config.n_layers}, all that the model has, are expected.")
    return replace(config, n_layers=layers or config.n_layers)


def _is_in(path: str, config: Config) -> bool:
    """Whether a matrix exists in a model with this number of layers."""
    _, mark, rest = path.partition(".blocks.")
    return not mark or int(rest.partition(".")[0]) < config.n_layers


def _largest_cache(config: Config, cases: Cases) -> int:
    largest = max(cases.batch_sizes) * max(capacity_bucket(context + cases.steps) for context in cases.contexts)
    longest = max(cases.prompts)
    return cache_bytes(config, max(largest, capacity_bucket(min(longest + ANSWER - 1, config.max_seq_len))))
