"""Reads adapters into the tree, from the folders of mlx-lm and of PEFT."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.adapter_names import SETTINGS, TENSORS, Module, Style, modules, names_of, stored_shape
from dbrx_fn.checkpoints.adapter_settings import AdapterSettings, read_settings
from dbrx_fn.checkpoints.finite import is_finite
from dbrx_fn.checkpoints.safetensors_file import PICKLES, Tensor, read_header
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.files.json_file import shown, shown_path
from dbrx_fn.model.config import Config
from dbrx_fn.model.params import check_params, listed, nest, param_spec
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.memory import reading_device

_FLOATS = ("float32", "bfloat16", "float16")


@checked
def load_adapters(folder: str | Path, params: Params, config: Config) -> Params:
    """A new tree with the adapters of a folder of mlx-lm or of PEFT beside the model's own leaves.

    Args:
        folder: `adapters.safetensors` or `adapter_model.safetensors`, with `adapter_config.json`.
        params: the tree, dense or quantized, without adapters.
        config: the model's.

    Raises:
        CheckpointError: if the tree doesn't fit the config, or as in `read_adapters`.
        InputError: if a target has an adapter already, or if processes share the model.
    """
    check_params(params, config)
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    found = read_adapters(Path(folder), config)
    if twice := sorted(leaves.keys() & found.keys()):
        raise InputError(f"{twice[0]} is there already: merge the tree's adapters with fuse_adapters first.")
    return nest(leaves | found, config)


def read_adapters(folder: Path, config: Config) -> dict[str, mx.array]:
    """The adapters' leaves, by their paths, in the model's dtype.

    Raises:
        CheckpointError: if it isn't a folder of adapters, if a file is missing or damaged, or if the adapters aren't
            those of this model. It names every tensor that doesn't fit.
        InputError: if processes share the model.
    """
    if not config.shard.is_whole:
        raise InputError(
            "Adapters can't be shared by several processes yet: merge them first (python -m dbrx_fn.fuse)."
        )
    style = style_of(folder)
    file = folder / TENSORS[style]
    settings = read_settings(folder / SETTINGS, style, config.n_layers)
    header = read_header(file)
    known = list(modules(config, style))
    strays = (settings.names or frozenset[str]()) - {name for module in known for name in names_of(module, style)}
    if strays:
        raise CheckpointError(
            f"{folder / SETTINGS} names {shown(min(strays))}, which is no linear of the model: give the model that the"
            " adapters were made for, or leave the name out."
        )
    if problems := _problems(header, known, settings, config):
        raise CheckpointError(
            f"{file}: {len(problems)} of the adapters' tensors don't fit the model and {SETTINGS}: {listed(problems)};"
            " give the model that they were made for, and the files as they were written."
        )
    try:
        with mx.stream(reading_device()):
            tensors = cast(dict[str, mx.array], mx.load(str(file)))
            return _leaves(tensors, known, settings, config, file)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{file} can't be read to its end ({error}): copy it again.") from None


def style_of(folder: Path) -> Style:
    """Whose folder of adapters this is.

    Raises:
        CheckpointError: if it is none, or is one of both.
    """
    name = shown_path(folder)
    try:
        found = [style for style, file in TENSORS.items() if (folder / file).exists()]
    except OSError as error:
        raise CheckpointError(
            f"{name} can't be read ({error.strerror}) where a folder with adapters is expected: make it readable, or"
            " give another."
        ) from None
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{name} holds {' and '.join(TENSORS.values())}: keep the one that is meant.")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "doesn't exist"
        raise CheckpointError(f"{name} {what} where a folder with adapters is expected, such as train --lora writes.")
    if (folder / "config.json").exists():
        raise CheckpointError(f"{name} is a model where adapters are expected: give it as the model.")
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{name} holds {pickles[0]}, and a pickle can run code when it is read: save the adapters as safetensors."
        )
    raise CheckpointError(f"{name} holds neither {' nor '.join(TENSORS.values())}: give a folder of adapters.")


def _problems(
    header: Mapping[str, Tensor], known: list[Module], settings: AdapterSettings, config: Config
) -> list[str]:
    """What is wrong with the tensors, each as a phrase that begins with its name."""
    spec = param_spec(config)
    expected = {
        part.name: stored_shape(module, part, spec[module.path], settings.rank)
        for module in known
        if settings.has_adapter(module)
        for part in module.parts
    }
    possible = {part.name for module in known for part in module.parts}
    problems = []
    for name, tensor in header.items():
        if name not in expected:
            why = f"isn't among {SETTINGS}'s targets" if name in possible else "belongs to no linear of the model"
            problems.append(f"{name} {list(tensor.shape)} {why}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} is {list(tensor.shape)} where {list(expected[name])} is expected")
        elif tensor.dtype not in _FLOATS:
            problems.append(f"{name} is {tensor.dtype} where one of {', '.join(_FLOATS)} is expected")
    problems += [f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in header]
    if not header:
        problems.append("there is none")
    stacks: dict[str, set[int]] = {}
    for module in known:
        if module.expert is not None and settings.has_adapter(module):
            stacks.setdefault(module.path, set()).add(module.expert)
    experts = config.ffn.moe_num_experts
    problems += [
        f"{path} has adapters for {len(own)} of its {experts} experts"
        for path, own in stacks.items()
        if len(own) < experts
    ]
    return problems


def _leaves(
    tensors: dict[str, mx.array], known: list[Module], settings: AdapterSettings, config: Config, file: Path
) -> dict[str, mx.array]:
    dtype = getattr(mx, config.dtype)
    single: dict[str, mx.array] = {}
    stacks: dict[str, list[mx.array]] = {}
    for module in known:
        base = module.path.removesuffix("weight")
        for part in module.parts if settings.has_adapter(module) else ():
            tensor = tensors.pop(part.name).astype(dtype)
            if not is_finite(tensor):
                raise CheckpointError(f"{part.name} of {file} holds NaN or infinity: take an earlier save of it.")
            leaf = part.of(tensor)
            if module.expert is None:
                single[base + part.leaf] = leaf
            else:
                stacks.setdefault(base + part.leaf, []).append(leaf)
    found = single | {path: mx.stack(parts) for path, parts in stacks.items()}
    scale = mx.array(settings.scale, mx.float32)
    found |= {path.removesuffix("a") + "scale": scale for path in list(found) if path.endswith(".lora_a")}
    mx.eval(found)
    return found
