"""A tree is one value: whatever it was read from, the same numbers give the same bits, and resuming is no event."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.runs.plan import Plan
from dbrx_fn.training.step import Recipe, State, init_state, train_step
from tests.support import checkpoints, layouts_written
from tests.support.trees import tree

STEPS = 20
WIDTHS = [32, 96, 256, 512]
DENSE: dict[str, Callable[..., None]] = {
    "fused": checkpoints.write_fused,
    "split": checkpoints.write_split,
    "stacked": layouts_written.write_stacked,
    "converted": layouts_written.write_converted,
    "nxd": layouts_written.write_nxd,
    "nxd_inference": lambda *args, **options: layouts_written.write_nxd(*args, **options, form="inference"),
}


def raw_config(width: int, **ffn: Any) -> dict[str, Any]:
    return checkpoints.QUANTIZABLE | {
        "d_model": width,
        "n_layers": 2 if width < 256 else 1,
        "ffn_config": {
            "ffn_hidden_size": min(width, 96),
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_jitter_eps": 0.01,
            **ffn,
        },
    }


def random_tokens(rng: np.random.Generator, config: Config, rows: int = 2, time: int = 24) -> mx.array:
    return mx.array(rng.integers(config.vocab_size, size=(rows, time)), mx.int32)


def leaves_of(value: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(value))


def bits(value: Any) -> dict[str, bytes]:
    """Every array of a tree by a hash of its bytes, which tell NaNs and zeros of two signs apart."""
    leaves = ((path, mx.contiguous(leaf).reshape(-1).view(mx.uint8)) for path, leaf in leaves_of(value))
    return {path: hashlib.blake2b(np.array(leaf).tobytes()).digest() for path, leaf in leaves}


def lies_row_by_row(leaf: mx.array) -> bool:
    mx.eval(leaf)
    return bool(np.array(leaf.view(mx.uint16) if leaf.dtype == mx.bfloat16 else leaf, copy=False).flags.c_contiguous)


def assert_canonical(value: Any) -> None:
    assert [path for path, leaf in leaves_of(value) if not lies_row_by_row(leaf)] == []


def logits_of(params: Params, config: Config, tokens: mx.array) -> list[mx.array]:
    """Of a whole prompt, and of one in chunks and token by token."""
    whole, _ = forward(params, tokens, init_cache(config, tokens.shape[0], 0))
    first, cache = forward(params, tokens[:, :-2], init_cache(config, tokens.shape[0], 64), chunk_size=9)
    second, cache = forward(params, tokens[:, -2:-1], cache)
    third, _ = forward(params, tokens[:, -1:], cache)
    return [whole, first, second, third]


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"steps": STEPS, "warmup": 3, "learning_rate": 3e-3, "z_loss_weight": 1e-3} | options)


def training(params: Params, config: Config, how: Recipe, seed: int = 0) -> list[State]:
    """The state before the first step and after each."""
    rng = np.random.default_rng(seed)
    states = [init_state(params, how, mx.random.key(seed))]
    for _ in range(how.steps):
        states.append(train_step(states[-1], random_tokens(rng, config), None, config=config, recipe=how)[0])
        mx.eval(states[-1])
    return states


def written(folder: Path, raw: Mapping[str, Any], seed: int, dtype: Dtype) -> dict[str, Path]:
    """The same numbers in each dense layout."""
    tensors = checkpoints.random_tensors(raw, np.random.default_rng(seed))
    for layout, write in DENSE.items():
        write(folder / layout, raw, tensors, dtype=dtype)
    return {layout: folder / layout for layout in DENSE}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_layout_of_a_checkpoint_gives_the_same_leaves_and_logits(
    width: int, dtype: Dtype, lazy: bool, tmp_path: Path
) -> None:
    expected: tuple[Any, Any] | None = None
    for folder in written(tmp_path, raw_config(width), width, dtype).values():
        params, config = load(folder, lazy=lazy)
        tokens = random_tokens(np.random.default_rng(width), config)
        logits = logits_of(params, config, tokens)
        assert_canonical(params)
        found = bits(params), bits(logits)
        expected = expected or found
        assert found == expected, folder.name


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_random_shape_gives_the_same_logits_in_every_layout(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = checkpoints.random_config(np.random.default_rng(seed))
    folders = written(tmp_path_factory.mktemp("shapes"), raw, seed, "float32")
    found = []
    for folder in folders.values():
        params, config = load(folder)
        found.append(bits(logits_of(params, config, random_tokens(np.random.default_rng(seed), config))))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "form", [Format(4, 32), Format(8, 64), Format(6, 32), Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8")], ids=str
)
def test_every_layout_of_a_quantized_checkpoint_gives_the_same_leaves_logits_and_text(
    form: Format, dtype: Dtype, tmp_path: Path
) -> None:
    raw = raw_config(128, ffn_hidden_size=192)
    config = replace(config_from_dict(raw), dtype=dtype)
    dense = tree(config, checkpoints.random_tensors(raw, np.random.default_rng(3)))
    params = quantize(dense, config, Quantization(form, form, form, form, form))
    tokens = random_tokens(np.random.default_rng(4), config)
    assert_canonical(params)
    assert_canonical(dequantize(params, config))
    expected = bits(params), bits(logits_of(params, config, tokens))
    prompt = np.array(tokens[0]).tolist()
    text = list(stream_tokens(params, config, prompt, max_tokens=STEPS))
    for layout in ("split", "stacked"):
        save(tmp_path / layout, params, config, layout=layout)
        again, _ = load(tmp_path / layout)
        assert_canonical(again)
        assert (bits(again), bits(logits_of(again, config, tokens))) == expected, layout
        assert list(stream_tokens(again, config, prompt, max_tokens=STEPS)) == text
        assert bits(dequantize(again, config)) == bits(dequantize(params, config))


@pytest.mark.parametrize(("width", "dtype"), [(32, "float32"), (128, "bfloat16"), (512, "float32")])
def test_every_layout_of_a_checkpoint_is_trained_to_the_same_bits(width: int, dtype: Dtype, tmp_path: Path) -> None:
    how = recipe(dtype=dtype)
    folders = written(tmp_path, raw_config(width), width, dtype)
    expected: list[dict[str, bytes]] | None = None
    for layout in ("fused", "split", "stacked"):
        params, config = load(folders[layout])
        states = training(params, config, how)
        assert_canonical(states)
        found = [bits(state) for state in states]
        expected = expected or found
        assert found == expected, layout


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ("fused", {}),
        ("split", {"micro_batches": 2}),
        ("fused", {"dtype": "bfloat16"}),
        ("stacked", {"dtype": "bfloat16", "recompute": True}),
    ],
    ids=["fused", "split-micro-batches", "bfloat16", "bfloat16-recomputed"],
)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_that_is_resumed_after_each_step_is_the_one_that_never_stopped(
    width: int, stored: str, options: dict[str, Any], tmp_path: Path
) -> None:
    how = recipe(**options)
    params, config = load(written(tmp_path, raw_config(width), width, how.dtype)[stored])
    config = replace(config, dtype="float32")
    undisturbed = training(params, config, how)

    run, rng = RunFolder(tmp_path / "run"), np.random.default_rng(0)
    run.tokenizer.mkdir(parents=True)
    plan = Plan(config, how, 4, 8, seed=0, model=None, log_every=1, eval_every=1, save_every=1, keep=1)
    fresh = init_state(params, how, mx.random.key(0))
    state = fresh
    for step, expected in enumerate(undisturbed[1:], start=1):
        state, _ = train_step(state, random_tokens(rng, config), None, config=config, recipe=how)
        run.save(state, step, plan, data={})
        state, found, _ = run.load(fresh, plan, data={})
        assert found == step
        assert_canonical(state)
        assert bits(state) == bits(expected), step


def test_a_tree_built_from_views_is_trained_as_any_other() -> None:
    raw = raw_config(128)
    config = config_from_dict(raw)
    params = tree(config, checkpoints.random_tensors(raw, np.random.default_rng(5)))
    views = tree_map(lambda leaf: mx.contiguous(leaf.T).T, params)
    assert not all(lies_row_by_row(leaf) for _, leaf in leaves_of(views))
    how = recipe(steps=3)
    assert bits(training(views, config, how)) == bits(training(params, config, how))
