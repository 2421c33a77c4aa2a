"""One token of each row through the whole model, as one kernel of the CPU.

The kernel computes what `forward` computes by stock operations, from ids to logits. Those are so many that MLX and
Python take longer for them than memory takes to deliver the weights (`docs/performance.md`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import mlx.core as mx

from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.cache import Cache, extended, init_cache
from dbrx_fn.model.config import NORM_EPS, Config
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.ends import embed, head
from dbrx_fn.model.layers.rotary import inverse_frequencies
from dbrx_fn.model.params import check_params
from dbrx_fn.model.positions import in_cache
from dbrx_fn.model.stacked_adapters import choose_adapters
from dbrx_fn.model.tree import BlockParams, Params
from dbrx_fn.ops.formats import ADAPTER_LEAVES, LEAVES, Linear
from dbrx_fn.ops.kernels.cpu.library import Launch, Operands, Output, Twin, has_kernels
from dbrx_fn.ops.kernels.cpu.matrix import DTYPES, MATRIX_NUMBERS, adapter_numbers, matrix_numbers
from dbrx_fn.runtime.bounded import within

MOST_ROWS = 64
"""The most rows of a step; `MOST_ROWS` in experts.h."""
_WIDEST_HEAD = 1024
"""`WIDEST_HEAD` in decode_step.cpp."""
_NAMES = (*LEAVES, *ADAPTER_LEAVES)
"""A matrix's leaves, in the kernel's order."""
_FIRST = 3
"""The kernel's inputs before the tree: tokens, positions, frequencies."""

Leaves = list[mx.array | None]
_known: dict[tuple[bytes, Config], Launch | None] = {}
"""The launch for each signature; `None` if the kernel doesn't take it."""
_MOST_KNOWN = 256
"""A process that meets more signatures starts anew. One takes some 20 KB in a model of 40 layers."""


class DecodeStep(NamedTuple):
    """A step that the kernel takes."""

    cache: Cache
    launch: Launch
    operands: Operands

    @classmethod
    def of(cls, params: Params, tokens: mx.array, cache: Cache, lengths: tuple[int, ...]) -> "DecodeStep | None":
        """The step of `tokens` `[batch 1]`; `None` if stock operations must compute it.

        Args:
            params: the tree.
            tokens: integers `[batch time]`.
            cache: the tokens before.
            lengths: 1 for each row that has a token, else 0. The results of the others are zeros.
        """
        batch, time = tokens.shape
        if time != 1 or not cache.capacity or batch > MOST_ROWS or not has_kernels():
            return None
        leaves = _flat(params, cache)
        if leaves is None:
            return None
        config = cache.config
        places = mx.array((*cache.lengths, *lengths), mx.int32)
        frequencies = inverse_frequencies(config.head_dim, config.attn.rope_theta)
        operands = Operands([_ids(tokens, config.vocab_size), places, frequencies, *leaves])
        key = operands.signature(), config
        if key in _known:
            launch = _known[key]
        else:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            launch = _known[key] = _launch(params, cache)
        return None if launch is None else cls(cache, launch, operands)

    def __call__(self, lengths: tuple[int, ...]) -> tuple[mx.array, Cache, mx.array]:
        """Logits `[batch 1 vocab]`, the cache with the new tokens, and the experts uint32 `[layers batch top_k]`."""
        logits, experts, *held = self.launch(self.operands)
        layers = list(zip(held[::2], held[1::2], strict=True))
        return logits, extended(self.cache, lengths, layers), experts


def is_one_kernel(params: Params, config: Config) -> bool:
    """Whether steps of at most `MOST_ROWS` rows are one kernel, so that a row's bits don't depend on the others."""
    tokens, cache = mx.zeros((1, 1), mx.int32), init_cache(config, 1, 1)
    return DecodeStep.of(choose_adapters(params, [0]), tokens, cache, (1,)) is not None


def _ids(tokens: mx.array, vocab_size: int) -> mx.array:
    """The tokens in 32 bits. Ids outside of the vocabulary stay outside."""
    if tokens.dtype in (mx.int32, mx.uint32):
        return tokens
    ids, known = within(tokens, vocab_size)
    return mx.where(known, ids, -1)


