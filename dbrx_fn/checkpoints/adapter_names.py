"""Names of adapters' tensors in other programs' folders.

mlx-lm has a linear for each expert. It multiplies from the left, so its matrices are transposed, and its embedding's
pair has the roles of the two exchanged. PEFT's linears are as the tree's, its embedding's pair is exchanged and
transposed, and it has no adapter for one expert's matrix, since transformers' experts are parameters:

    | module | mlx-lm | PEFT |
    | --- | --- | --- |
    | Wqkv, out_proj, router.layer, lm_head | lora_a [inner rank], lora_b [rank outer] | lora_A.weight, lora_B.weight |
    | experts.3.w1 | the same, for each expert | |
    | wte | lora_a [vocab rank], lora_b [rank d_model] | lora_embedding_A [rank vocab], lora_embedding_B |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Leaf, kind_of, param_spec

Style = Literal["mlx-lm", "peft"]
TENSORS: dict[Style, str] = {"mlx-lm": "adapters.safetensors", "peft": "adapter_model.safetensors"}
"""The file of tensors of each program."""
SETTINGS = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Part:
    """One stored tensor: its name, and whether it is the transpose of its leaf."""

    name: str
    leaf: Literal["lora_a", "lora_b"]
    transposed: bool

    def of(self, leaf: mx.array) -> mx.array:
        """The stored tensor of a leaf, or the leaf of a stored tensor."""
        return mx.contiguous(leaf.T if self.transposed else leaf)


@dataclass(frozen=True)
class Module:
    """A module of the other program: the matrix that it is, and the two tensors of its adapter.

    `path`: of the weight in the tree. `expert`: the number of the matrix in a stack, or `None` if it isn't one.
    """

    name: str
    path: str
    expert: int | None
    parts: tuple[Part, Part]

    @property
    def layer(self) -> int | None:
        """The number of the layer that holds it, if one does."""
        words = self.name.split(".")
        return int(words[2]) if words[1:2] == ["blocks"] else None

    @property
    def within_layer(self) -> str:
        """The name within its layer, or the whole name outside of the layers."""
        return self.name if self.layer is None else self.name.split(".", 3)[3]


def names_of(module: Module, style: Style) -> Iterator[str]:
    """The names by which a program's settings may mean a module: for PEFT, any of its last words."""
    yield module.name
    if style == "mlx-lm":
        yield module.within_layer
    else:
        words = module.name.split(".")
        yield from (".".join(words[start:]) for start in range(1, len(words)))


def modules(config: Config, style: Style) -> Iterator[Module]:
    """Yields all modules that can have an adapter in a program, in the tree's order."""
    for path, leaf in param_spec(config).items():
        if leaf.is_norm:
            continue
        name = path.removesuffix(".weight")
        if not leaf.is_expert:
            yield Module(name, path, None, _parts(name, path, style))
        elif style == "mlx-lm":
            before, after = name.split(".mlp.")
            for expert in range(leaf.shape[0]):
                own = f"{before}.{expert}.{after}"
                yield Module(own, path, expert, _parts(own, path, style))


def _parts(module: str, path: str, style: Style) -> tuple[Part, Part]:
    embeds = kind_of(path) == "embedding"
    if style == "mlx-lm":
        first, second = f"{module}.lora_a", f"{module}.lora_b"
    elif embeds:
        first, second = (f"{_PEFT_PREFIX}{module}.lora_embedding_{half}" for half in "AB")
    else:
        first, second = (f"{_PEFT_PREFIX}{module}.lora_{half}.weight" for half in "AB")
    transposed = embeds == (style == "peft")
    if embeds:
        return Part(first, "lora_b", transposed), Part(second, "lora_a", transposed)
    return Part(first, "lora_a", transposed), Part(second, "lora_b", transposed)


def stored_shape(module: Module, part: Part, leaf: Leaf, rank: int) -> tuple[int, ...]:
    """The shape of a stored tensor. `leaf` is that of the weight."""
    whole = leaf.adapter(rank)[part.leaf].shape
    shape = whole if module.expert is None else whole[1:]
    return shape[::-1] if part.transposed else shape
