"""The known checkpoint layouts: how each names and shapes the tensors that become the tree's leaves.

Layouts differ in the experts, and some in queries, keys and values. Each layout is a table of rules, which say which
tensors make up a linear's leaves, and how. A linear without a rule has the tree's own name. Reading, writing,
converting and inspecting all use these tables.

| layout | written by | experts (E of them, F wide, on D) |
| --- | --- | --- |
| `fused` | Hugging Face, MegaBlocks | `experts.mlp.w1` [E*F D], w2 too: the reference computes `h @ w2`; no `.weight` |
| `split` | mlx-lm | `experts.{e}.w1.weight` [F D], w2 [D F]; quantized too |
| `stacked` | here | `experts.mlp.w1.weight` [E F D], w2 [E D F], as in the tree; quantized too |
| `converted` | LnL-AI, ModelCloud | `experts.mlp.{e}.w1.weight`, w2 in either orientation, told by its shape |
| `mlp_experts` | v2ray | `experts.mlp_experts.{e}.w1.weight`, otherwise as before |
| `nxd` | AWS, for training | `expert_mlps.mlp_op.gate_proj.weight` [E D F], `down_proj` [E F D] |
| `nxd_inference` | AWS, for inference | `expert_mlps.mlp_op.gate_up_proj.weight` [E D 2F], the gate first |
| `gguf` | llama.cpp | `blk.{n}.ffn_gate_exps.weight` [E F D], `ffn_down_exps` [E D F]; quantized too |

Queries, keys and values are separate tensors in `nxd`, and may be in `converted` and `mlp_experts`. `nxd_inference` and
`gguf` rename all tensors.

Sources: the released checkpoint and mlx-lm's models/dbrx.py; MegaBlocks' layers/mlp.py and glu.py; GPTQModel's
dbrx_converted; neuronx-distributed-training's CheckpointConverterDbrx and neuronx-distributed-inference's
modeling_dbrx.py; gguf-py's tensor_mapping.py.

A quantized matrix has `scales`, and in most formats `biases`, beside its `weight`. Groups lie along a linear's input
axis, so experts can't be quantized in layouts that store them transposed.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Leaf, param_spec, quantized_spec
from dbrx_fn.model.shard import Cut, Shard
from dbrx_fn.ops.formats import Described, Format

Layout = Literal["fused", "split", "stacked", "converted", "mlp_experts", "nxd", "nxd_inference", "gguf"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Written = Literal["fused", "split", "stacked"]
WRITTEN: tuple[Written, ...] = get_args(Written)
"""The layouts that can be written too."""


@dataclass(frozen=True)
class Rule:
    """The tensor in a layout that holds a linear's leaf, or a part of it.

    `tensor`: its name, with `{n}` for the block, `{e}` if each expert has its own tensor, and `{leaf}` for `weight`,
        `scales` or `biases`. Without `{leaf}` it can't be quantized.
    `rows`: whether a tensor of all experts stacks their rows in one matrix, instead of along an expert axis.
    `transposed`: whether each matrix is stored transposed. `None` means that its shape tells.
    `part`: which rows of Wqkv it holds; or which half of the stored matrix is the linear's.
    """

    tensor: str
    rows: bool = False
    transposed: bool | None = False
    part: Literal["q", "k", "v", "first half", "second half"] | None = None


Array = TypeVar("Array", mx.array, NDArray[Any])

Rules = Mapping[str, Sequence[Sequence[Rule]]]
"""For each linear of the tree its alternatives. Each is one rule, or one for each part."""

_BLOCK = "transformer.blocks.{n}"
_ATTN = f"{_BLOCK}.norm_attn_norm.attn"
_FFN = f"{_BLOCK}.ffn"
_EXPERTS = f"{_FFN}.experts.mlp"


def _experts(tensor: str, w2_transposed: bool | None = False) -> Rules:
    return {
        f"{_EXPERTS}.{w}": [[Rule(tensor.format_map(_Only(w=w)), transposed=w2_transposed if w == "w2" else False)]]
        for w in ("w1", "v1", "w2")
    }


class _Only(dict[str, str]):
    """Fills some of a template's fields and leaves the others."""

    def __missing__(self, name: str) -> str:
        return f"{{{name}}}"


_QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
_QKV_APART = {f"{_ATTN}.Wqkv": [[Rule(f"{_ATTN}.{p}_proj.{{leaf}}", part=p) for p in _QKV]]}
_QKV_EITHER: Rules = {f"{_ATTN}.Wqkv": [*_QKV_APART[f"{_ATTN}.Wqkv"], [Rule(f"{_ATTN}.Wqkv.{{leaf}}")]]}
_NXD_EXPERTS = f"{_FFN}.expert_mlps.mlp_op"
_NXD_LAYER = "layers.{n}"