def _flat(params: Params, cache: Cache) -> Leaves | None:
    """The tree's leaves and each layer's keys and values, in the kernel's order; `None` if there are others."""
    leaves: Leaves = []
    try:
        transformer = params["transformer"]
        known = len(params) == 2 and len(transformer) == 3 and _add(leaves, transformer["wte"])
        for layer, keys, values in zip(transformer["blocks"], cache.keys, cache.values, strict=True):
            first, ffn = layer["norm_attn_norm"], layer["ffn"]
            attn, experts, mlp = first["attn"], ffn["experts"], ffn["experts"]["mlp"]
            sizes = len(layer), len(first), len(attn), len(ffn), len(ffn["router"]), len(experts), len(mlp)
            leaves.append(first["norm_1"]["weight"])
            known &= _add(leaves, attn["Wqkv"]) and _add(leaves, attn["out_proj"])
            leaves.append(first["norm_2"]["weight"])
            known &= _add(leaves, ffn["router"]["layer"])
            known &= _add(leaves, mlp["w1"]) and _add(leaves, mlp["v1"]) and _add(leaves, mlp["w2"])
            leaves += keys, values
            known &= sizes == (2, 3, 2, 2, 1, 1, 3) and len(first["norm_1"]) == len(first["norm_2"]) == 1
        leaves.append(transformer["norm_f"]["weight"])
        known &= len(transformer["norm_f"]) == 1 and _add(leaves, params["lm_head"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return leaves if known and set(map(type, leaves)) <= {mx.array, type(None)} else None


def _add(leaves: Leaves, matrix: Linear) -> bool:
    """Adds a matrix's leaves. Returns whether it has no others."""
    scales, biases = matrix.get("scales"), matrix.get("biases")
    a, b, scale = matrix.get("lora_a"), matrix.get("lora_b"), matrix.get("lora_scale")
    leaves += matrix["weight"], scales, biases, a, b, scale
    count = 1 + (scales is not None) + (biases is not None) + (a is not None) + (b is not None) + (scale is not None)
    return len(matrix) == count


def _launch(params: Params, cache: Cache) -> Launch | None:
    """The launch for operands of these shapes and dtypes, or `None`."""
    config, batch = cache.config, cache.batch_size
    attn, ffn, layers = config.attn, config.ffn, config.n_layers
    order = ffn.moe_normalize_expert_weights or 0.0
    if (
        not config.shard.is_whole
        or config.head_dim > _WIDEST_HEAD
        or ffn.ffn_act_fn not in ("silu", "swish")
        or math.isinf(order)
    ):
        return None
    try:
        check_params(params, config)
    except CheckpointError:
        # The stock operations raise it, too.
        return None
    matrices = [_numbers(matrix, inner, batch) for matrix, inner in _matrices(params, config)]
    own = [None if numbers is None else numbers[:MATRIX_NUMBERS] for numbers in matrices]
    if None in own or any(own[4 + 6 * layer] != own[5 + 6 * layer] for layer in range(layers)):
        return None
    dtype: mx.Dtype = getattr(mx, config.dtype)
    held = (batch, attn.kv_n_heads, cache.capacity, config.head_dim)
    if any(array.shape != held or array.dtype != dtype for array in cache.keys + cache.values):
        return None
    leaves = _flat(params, cache)
    assert leaves is not None
    there = [leaf for leaf in leaves if leaf is not None]
    # By place: layers may share an array, as those of an empty cache can.
    cached = {id(array) for array in cache.keys + cache.values}
    places = [_FIRST + n for n, leaf in enumerate(there) if id(leaf) in cached]
    outputs = [Output((batch, 1, config.vocab_size), dtype), Output((layers, batch, ffn.moe_top_k), mx.uint32)]
    outputs += [Output(held, dtype, place) for place in places]
    sizes = batch, cache.capacity, config.n_heads, attn.kv_n_heads, config.head_dim, ffn.moe_num_experts, ffn.moe_top_k
    numbers = [*sizes, DTYPES[dtype], layers, *(number for one in matrices if one is not None for number in one)]
    clip = math.inf if attn.clip_qkv is None else attn.clip_qkv
    twin = Twin(_stock, (config, tuple(leaf is not None for leaf in leaves)))
    return Launch("decode_step", outputs, numbers=numbers, constants=[NORM_EPS, clip, order], twin=twin)


def _numbers(matrix: Linear, inner: int, batch: int) -> tuple[int, ...] | None:
    """The numbers of a matrix and its adapter, or `None` if the kernel doesn't take them."""
    own, adapter = matrix_numbers(matrix, inner), adapter_numbers(matrix, batch)
    return None if own is None or adapter is None else own + adapter


def _matrices(params: Params, config: Config) -> Iterator[tuple[Linear, int]]:
    """All matrices and their input widths, in the kernel's order."""
    wide = config.d_model
    yield params["transformer"]["wte"], wide
    for layer in params["transformer"]["blocks"]:
        attn, mlp = layer["norm_attn_norm"]["attn"], layer["ffn"]["experts"]["mlp"]
        yield attn["Wqkv"], wide
        yield attn["out_proj"], config.n_heads * config.head_dim
        yield layer["ffn"]["router"]["layer"], wide
        yield mlp["w1"], wide
        yield mlp["v1"], wide
        yield mlp["w2"], config.ffn.ffn_hidden_size
    yield params["lm_head"], wide


def _stock(inputs: Sequence[mx.array], config: Config, there: tuple[bool, ...]) -> list[mx.array]:
    """The kernel's twin."""
    tokens, places, _, *rest = inputs
    given = iter(rest)
    flat = [next(given) if one else None for one in there]
    leaves = iter(flat)

    def matrix() -> Linear:
        found = {name: leaf for name in _NAMES if (leaf := next(leaves)) is not None}
        return cast(Linear, found)

    def norm() -> mx.array:
        return cast(mx.array, next(leaves))

    starts, real = mx.split(places, 2)
    # The last layer's values. Behind them are norm_f's weight and the head's leaves.
    values = flat[-2 - len(_NAMES)]
    assert values is not None
    capacity = values.shape[2]
    positions = in_cache(starts, real, time=1, capacity=capacity, attended=capacity, wraps=True, config=config.layer)
    x = embed(matrix(), tokens, real, config=config.layer)
    experts: list[mx.array] = []
    held: list[mx.array] = []
    for _ in range(config.n_layers):
        # Evaluated in the order of `_flat`.
        norm_1, wqkv, out_proj, norm_2 = norm(), matrix(), matrix(), norm()
        router, w1, v1, w2 = matrix(), matrix(), matrix(), matrix()
        layer: BlockParams = {
            "norm_attn_norm": {
                "norm_1": {"weight": norm_1},
                "attn": {"Wqkv": wqkv, "out_proj": out_proj},
                "norm_2": {"weight": norm_2},
            },
            "ffn": {"router": {"layer": router}, "experts": {"mlp": {"w1": w1, "v1": v1, "w2": w2}}},
        }
        x, after, routing = block(layer, x, (norm(), norm()), positions, config=config.layer)
        assert after is not None
        held += after
        experts.append(routing.top_experts)
    logits = head({"weight": norm()}, matrix(), x, config=config.layer)
    return [logits, mx.stack(experts), *held]
