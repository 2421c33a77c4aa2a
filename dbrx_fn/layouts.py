"""How each known checkpoint layout names and shapes the tensors that become the tree's leaves.

All layouts agree on everything but the experts:

- Hugging Face's *fused*: `ffn.experts.mlp.{w1,v1,w2}`, without `.weight`, experts stacked along rows as `[E*F D]`.
  w2 too, although it maps F to D: the reference computes `h @ w2`, so each expert's slice is stored `[F D]` and the
  leaf's `[D F]` is its transpose.
- mlx-lm's *split*: `ffn.experts.{e}.{w1,v1,w2}.weight`, one linear an expert, `[F D]`, `[F D]` and `[D F]`.

A quantized matrix has `scales`, and mostly `biases`, under its own name beside its `weight`. Experts can be quantized
in the split layout only, since groups lie along a linear's input and the fused w2 is stored across it.

One table maps leaves to tensors, and both reading and writing use it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.config import Config
from dbrx_fn.errors import CheckpointError
from dbrx_fn.params import Format, Leaf, param_spec, quantized_spec

Layout = Literal["fused", "split"]

_MARKS: dict[Layout, re.Pattern[str]] = {
    "fused": re.compile(r"transformer\.blocks\.\d+\.ffn\.experts\.mlp\.(w1|v1|w2)"),
    "split": re.compile(r"transformer\.blocks\.\d+\.ffn\.experts\.\d+\.(w1|v1|w2)\.weight"),
}


@dataclass(frozen=True)
class Source:
    """The tensors that one leaf is made of.

    `names`: in the checkpoint, all of the same `shape`.
    `dtype`: what all are stored in, if that isn't the checkpoint's one float dtype.
    `join`: those tensors to the leaf.
    `part`: the leaf to those tensors, the inverse.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Literal["uint32", "uint8"] | None
    join: Callable[[Sequence[mx.array]], mx.array]
    part: Callable[[mx.array], Sequence[mx.array]]


def layout_of(names: Iterable[str]) -> Layout:
    """Recognizes a layout from its tensors' names.

    Raises:
        CheckpointError: if the experts' names are of no known layout, or of two.
    """
    names = sorted(names)
    found = {layout: [n for n in names if mark.fullmatch(n)] for layout, mark in _MARKS.items()}
    known = [layout for layout, matches in found.items() if matches]
    if len(known) == 1:
        return known[0]
    if known:
        examples = " and ".join(matches[0] for matches in found.values())
        raise CheckpointError(f"The tensors mix two layouts ({examples}): keep those of one conversion only.")
    experts = [name for name in names if "experts" in name][:3] or names[:3]
    raise CheckpointError(
        "No known layout has tensors of these names: "
        + (", ".join(experts) or "none at all")
        + ", …; known are Hugging Face's (ffn.experts.mlp.w1) and mlx-lm's (ffn.experts.0.w1.weight)."
    )


def sources(config: Config, layout: Layout, formats: Mapping[str, Format] | None = None) -> Mapping[str, Source]:
    """For each leaf's path, where it comes from in a checkpoint of this layout.

    Args:
        config: the model's.
        layout: the checkpoint's.
        formats: of the matrices that are quantized, by their paths; experts' in the split layout only.
    """
    make = _fused if layout == "fused" else _split
    spec = quantized_spec(param_spec(config), formats or {})
    return {path: make(path, leaf) if leaf.is_expert else _same(path, leaf) for path, leaf in spec.items()}


def _same(path: str, leaf: Leaf) -> Source:
    return Source((path,), leaf.shape, leaf.dtype, lambda tensors: tensors[0], lambda array: [array])


def _fused(path: str, leaf: Leaf) -> Source:
    experts, rows, columns = leaf.shape
    name = path.removesuffix(".weight")
    if name.endswith(".w2"):
        return Source(
            (name,),
            (experts * columns, rows),
            leaf.dtype,
            lambda tensors: tensors[0].reshape(experts, columns, rows).swapaxes(1, 2),
            lambda array: [array.swapaxes(1, 2).reshape(experts * columns, rows)],
        )
    return Source(
        (name,),
        (experts * rows, columns),
        leaf.dtype,
        lambda tensors: tensors[0].reshape(leaf.shape),
        lambda array: [array.reshape(experts * rows, columns)],
    )


def _split(path: str, leaf: Leaf) -> Source:
    return Source(
        tuple(path.replace(".mlp.", f".{e}.") for e in range(leaf.shape[0])),
        leaf.shape[1:],
        leaf.dtype,
        lambda tensors: mx.stack(list(tensors)),
        lambda array: list(array),
    )