_RULES: dict[Layout, Rules] = {
    "stacked": _experts(f"{_EXPERTS}.{{w}}.{{leaf}}"),
    "split": _experts(f"{_FFN}.experts.{{e}}.{{w}}.{{leaf}}"),
    "fused": {
        f"{_EXPERTS}.{w}": [[Rule(f"{_EXPERTS}.{w}", rows=True, transposed=w == "w2")]] for w in ("w1", "v1", "w2")
    }
    # llm-foundry's blocks without `fuse_norm_attn_norm`.
    | {
        f"{_BLOCK}.norm_attn_norm.{name}": [
            [Rule(f"{_BLOCK}.norm_attn_norm.{name}.{{leaf}}")],
            [Rule(f"{_BLOCK}.{name}.{{leaf}}")],
        ]
        for name in ("norm_1", "norm_2", "attn.Wqkv", "attn.out_proj")
    },
    "converted": {**_QKV_EITHER, **_experts(f"{_FFN}.experts.mlp.{{e}}.{{w}}.{{leaf}}", None)},
    "mlp_experts": {**_QKV_EITHER, **_experts(f"{_FFN}.experts.mlp_experts.{{e}}.{{w}}.{{leaf}}", None)},
    "nxd": {
        f"{_ATTN}.Wqkv": [
            *_QKV_APART[f"{_ATTN}.Wqkv"],
            [Rule(f"{_ATTN}.qkv_proj.weight_{p}", part=p) for p in _QKV],
        ],
        f"{_ATTN}.out_proj": [[Rule(f"{_ATTN}.o_proj.{{leaf}}")]],
        f"{_FFN}.router.layer": [[Rule(f"{_FFN}.router.linear_router.{{leaf}}")]],
        f"{_EXPERTS}.w1": [[Rule(f"{_NXD_EXPERTS}.gate_proj.weight", transposed=True)]],
        f"{_EXPERTS}.v1": [[Rule(f"{_NXD_EXPERTS}.up_proj.weight", transposed=True)]],
        f"{_EXPERTS}.w2": [[Rule(f"{_NXD_EXPERTS}.down_proj.weight", transposed=True)]],
    },
    "nxd_inference": {
        "transformer.wte": [[Rule("embed_tokens.{leaf}")]],
        "transformer.norm_f": [[Rule("norm.{leaf}")]],
        f"{_BLOCK}.norm_attn_norm.norm_1": [[Rule(f"{_NXD_LAYER}.input_layernorm.{{leaf}}")]],
        f"{_BLOCK}.norm_attn_norm.norm_2": [[Rule(f"{_NXD_LAYER}.post_attention_layernorm.{{leaf}}")]],
        f"{_ATTN}.Wqkv": [
            [Rule(f"{_NXD_LAYER}.self_attn.Wqkv.{{leaf}}")],
            [Rule(f"{_NXD_LAYER}.self_attn.qkv_proj.Wqkv.{{leaf}}")],
        ],
        f"{_ATTN}.out_proj": [
            [Rule(f"{_NXD_LAYER}.self_attn.o_proj.{{leaf}}")],
            [Rule(f"{_NXD_LAYER}.self_attn.o_proj.o_proj.{{leaf}}")],
        ],
        f"{_FFN}.router.layer": [[Rule(f"{_NXD_LAYER}.ffn.router.linear_router.{{leaf}}")]],
        f"{_EXPERTS}.w1": [
            [Rule(f"{_NXD_LAYER}.ffn.expert_mlps.mlp_op.gate_up_proj.weight", transposed=True, part="first half")]
        ],
        f"{_EXPERTS}.v1": [
            [Rule(f"{_NXD_LAYER}.ffn.expert_mlps.mlp_op.gate_up_proj.weight", transposed=True, part="second half")]
        ],
        f"{_EXPERTS}.w2": [[Rule(f"{_NXD_LAYER}.ffn.expert_mlps.mlp_op.down_proj.weight", transposed=True)]],
    },
    "gguf": {
        "transformer.wte": [[Rule("token_embd.{leaf}")]],
        "transformer.norm_f": [[Rule("output_norm.{leaf}")]],
        "lm_head": [[Rule("output.{leaf}")]],
        f"{_BLOCK}.norm_attn_norm.norm_1": [[Rule("blk.{n}.attn_norm.{leaf}")]],
        f"{_BLOCK}.norm_attn_norm.norm_2": [[Rule("blk.{n}.attn_output_norm.{leaf}")]],
        f"{_ATTN}.Wqkv": [[Rule("blk.{n}.attn_qkv.{leaf}")]],
        f"{_ATTN}.out_proj": [[Rule("blk.{n}.attn_output.{leaf}")]],
        f"{_FFN}.router.layer": [[Rule("blk.{n}.ffn_gate_inp.{leaf}")]],
        f"{_EXPERTS}.w1": [
            [Rule("blk.{n}.ffn_gate_exps.{leaf}")],
            [Rule("blk.{n}.ffn_gate_up_exps.{leaf}", part="first half")],
        ],
        f"{_EXPERTS}.v1": [
            [Rule("blk.{n}.ffn_up_exps.{leaf}")],
            [Rule("blk.{n}.ffn_gate_up_exps.{leaf}", part="second half")],
        ],
        f"{_EXPERTS}.w2": [[Rule("blk.{n}.ffn_down_exps.{leaf}")]],
    },
}


