"""Arguments of another kind: whatever is given to what the package exports, the answer is a result or one sentence."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dbrx_fn
from dbrx_fn import (
    AttnConfig,
    CheckpointError,
    Config,
    DbrxError,
    FFNConfig,
    Format,
    InputError,
    Quantization,
    Sampling,
)
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.ends import embed, head
from dbrx_fn.model.positions import positions_of
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.runtime.arguments import check_fields, checked
from dbrx_fn.runtime.device import as_if

CONFIG = Config(
    d_model=32,
    n_heads=2,
    n_layers=2,
    max_seq_len=64,
    vocab_size=260,
    ffn=FFNConfig(ffn_hidden_size=32, moe_num_experts=3, moe_top_k=2),
    dtype="float32",
)
PARAMS = dbrx_fn.init_params(CONFIG, mx.random.key(0))
QUANTIZED = dbrx_fn.quantize(PARAMS, CONFIG, Quantization(*[Format(4, 32)] * 4))
TOKENS = mx.array([[3, 1, 4]])

MLX_LM: Any = "mlx-lm"

GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    dbrx_fn.load: {"path_or_repo": "FOLDER", "revision": None, "dtype": "bfloat16", "lazy": True, "progress": None},
    dbrx_fn.load_tokenizer: {"path_or_repo": "FOLDER"},
    dbrx_fn.forward: {
        **{"params": PARAMS, "tokens": TOKENS, "cache": dbrx_fn.init_cache(CONFIG, 1, 8)},
        **{"lengths": [3], "last_only": True, "chunk_size": 2},
    },
    dbrx_fn.score: {"params": PARAMS, "tokens": TOKENS, "config": CONFIG, "jitter_key": None, "recompute": False},
    dbrx_fn.init_cache: {"config": CONFIG, "batch_size": 1, "capacity": 8},
    dbrx_fn.grow_cache: {"cache": dbrx_fn.init_cache(CONFIG, 1, 8), "length": 300},
    dbrx_fn.init_params: {"config": CONFIG, "key": mx.random.key(0)},
    dbrx_fn.check_params: {"params": PARAMS, "config": CONFIG},
    dbrx_fn.param_count: {"config": CONFIG, "active": True},
    dbrx_fn.quantize: {"params": PARAMS, "config": CONFIG, "quantization": Quantization(*[Format(4, 32)] * 4)},
    dbrx_fn.dequantize: {"params": QUANTIZED, "config": CONFIG},
    dbrx_fn.save: {
        **{"folder": "NEW", "params": PARAMS, "config": CONFIG, "layout": "split", "tokenizer_files": dbrx_fn.SMALL},
        **{"metadata": {"a": "b"}, "shard_bytes": 10**6},
    },
    AttnConfig: {"clip_qkv": 8.0, "kv_n_heads": 1, "rope_theta": 1e4},
    FFNConfig: {
        **{"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "moe_normalize_expert_weights": 2.0},
        **{"ffn_act_fn": "gelu", "moe_jitter_eps": 0.1, "moe_loss_weight": 0.0},
    },
    Config: {
        **{"d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 8, "vocab_size": 8, "attn": AttnConfig()},
        **{"ffn": FFNConfig(), "initializer_range": 0.1, "dtype": "float16"},
    },
    Format: {"bits": 4, "group_size": 64, "mode": "affine"},
    Quantization: {"experts": Format(4, 64), "attention": None, "embedding": None, "head": None, "router": None},
    Sampling: {
        **{"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
        **{"presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": ((3, 1.0),)},
    },
}
"""What each takes, by its parameters' names."""

