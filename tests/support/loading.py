"""What the tests of the loader share: a small model's files, files of holes, and how a folder is refused."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dbrx_fn.checkpoints.layouts import sources
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import DBRX, Config, Dtype
from dbrx_fn.model.params import param_count
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from tests.support import checkpoints

RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 12,
    "n_heads": 3,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 20,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 5, "moe_num_experts": 3, "moe_top_k": 2},
}
TENSORS = checkpoints.random_tensors(RAW, np.random.default_rng(0))
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
INDEX = "model.safetensors.index.json"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
ROUTER = "transformer.blocks.1.ffn.router.layer.weight"
W1 = "transformer.blocks.0.ffn.experts.mlp.w1"

Writer = Callable[..., None]
both_layouts = pytest.mark.parametrize("write", [checkpoints.write_fused, checkpoints.write_split])


def logits(params: Params, config: Config) -> NDArray[np.float32]:
    """In float32 and without a cache, whatever the model's dtype."""
    out, _ = forward(params, mx.array([TOKENS]), init_cache(config, 1, 0))
    return np.array(out[0].astype(mx.float32))


def leaves(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def assert_same(params: Params, other: Params) -> None:
    found, expected = leaves(params), leaves(other)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        assert mx.array_equal(leaf, expected[path]), path


def refused(folder: Path | str, *words: str, **options: Any) -> str:
    """Loading must fail with one sentence that has these words, and leave the folder as it was."""
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    for word in words:
        assert word in text
    assert snapshot(folder) == before
    return text


def snapshot(folder: Path | str) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).rglob("*")}


def write_tensors(folder: Path, tensors: Mapping[str, mx.array], file: str = "model.safetensors") -> None:
    mx.save_safetensors(str(folder / file), dict(tensors), {"format": "pt"})


def as_arrays(tensors: Mapping[str, NDArray[Any]]) -> dict[str, mx.array]:
    return {name: mx.array(tensor) for name, tensor in tensors.items()}


def write_raw(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], itemsize: int) -> None:
    """A safetensors file of holes, which takes no room on disk: a truthful header and a size."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    write_header(path, header, end)


def write_header(path: Path, header: Mapping[str, Any], end: int) -> None:
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    os.truncate(path, 8 + len(content) + end)


def full_size(folder: Path) -> Config:
    """The released model's files, 245 GiB of holes, with more layers where a machine has room for that."""
    config = DBRX
    while 2 * param_count(config) < MEMORY:
        config = replace(config, n_layers=2 * config.n_layers)
    raw = {
        "model_type": "dbrx",
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    stored = [source.stored[0] for source in sources(config, "fused").values()]
    tensors = {tensor.name: ("BF16", tensor.shape) for tensor in stored}
    write_raw(folder / "model.safetensors", tensors, 2)
    return config