@dataclass(frozen=True)
class Stored:
    """One tensor that holds a leaf or a part of it; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    rule: Rule


@dataclass(frozen=True)
class Source:
    """The tensors that make up one leaf: a single one, one for each expert, or one for each part in order.

    `leaf`: the leaf that they become.
    """

    stored: tuple[Stored, ...]
    leaf: Leaf

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(stored.name for stored in self.stored)

    def join(self, tensors: Sequence[mx.array]) -> mx.array:
        """Makes the leaf of the tensors, given in the order of `names`. The result is lazy."""
        parts = [self._matrices(stored, tensor) for stored, tensor in zip(self.stored, tensors, strict=True)]
        if self._one_by_one:
            return mx.stack(parts)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def own_parts(self, tensors: Sequence[Array], shard: Shard) -> list[list[Array]]:
        """The shard's parts of each tensor, as views in the tree's orientation. `join_parts` makes the leaf of them."""
        cut = self.leaf.cut
        assert cut is not None
        if self._one_by_one:
            cut = Cut(cut.axis - 1, cut.sections)
        if len(self.stored) > 1:
            # Queries, keys and values are tensors of their own.
            cut = Cut(cut.axis)
        matrices = [self._matrices(stored, tensor) for stored, tensor in zip(self.stored, tensors, strict=True)]
        return [[one[part] for part in cut.slices(one.shape[cut.axis], shard)] for one in matrices]

    def join_parts(self, parts: Sequence[Sequence[mx.array]]) -> mx.array:
        """Makes a process's leaf of what `own_parts` returned."""
        assert self.leaf.cut is not None
        if self._one_by_one:
            return mx.stack([part for (part,) in parts])
        together = [part for of_tensor in parts for part in of_tensor]
        return together[0] if len(together) == 1 else mx.concatenate(together, axis=self.leaf.cut.axis)

    @property
    def is_stack(self) -> bool:
        """Whether it is a single tensor that holds each expert's matrix along its first axis."""
        return self.leaf.is_expert and not self._one_by_one and not self.stored[0].rule.rows

    def matrices(self, tensor: Callable[[str], Iterable[NDArray[Any]]]) -> Iterator[NDArray[Any]]:
        """Yields the leaf's matrices one by one: one for each expert, or the only one.

        `tensor` returns a tensor by its name, as an array. A stack may be any iterable of its matrices. It is called
        once for each, and the results aren't kept.
        """
        if self.is_stack:
            for matrix in tensor(self.stored[0].name):
                yield self._matrices(self.stored[0], matrix)
            return
        if self._one_by_one:
            for stored in self.stored:
                yield self._matrices(stored, np.asarray(tensor(stored.name)))
            return
        parts = [self._matrices(stored, np.asarray(tensor(stored.name))) for stored in self.stored]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        yield from whole if self.leaf.is_expert else [whole]

    def place(self, expert: int) -> tuple[Stored, int]:
        """Where to write an expert's matrix: its tensor, and the number of matrices before it in that tensor.

        This holds for the written layouts, which store each matrix whole.
        """
        return (self.stored[expert], 0) if self._one_by_one else (self.stored[0], expert)

    @property
    def _one_by_one(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{e}" in self.stored[0].rule.tensor

    def _matrices(self, stored: Stored, tensor: Array) -> Array:
        """A stored tensor's part of the leaf, in the tree's orientation, for one expert or for all."""
        rule = stored.rule
        if rule.rows:
            tensor = tensor.reshape(self.leaf.shape[0], -1, tensor.shape[-1])
        if rule.transposed:
            tensor = tensor.swapaxes(-1, -2)
        if rule.part not in ("first half", "second half"):
            return tensor
        half = tensor.shape[-2] // 2
        return tensor[..., :half, :] if rule.part == "first half" else tensor[..., half:, :]


def layout_of(names: Iterable[str]) -> Layout:
    """Recognizes a layout from its tensors' names.

    Raises:
        CheckpointError: if the experts' names fit no known layout, or two.
    """
    names = sorted(names)
    found = {layout: [name for name in names if _mark(layout).fullmatch(name)] for layout in LAYOUTS}
    known = [layout for layout, matches in found.items() if matches]
    if len(known) == 1:
        return known[0]
    if known:
        examples = " and ".join(found[layout][0] for layout in known)
        raise CheckpointError(f"The tensors mix layouts ({examples}): keep those of one conversion only.")
    experts = [name for name in names if "expert" in name or "_exps" in name][:3] or names[:3]
    raise CheckpointError(
        f"No known layout has tensors of these names: {', '.join(experts) or 'none at all'}, …; known are "
        + ", ".join(_example(layout) for layout in LAYOUTS)
        + "."
    )


def prefix_of(names: Iterable[str]) -> str:
    """The common prefix of all tensors' names: Composer's `model.`, or nothing."""
    return "model." if all(name.startswith("model.") for name in names) else ""


def is_extra(layout: Layout, name: str) -> bool:
    """Whether a tensor of this name is no parameter, and can be ignored."""
    return layout == "nxd_inference" and name.endswith(".self_attn.rank_util.rank")


def sources(
    config: Config,
    layout: Layout,
    formats: Mapping[str, Format] | None = None,
    found: Mapping[str, Described] | None = None,
) -> Mapping[str, Source]:
    """For each leaf's path, the tensors that hold it in this layout.

    Args:
        config: the model's.
        layout: the checkpoint's.
        formats: the formats of the quantized matrices, by their paths.
        found: the checkpoint's tensors, by name. They decide between a layout's alternatives.
    """
    spec = quantized_spec(param_spec(config), formats or {})
    return {path: _source(path, leaf, config, _RULES[layout], found or {}) for path, leaf in spec.items()}


def has_tensor_per_expert(layout: Layout) -> bool:
    """Whether each expert's matrices are tensors of their own."""
    return "{e}" in _RULES[layout][f"{_EXPERTS}.w1"][0][0].tensor


def holds_quantized(layout: Layout, path: str) -> bool:
    """Whether the matrix of this path can be quantized in a layout."""
    linear, _ = _linear_of(path)
    return all("{leaf}" in rule.tensor for rules in _rules(linear, _RULES[layout]) for rule in rules)


def _source(path: str, leaf: Leaf, config: Config, rules: Rules, found: Mapping[str, Described]) -> Source:
    linear, block = _linear_of(path)
    fields = _Only(n=block, leaf=path.rpartition(".")[2])
    alternatives = [list(_stored(alternative, fields, leaf, config, found)) for alternative in _rules(linear, rules)]
    there = [stored for stored in alternatives if any(one.name in found for one in stored)]
    return Source(tuple((there or alternatives)[0]), leaf)


def _stored(
    rules: Sequence[Rule], fields: _Only, leaf: Leaf, config: Config, found: Mapping[str, Described]
) -> Iterator[Stored]:
    for rule in rules:
        template = rule.tensor.format_map(fields)
        experts = range(leaf.shape[0]) if "{e}" in template else [None]
        for expert in experts:
            name = template.format(e=expert)
            shape = leaf.shape[1:] if expert is not None else leaf.shape
            if rule.part in ("q", "k", "v"):
                heads = config.n_heads if rule.part == "q" else config.attn.kv_n_heads
                shape = (heads * config.head_dim, *shape[1:])
            elif rule.part is not None:
                shape = (*shape[:-2], 2 * shape[-2], shape[-1])
            transposed = rule.transposed
            if transposed is None:
                transposed = name in found and shape != tuple(found[name].shape) == shape[::-1]
            if transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            if rule.rows:
                shape = (shape[0] * shape[1], shape[2])
            yield Stored(name, shape, Rule(rule.tensor, rule.rows, transposed, rule.part))


def _rules(linear: str, rules: Rules) -> Sequence[Sequence[Rule]]:
    return rules.get(linear) or [[Rule(f"{linear}.{{leaf}}")]]


def _linear_of(path: str) -> tuple[str, str]:
    """The template of the linear that a leaf belongs to, and its block's number."""
    linear = path.rpartition(".")[0]
    block = re.match(r"transformer\.blocks\.(\d+)", linear)
    return (linear, "") if block is None else (linear.replace(block[0], _BLOCK, 1), block[1])


@functools.cache
def _mark(layout: Layout) -> re.Pattern[str]:
    """The names of a layout's experts."""
    patterns = [
        re.escape(rule.tensor).replace(r"\{n\}", r"\d+").replace(r"\{e\}", r"\d+").replace(r"\{leaf\}", "weight")
        for w in ("w1", "v1", "w2")
        for rules in _RULES[layout][f"{_EXPERTS}.{w}"]
        for rule in rules
    ]
    return re.compile("|".join(patterns))


def _example(layout: Layout) -> str:
    fields = {"n": "0", "e": "0", "leaf": "weight"}
    return f"{layout} ({_RULES[layout][f'{_EXPERTS}.w1'][0][0].tensor.format_map(fields)})"