ODD: list[Any] = [
    *(None, True, False, 0, 1, 3, -1, 2**31, 2**64, 10**400, -(10**400)),
    *(2.5, -0.0, math.nan, math.inf, -math.inf, 1e-320, 2j),
    *("", "x", "4", "float64", "fused", "\0", "\ud800", "a\nb", b"x", Path("x"), Path()),
    *([], [None], [[]], [1, 2], (), (1, 2), set(), range(3)),
    *({}, {"a": None}, {1: 2}, {"transformer": 3}, {"transformer": {}}),
    *({"transformer": {"wte": 1, "blocks": 2, "norm_f": 3}, "lm_head": 4}, {"a": {"b": [{"c": "d"}]}}),
    *(object(), object, len, lambda: None, type, Config, iter([])),
    *(mx.array(3), mx.zeros((2, 2)), mx.zeros((0, 3), mx.int32), mx.array([1, 2]), mx.array([True]), mx.random.key(0)),
    *(np.zeros((1, 3), np.int32), np.int64(3), np.float32(2.5), np.bool_(True), np.array(["x"])),
    *(CONFIG, AttnConfig(), FFNConfig(), Sampling(), Format(8, 64), Quantization(), InputError("x")),
    *(PARAMS, QUANTIZED, dbrx_fn.init_cache(CONFIG, 2, 8)),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, for what loads one."""
    path = tmp_path_factory.mktemp("checkpoint") / "dbrx"
    write_random_checkpoint(path, CONFIG, mx.random.key(0))
    return path


@pytest.fixture
def places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `FOLDER` and `NEW` stand for; the working directory is empty, for names without a folder."""
    monkeypatch.chdir(tmp_path)
    return {"FOLDER": folder, "NEW": tmp_path / "new" / "dbrx"}


def answered(function: Callable[..., Any], arguments: Mapping[str, Any], places: Mapping[str, Any]) -> str:
    """Calls it; the sentence of what it raises, or nothing."""
    filled = {
        name: places[value] if isinstance(value, str) and value in places else value
        for name, value in arguments.items()
    }
    try:
        function(**filled)
    except DbrxError as error:
        text = str(error)
        assert text.isprintable()
        assert text.endswith(".")
        assert len(text) < 5_000
        return text
    return ""


NAMES = [pytest.param(function, id=function.__qualname__) for function in GOOD]


@pytest.mark.parametrize("function", NAMES)
def test_what_is_right_is_taken(function: Callable[..., Any], places: dict[str, Any]) -> None:
    assert answered(function, GOOD[function], places) == ""


@pytest.mark.parametrize("function", NAMES)
def test_an_odd_argument_is_taken_or_refused_in_a_sentence(
    function: Callable[..., Any], places: dict[str, Any]
) -> None:
    refused = 0
    for name in GOOD[function]:
        for number, value in enumerate(ODD):
            fresh = places | {"NEW": places["NEW"].with_name(f"{name}-{number}")}
            refused += answered(function, GOOD[function] | {name: value}, fresh) != ""
    assert refused > 10 * len(GOOD[function])


@pytest.mark.parametrize("function", NAMES)
def test_arguments_in_another_order_are_refused_in_a_sentence(
    function: Callable[..., Any], places: dict[str, Any]
) -> None:
    names = list(GOOD[function])[:3]
    for number, order in enumerate(itertools.permutations(names)):
        swapped = dict(zip(names, (GOOD[function][name] for name in order), strict=True))
        fresh = places | {"NEW": places["NEW"].with_name(str(number))}
        answered(function, GOOD[function] | swapped, fresh)


@settings(max_examples=200)
@given(st.data())
def test_any_odd_arguments_together(data: st.DataObject) -> None:
    """But of those that look for files, which have a test of their own."""
    functions = [function for function in GOOD if function not in (dbrx_fn.load, dbrx_fn.load_tokenizer, dbrx_fn.save)]
    function = data.draw(st.sampled_from(functions))
    odd = data.draw(st.dictionaries(st.sampled_from(list(GOOD[function])), st.sampled_from(range(len(ODD)))))
    answered(function, GOOD[function] | {name: ODD[number] for name, number in odd.items()}, {})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dbrx_fn.save("x", PARAMS, CONFIG, layout=MLX_LM), "layout is 'mlx-lm' where it must be 'fused', 'spl"),
        (lambda: dbrx_fn.save("x", CONFIG, PARAMS), "params is a Config where it must be a dict."),  # type: ignore[arg-type]
        (lambda: dbrx_fn.score(PARAMS, TOKENS, PARAMS), "config is a dict where it must be a Config."),  # type: ignore[arg-type]
        (lambda: dbrx_fn.load(None), "path_or_repo is None where it must be a text or a Path."),  # type: ignore[arg-type]
        (lambda: dbrx_fn.load_tokenizer(None), "path_or_repo is None where it must be a text or a Path."),  # type: ignore[arg-type]
        (lambda: dbrx_fn.init_cache(CONFIG, "2"), "batch_size is '2' where it must be a whole number."),  # type: ignore[arg-type]
        (lambda: dbrx_fn.init_cache(CONFIG, True), "batch_size is True where it must be a whole number."),
        (lambda: dbrx_fn.init_params(CONFIG, mx.array(3)), "key is int32 [] where it must be uint32 [2]."),
        (lambda: dbrx_fn.param_count(CONFIG, active=1), "active is 1 where it must be True or False."),  # type: ignore[arg-type]
        (lambda: Quantization(experts=4), "experts is 4 where it must be a Format or None."),  # type: ignore[arg-type]
        (lambda: Format("4", 64), "bits is '4' where it must be a whole number."),  # type: ignore[arg-type]
        (lambda: Config(attn={}), "attn is a dict where it must be an AttnConfig."),  # type: ignore[arg-type]
        (lambda: AttnConfig(rope_theta=math.inf), "attn_config.rope_theta is inf where it must be a number."),
        (lambda: Config(d_model=2**40), "d_model is 1099511627776 where it must be below 2**31."),
    ],
)
def test_the_sentence_says_what_was_found_and_what_is_expected(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(DbrxError) as error:
        call()
    assert sentence in str(error.value)


def test_a_wrong_number_of_arguments_is_pythons_own_error() -> None:
    for call in (
        lambda: dbrx_fn.param_count(),  # type: ignore[call-arg]
        lambda: dbrx_fn.param_count(CONFIG, CONFIG),  # type: ignore[call-arg,arg-type]
        lambda: dbrx_fn.param_count(CONFIG, layers=3),  # type: ignore[call-arg]
        lambda: Config(layers=3),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="argument"):
            call()


def test_numbers_of_numpy_become_pythons() -> None:
    two: Any = np.float32(2)
    wide: Any = np.int64(64)
    config = Config(d_model=wide, initializer_range=1, attn=AttnConfig(clip_qkv=two, rope_theta=500_000))
    found = (config.d_model, config.initializer_range, config.attn.clip_qkv, config.attn.rope_theta)
    assert found == (64, 1, 2, 500_000)
    assert [type(value) for value in found] == [int, float, float, float]


# Trees

NUMBERED = next(number for number, value in enumerate(ODD) if isinstance(value, dict) and 1 in value)
"""The odd value that is a dict without names."""


def damaged(tree: Any, places: list[int], value: Any) -> Any:
    """A tree with what is found on the way that the numbers choose replaced."""
    if not places or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[places[0] % len(keys)]
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    changed[key] = damaged(tree[key], places[1:], value)
    return changed


@settings(max_examples=150)
@given(
    places=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    value=st.sampled_from(range(len(ODD))),
    quantized=st.booleans(),
)
@example(places=[45], value=NUMBERED, quantized=False)
@example(places=[0, 0], value=NUMBERED, quantized=False)
@example(places=[0, 1, 0], value=NUMBERED, quantized=True)
@example(places=[0, 2], value=NUMBERED, quantized=False)
def test_a_tree_with_something_odd_in_it_is_refused(places: list[int], value: int, quantized: bool) -> None:
    params = damaged(QUANTIZED if quantized else PARAMS, places, ODD[value])
    for function, arguments in (
        (dbrx_fn.forward, (TOKENS, dbrx_fn.init_cache(CONFIG, 1, 8))),
        (dbrx_fn.score, (TOKENS, CONFIG)),
        (dbrx_fn.dequantize, (CONFIG,)),
        (dbrx_fn.check_params, (CONFIG,)),
    ):
        call: Callable[..., Any] = function
        with pytest.raises(CheckpointError, match=r"^The parameters don't fit the config: .*\.$"):
            call(params, *arguments)


STREAM = mx.zeros((1, 3, CONFIG.d_model))
POSITIONS = positions_of(3, (3,), None, CONFIG.layer, whole_cache=False)
TRANSFORMER = PARAMS["transformer"]
PARTS: dict[str, Callable[[Any], object]] = {
    "transformer.wte": lambda part: embed(part, TOKENS, None, config=CONFIG.layer),
    "transformer.norm_f": lambda part: head(part, PARAMS["lm_head"], STREAM, config=CONFIG.layer),
    "transformer.blocks.0": lambda part: block(part, STREAM, None, POSITIONS, config=CONFIG.layer),
    "lm_head": lambda part: head(TRANSFORMER["norm_f"], part, STREAM, config=CONFIG.layer),
}
"""What computes with each part of a tree."""


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("path", PARTS)
def test_an_odd_part_is_refused_in_a_sentence_however_it_runs(path: str, compiles: bool) -> None:
    for value in ODD:
        for part in ({1: value}, {"weight": value}, {"a": [value]}):
            with (
                as_if(compiles=compiles),
                pytest.raises(CheckpointError, match=rf"^The parameters don't fit the config: .*{path}\..*\.$"),
            ):
                PARTS[path](part)


@pytest.mark.parametrize("blocks", [tuple, lambda blocks: dict(enumerate(blocks))])
def test_blocks_that_are_no_list(blocks: Callable[[list[Any]], Any]) -> None:
    params = PARAMS | {"transformer": PARAMS["transformer"] | {"blocks": blocks(PARAMS["transformer"]["blocks"])}}
    try:
        dbrx_fn.forward(params, TOKENS, dbrx_fn.init_cache(CONFIG, 1, 8))
    except CheckpointError as error:
        assert "one for each layer" in str(error)  # noqa: PT017


# The mechanism


def test_a_checked_function_is_called_as_it_was_declared() -> None:
    @checked
    def declared(number: int, *, words: Mapping[str, str] | None = None, anything: Any = None) -> tuple[Any, ...]:
        """Its own text."""
        return number, words, anything

    assert declared.__doc__ == "Its own text."
    assert declared(3, words={}, anything="x") == (3, {}, "x")
    assert declared(number=3, anything=True) == (3, None, True)
    with pytest.raises(InputError, match=r"words is a list where it must be a Mapping or None\."):
        declared(3, words=[])  # type: ignore[arg-type]


def test_fields_keep_their_error_and_prefix() -> None:
    form = object.__new__(Format)
    object.__setattr__(form, "bits", "x")
    with pytest.raises(CheckpointError, match=r"^my\.bits is 'x' where"):
        check_fields(form, CheckpointError, prefix="my.")
