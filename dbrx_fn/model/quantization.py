"""Quantization of a tree's matrices, and back, as pure functions of the tree.

Each kind of matrix has a format of its own. The router isn't quantized unless asked for: it is tiny, and its errors
send tokens to other experts. The experts are 96% of DBRX's parameters.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import InputError
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import KINDS, Kind, check_params, companions, formats_of, kind_of, nest, param_spec
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format, dequantize_matrix, quantize_matrix
from dbrx_fn.runtime.arguments import check_fields, checked

_USUAL = Format(4, 64)


@dataclass(frozen=True)
class Quantization:
    """The format of each kind of matrix. `None` leaves that kind unchanged.

    `experts`: w1, v1 and w2. `attention`: Wqkv and out_proj. `embedding`: wte. `head`: lm_head. `router`: its layer.

    Raises:
        InputError: if one is no `Format`.
    """

    experts: Format | None = _USUAL
    attention: Format | None = _USUAL
    embedding: Format | None = _USUAL
    head: Format | None = _USUAL
    router: Format | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def quantize(params: Params, config: Config, quantization: Quantization | None = None) -> Params:
    """A new tree with quantized matrices. All other leaves are unchanged, and so is the given tree.

    The arrays are lazy, as MLX's are.

    Args:
        params: the tree. The matrices to quantize must not be quantized already.
        config: the model's.
        quantization: the formats; `Quantization()`, if not given.

    Raises:
        InputError: if a group size doesn't divide a matrix's input width, or a matrix is quantized already; it names
            the matrix.
        CheckpointError: if the tree doesn't fit the config.
    """
    check_params(params, config)
    wanted = wanted_formats(config, quantization or Quantization())
    arrays: dict[str, mx.array] = dict(tree_flatten(params))
    already = tree_formats(params, config)
    for path, form in wanted.items():
        if path in already:
            raise InputError(f"{path} is quantized already: call dequantize first, or leave matrices of that kind.")
        arrays |= zip(companions(path), quantize_matrix(arrays[path], form), strict=False)
    return nest(arrays, config)


@checked
def dequantize(params: Params, config: Config, kinds: Collection[Kind] = KINDS) -> Params:
    """A new tree with every quantized matrix of these kinds turned back into floats of `config.dtype`.

    Raises:
        CheckpointError: if the tree doesn't fit the config.
    """
    check_params(params, config)
    arrays: dict[str, mx.array] = dict(tree_flatten(params))
    for path, form in tree_formats(params, config).items():
        if kind_of(path) not in kinds:
            continue
        leaves = [arrays.pop(name) for name in companions(path) if name in arrays]
        arrays[path] = dequantize_matrix(leaves, form, getattr(mx, config.dtype))
    return nest(arrays, config)


def tree_formats(params: Params, config: Config) -> Mapping[str, Format]:
    """The formats of a tree's quantized matrices, by the paths of their weights. The tree must fit the config."""
    spec = param_spec(config)
    places = {path: ((path,), leaf.shape[-1]) for path, leaf in spec.items() if not leaf.is_norm}
    return formats_of(dict(tree_flatten(params)), places)[0]


def wanted_formats(config: Config, quantization: Quantization) -> dict[str, Format]:
    """The format of each matrix that is to be quantized, by its path.

    Raises:
        InputError: if a group size doesn't divide a matrix's input width.
    """
    kinds = {path: kind_of(path) for path in param_spec(config)}
    wanted = {path: getattr(quantization, kind) for path, kind in kinds.items() if kind is not None}
    formats: dict[str, Format] = {path: form for path, form in wanted.items() if form is not None}
    for path, form in formats.items():
        inner = param_spec(config)[path].shape[-1]
        if inner % form.group_size:
            raise InputError(
                f"group_size is {form.group_size} where a divisor of {inner}, the input width of {path}, is expected:"
                " choose another, or leave matrices of that kind as they are."
            )
    return formats
