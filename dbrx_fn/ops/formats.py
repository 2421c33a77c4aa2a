"""Formats of matrices: dense, or packed integers with scales as `mx.quantize` makes them.

The shapes and dtypes of a quantized matrix's leaves determine its format:

    weight     uint32 [... inner * bits / 32]
    scales     the model's dtype, or uint8 [... inner / group_size]
    biases     as scales, in the affine mode only

A matrix of either kind may have an adapter beside it (LoRA, https://arxiv.org/abs/2106.09685). Products are then those
of `weight + lora_scale * lora_b @ lora_a`, without making that matrix:

    lora_a     the model's dtype [... rank inner]
    lora_b     the model's dtype [... outer rank]
    lora_scale float32 [], or [rows rank] if the batch's rows use different adapters (`dbrx_fn.model.stacked_adapters`)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, Protocol, TypedDict, cast, get_args

import mlx.core as mx
from beartype.vale import Is
from jaxtyping import Float, Float32, Shaped, UInt32

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.runtime.arguments import check_fields


class Linear(TypedDict):
    """One matrix `[... outer inner]`: `weight`, if it is quantized `scales` and perhaps `biases`, maybe an adapter."""

    weight: mx.array
    scales: NotRequired[mx.array]
    biases: NotRequired[mx.array]
    lora_a: NotRequired[mx.array]
    lora_b: NotRequired[mx.array]
    lora_scale: NotRequired[mx.array]


LEAVES = ("weight", "scales", "biases")
"""The names of a matrix's own leaves, in canonical order."""
ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_scale")
"""The names of an adapter's leaves, which follow them."""


def is_adapted(matrix: Linear) -> bool:
    """Whether there is an adapter beside the matrix. Only the kernel for single tokens on a CPU knows adapters."""
    return "lora_a" in matrix


def scaled(narrow: mx.array, scale: mx.array) -> mx.array:
    """What an adapter's `lora_a` made, `[... rank]`, times its scale.

    Args:
        narrow: the product. Its first axes run over the batch's rows, and over the tokens of each.
        scale: float32 `[]`; or that of each row and column, `[rows rank]`; or that of each entry, of `narrow`'s shape.
    """
    if scale.ndim == 0:
        return (narrow * scale).astype(narrow.dtype)
    of_rows = narrow
    if scale.ndim == 2:
        of_rows, scale = narrow.reshape(scale.shape[0], -1, scale.shape[1]), scale[:, None]
    # A product with zero would be NaN where an adapter that the row doesn't use overflows.
    return mx.where(scale == 0, 0, of_rows * scale).astype(narrow.dtype).reshape(narrow.shape)


def _has_axes(outer: str) -> Callable[[Linear], bool]:
    """A check of the leaves' axes. Within a typed function, axes of one name must have one size."""
    dense: Any = Float[mx.array, f"{outer} inner"]
    packed: Any = UInt32[mx.array, f"{outer} packed"]
    scales: Any = Shaped[mx.array, f"{outer} group"]
    biases: Any = Float[mx.array, f"{outer} group"]
    lora_a: Any = Float[mx.array, f"{outer.removesuffix('outer')} rank inner"]
    lora_b: Any = Float[mx.array, f"{outer} rank"]
    lora_scale: Any = Float32[mx.array, "*rows_and_rank"]

    def has_axes(matrix: Linear) -> bool:
        if is_adapted(matrix) and not (
            isinstance(matrix["lora_a"], lora_a)
            and isinstance(matrix["lora_b"], lora_b)
            and isinstance(matrix["lora_scale"], lora_scale)
        ):
            return False
        if "scales" not in matrix:
            return isinstance(matrix["weight"], dense)
        quantized = isinstance(matrix["weight"], packed) and isinstance(matrix["scales"], scales)
        return quantized and ("biases" not in matrix or isinstance(matrix["biases"], biases))

    return has_axes


Matrix = Annotated[Linear, Is[_has_axes("outer")]]
"""A `Linear` of one matrix, its axes checked where a typed function takes it."""
Matrices = Annotated[Linear, Is[_has_axes("expert outer")]]
"""A `Linear` of one matrix for each expert."""

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
MODES: tuple[Mode, ...] = get_args(Mode)

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
# The others are floating-point formats of one size each: (bits, group_size).
_FLOAT_MODES: dict[tuple[int, int], Mode] = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}


