"""mlx-lm's DBRX on this package's weights, to be measured beside it. It needs mlx-lm to be installed.

Its matrices are slices of the tree's, so weights that it can use unchanged aren't copied.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dbrx_fn.benchmarks.inference import Program, Step, random_cache
from dbrx_fn.benchmarks.plan import ANSWER
from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.checkpoints.layouts import sources
from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.costs import Formats
from dbrx_fn.model.tree import Params

NAME = "mlx-lm"
_CHUNK = 2048
"""mlx-lm's default number of prompt tokens computed at once (`prefill_step_size`)."""


def check_mlx_lm(config: Config) -> None:
    """Raises `InputError` if mlx-lm isn't installed, or would compute another model than the config's."""
    try:
        import mlx_lm  # noqa: F401
    except ImportError:
        raise InputError("--peer mlx-lm needs mlx-lm, which isn't installed: pip install mlx-lm.") from None
    ffn = config.ffn
    norm = ffn.moe_normalize_expert_weights
    for name, ok in (
        ("attn_config.clip_qkv", config.attn.clip_qkv is not None),
        ("ffn_config.moe_normalize_expert_weights", norm == 1),
        ("ffn_config.ffn_act_fn", ffn.ffn_act_fn in ("silu", "swish")),
    ):
        if not ok:
            raise InputError(f"--peer mlx-lm can't be measured: mlx-lm computes no other {name} than the released one.")


def mlx_lm_program(params: Params, config: Config, formats: Formats) -> Program:
    """mlx-lm's model as a program, run as in its own `generate_step`.

    Args:
        params: the tree.
        config: the model's. Its dtype is the checkpoint's, in which mlx-lm computes.
        formats: formats of the quantized matrices, by their paths.

    Raises:
        InputError: as in `check_mlx_lm`.
    """
    check_mlx_lm(config)
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model = _model(params, config, formats)

    def prefill(tokens: mx.array) -> None:
        cache = make_prompt_cache(model)
        for start in range(0, tokens.shape[1], _CHUNK):
            logits = model(tokens[:, start : start + _CHUNK], cache=cache)[:, -1]
            mx.eval(logits, [layer.keys for layer in cache], [layer.values for layer in cache])

    def first_token(prompt: list[int]) -> None:
        next(generate_step(mx.array(prompt), model, max_tokens=ANSWER))

    def decoder(context: int, batch_size: int, steps: int, together: int) -> Step:
        if together > 1:
            raise InputError("its steps of several tokens aren't measured")
        cache = make_prompt_cache(model)
        for layer, keys, values in zip(cache, *random_cache(config, context, batch_size, context), strict=True):
            layer.keys, layer.values, layer.offset = keys, values, context

        def step(token: mx.array) -> mx.array:
            logits = model(token[:, None], cache=cache)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return mx.argmax(logprobs, axis=-1)

        return step

    return Program(NAME, config, prefill, first_token, decoder)


def _model(params: Params, config: Config, formats: Formats) -> Any:
    from mlx_lm.models.dbrx import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config_to_dict(config)))
    linears = {
        name.removesuffix(".weight"): formats[path]
        for path, source in sources(config, "split").items()
        for name in source.names
        if path in formats
    }

    def wanted(path: str, _: nn.Module) -> bool | dict[str, Any]:
        form = linears.get(path)
        return form is not None and {"bits": form.bits, "group_size": form.group_size, "mode": form.mode}

    # mlx-lm's own initial weights are lazy, and are never computed.
    nn.quantize(model, class_predicate=wanted)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    weights: list[tuple[str, mx.array]] = []
    for path, source in sources(config, "split", formats).items():
        whole = leaves[path]
        if mx.issubdtype(whole.dtype, mx.floating):
            whole = whole.astype(getattr(mx, config.dtype))
        weights += zip(source.names, whole if source.leaf.is_expert else [whole], strict=True)
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model