@dataclass(frozen=True)
class Format:
    """How a matrix is quantized: `bits` per entry, and one scale for each `group_size` entries of a row.

    Modes are those of `mx.quantize`. `affine` has a scale and a bias per group, in the model's dtype. The other three
    modes have 8-bit float scales and no biases.

    Raises:
        InputError: if the mode doesn't exist, or doesn't have these bits or this group size.
    """

    bits: int
    group_size: int
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        check_fields(self)
        size = (self.bits, self.group_size)
        if self.mode != "affine" and _FLOAT_MODES.get(size) != self.mode:
            bits, group_size = next(size for size, mode in _FLOAT_MODES.items() if mode == self.mode)
            raise InputError(
                f"bits and group_size are {self.bits} and {self.group_size} where {self.mode} has {bits} and"
                f" {group_size}."
            )
        if self.mode == "affine" and not (self.bits in _AFFINE_BITS and self.group_size in _AFFINE_GROUPS):
            raise InputError(
                f"bits and group_size are {self.bits} and {self.group_size} where one of {_either(_AFFINE_BITS)} and"
                f" one of {_either(_AFFINE_GROUPS)} are expected."
            )


def format_of_mode(mode: str) -> Format:
    """The format of a mode other than `affine`. Each of these modes has only one.

    Raises:
        InputError: if there is no such mode.
    """
    for (bits, group_size), known in _FLOAT_MODES.items():
        if known == mode:
            return Format(bits, group_size, known)
    raise InputError(f"mode is {mode!r} where one of {_either(_FLOAT_MODES.values())} is expected.")


def _either(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


class Described(Protocol):
    """Anything with a shape and a dtype: an array, or its entry in a file's header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def dtype(self) -> Any:
        """An MLX dtype, or the name of one."""


def dtype_name(array: Described) -> str:
    """The name of an array's dtype, as in a config: `float32`."""
    return str(array.dtype).removeprefix("mlx.core.")


def format_of(linear: Linear | Mapping[str, Described], inner: int) -> Format:
    """The format of a quantized linear, read from its leaves' names, shapes and dtypes.

    Args:
        linear: `weight`, `scales` and perhaps `biases`.
        inner: the linear's input width. Shapes alone can't tell 4 bits in groups of 64 from 8 bits in groups of 32.

    Raises:
        CheckpointError: if the leaves have no known format.
    """
    found = format_or_problem(cast(Mapping[str, Described], linear), inner)
    if isinstance(found, str):
        raise CheckpointError(f"A quantized linear's {found}.")
    return found


def format_or_problem(linear: Mapping[str, Described], inner: int) -> Format | str:
    """The format, or a phrase that says what is wrong and follows the linear's name."""
    for name in ("weight", "scales"):
        if name not in linear:
            return f"{name} is missing, which a quantized linear has"
        if len(linear[name].shape) < 2:
            return f"{name} is {list(linear[name].shape)} where a matrix is expected"
    columns, groups = linear["weight"].shape[-1], linear["scales"].shape[-1]
    bits = columns * 32 // inner if columns * 32 % inner == 0 else 0
    group_size = inner // groups if groups and inner % groups == 0 else 0
    of_width = f"which for an input width of {inner} is none of"
    if dtype_name(linear["scales"]) == "uint8":
        mode = _FLOAT_MODES.get((bits, group_size))
        if mode is None:
            return f"weight has {columns} columns and its uint8 scales {groups}, {of_width} {_either(MODES[1:])}"
        return Format(bits, group_size, mode)
    if bits not in _AFFINE_BITS:
        return f"weight has {columns} columns, {of_width} {_either(_AFFINE_BITS)} bits"
    if group_size not in _AFFINE_GROUPS:
        return f"scales has {groups} columns, {of_width} the group sizes {_either(_AFFINE_GROUPS)}"
    return Format(bits, group_size)


def quantize_matrix(matrix: mx.array, form: Format) -> Sequence[mx.array]:
    """The quantized matrix: weight, scales and perhaps biases."""
    leaves: Sequence[mx.array] = mx.quantize(matrix, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return leaves


def dequantize_matrix(leaves: Sequence[mx.array], form: Format, dtype: mx.Dtype) -> mx.array:
    """The matrix as floats, from its weight, scales and perhaps biases."""
    weight, scales, *rest = leaves
    return mx.dequantize(
        weight,
        scales,
        rest[0] if rest else None,
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
        dtype=dtype,
    )
