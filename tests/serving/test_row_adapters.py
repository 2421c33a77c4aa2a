"""An engine with several adapters: each request is answered by its own, whoever else is in the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.errors import InputError
from dbrx_fn.model.params import init_params
from dbrx_fn.model.stacked_adapters import stack_adapters
from dbrx_fn.ops.kernels.cpu.library import has_kernels
from dbrx_fn.runtime.device import Backend, as_if
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.fingerprint import fingerprint
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.request import Event, PromptRead, Request, TokenMade
from dbrx_fn.serving.row_adapters import RowAdapters
from tests.support.adapters import with_random_adapters, without_first_layer
from tests.support.engine_requests import (
    CONFIG,
    EXACT,
    FAST,
    PARAMS,
    Events,
    made,
    requests,
    tokens,
    warmed_up,
    without_prompts,
)

HAMLET = with_random_adapters(PARAMS, CONFIG, ("attention", "experts"), rank=4, seed=1)
LEAR = with_random_adapters(PARAMS, CONFIG, ("experts", "router", "head", "embedding"), rank=3, seed=2)
MACBETH = without_first_layer(with_random_adapters(PARAMS, CONFIG, ("attention",), rank=2, seed=3), CONFIG)
TREES = {"hamlet": HAMLET, "lear": LEAR, "macbeth": MACBETH}
NAMES = [None, *TREES]
STACK = stack_adapters(PARAMS, CONFIG, list(TREES.values()))
mx.eval(STACK)


def mixed(count: int) -> list[Request]:
    return [replace(request, adapter=NAMES[n % 4]) for n, request in enumerate(requests(count))]


def served(
    limits: Limits, asked: list[Request], order: list[int], prefixes: PrefixStore | None = None
) -> list[list[Event]]:
    """What each of `asked` gets, if they come in this order, all at once."""
    events = Events(len(asked))
    with Engine(STACK, CONFIG, limits, prefixes=prefixes, adapters=list(TREES)) as engine:
        for number in order:
            engine.submit(asked[number], events.receiver(number))
        events.wait(len(asked))
    return events.of


def test_each_answer_is_that_of_a_model_with_this_adapter_alone() -> None:
    asked = [
        Request(tokens(n, (9, 60, 200)[n % 3]), max_tokens=16, top_logprobs=2, adapter=NAMES[n % 4]) for n in range(12)
    ]
    found = served(FAST, asked, list(range(12)))
    for name in NAMES:
        own = [n for n, request in enumerate(asked) if request.adapter == name]
        with Engine(PARAMS if name is None else TREES[name], CONFIG, FAST) as engine:
            for n in own:
                expected = list(engine.answer(replace(asked[n], adapter=None)))
                assert made(found[n]) == [event.token for event in expected]
                told = [event for event in found[n] if isinstance(event, TokenMade)]
                for one, other in zip(told, expected, strict=True):
                    assert one.logprobs is not None
                    assert other.logprobs is not None
                    assert one.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=2e-5)
    same_prompt = [Request(tokens(0, 40), max_tokens=16, adapter=name) for name in NAMES]
    assert len({tuple(made(events)) for events in served(FAST, same_prompt, [0, 1, 2, 3])}) == 4


def test_exact_answers_are_the_same_bits_in_any_mix() -> None:
    asked = mixed(16)
    alone = [served(EXACT, [request], [0])[0] for request in asked]
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(asked)).tolist()
        assert served(EXACT, asked, order) == alone
    # Beside others of its own kind only.
    alike = [replace(asked[5], seed=seed) for seed in range(8)]
    assert served(EXACT, [asked[5], *alike[:7]], list(range(8)))[0] == alone[5]


@pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")
def test_the_cpu_s_kernel_computes_many_rows_alike() -> None:
    limits, asked = replace(EXACT, rows=24), mixed(24)
    alone = [served(limits, [request], [0])[0] for request in asked[:4]]
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    assert served(limits, asked, order)[:4] == alone


def test_an_adapter_s_prefix_is_never_found_by_another(tmp_path: Path) -> None:
    long = tokens(5, 300)
    asked = [Request(long + tokens(n, 5), max_tokens=4, top_logprobs=0, adapter=NAMES[n % 4]) for n in range(8)]
    expected = [without_prompts(served(EXACT, [request], [0]))[0] for request in asked]

    def kept() -> PrefixStore:
        mark = fingerprint(STACK, CONFIG, EXACT, "1")
        return PrefixStore(CONFIG, mark, chunk=EXACT.chunk, folder=tmp_path / "kept")

    for cached in ([0] * 4 + [256] * 4, [256] * 8):
        events = Events(8)
        with Engine(STACK, CONFIG, EXACT, prefixes=kept(), adapters=list(TREES)) as engine:
            for number, request in enumerate(asked):
                engine.submit(request, events.receiver(number))
                events.wait(1)
        told = [event.cached_tokens for (event, *_) in events.of if isinstance(event, PromptRead)]
        assert told == cached
        assert without_prompts(events.of) == expected


def test_a_second_turn_is_behind_its_own_adapter_s_answer_only() -> None:
    first = Request(tokens(6, 200), max_tokens=100, adapter="lear")
    store = PrefixStore(CONFIG, "", chunk=FAST.chunk)
    with Engine(STACK, CONFIG, FAST, prefixes=store, adapters=list(TREES)) as engine:
        answer = [event.token for event in engine.answer(first)]
        second = Request((*first.prompt, *answer, *tokens(7, 30)), max_tokens=5)
        for name, cached in (("hamlet", 0), (None, 0), ("lear", 256)):
            before = engine.statistics().cached_tokens
            list(engine.answer(replace(second, adapter=name)))
            assert engine.statistics().cached_tokens - before == cached


@pytest.mark.parametrize(("machine", "limits"), [("metal", FAST), ("cuda", EXACT)])
def test_nothing_is_traced_after_the_warm_up_when_the_mix_changes(
    machine: Backend, limits: Limits, caplog: pytest.LogCaptureFixture
) -> None:
    """Where layers aren't compiled, each signature is checked as a GPU would trace it."""
    limits = replace(limits, rows=4, capacity=512, positions=8192)
    config = replace(CONFIG, ffn=replace(CONFIG.ffn, moe_loss_weight=0.27 + limits.exact + 2 * (machine == "cuda")))
    with as_if(backend=machine), warmed_up(STACK, config, limits, adapters=list(TREES)) as engine:
        events = Events(30)
        with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
            for number, request in enumerate(mixed(30)):
                engine.submit(replace(request, prompt=request.prompt[:400]), events.receiver(number))
            events.wait(30)
    assert {record.getMessage() for record in caplog.records} <= {"checking pick_last"}


def test_layers_of_several_kinds_need_no_trace_after_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    """As mlx-lm's num_layers makes them: here the last two of three layers have adapters."""
    config = replace(CONFIG, n_layers=3, max_seq_len=555)
    whole = with_random_adapters(init_params(config, mx.random.key(0)), config, ("experts",))
    tree = without_first_layer(whole, config)
    limits = replace(EXACT, rows=2, capacity=256)
    with (
        as_if(backend="metal"),
        warmed_up(tree, config, limits) as engine,
        caplog.at_level("DEBUG", logger="dbrx_fn.compile"),
    ):
        list(engine.answer(Request(tokens(0, 200), max_tokens=3)))
    assert {record.getMessage() for record in caplog.records} <= {"checking pick_last"}


def test_an_engine_without_adapters_gives_every_batch_the_tree_as_it_is() -> None:
    assert RowAdapters(PARAMS, ()).tree([Request((1,)), None]) is PARAMS
    assert RowAdapters(HAMLET, ()).tree([Request((1,)), None]) is HAMLET


def test_what_cannot_be_served_is_refused_in_one_sentence() -> None:
    for tree, names, asked, said in (
        (STACK, list(TREES), "othello", "adapter is 'othello' where the engine has 'hamlet', 'lear', 'macbeth'"),
        (PARAMS, [], "hamlet", "adapter is 'hamlet' where the engine has none"),
    ):
        with Engine(tree, CONFIG, FAST, adapters=names) as engine, pytest.raises(InputError, match=said):
            engine.submit(Request((1,), adapter=asked), lambda _: None)
    with pytest.raises(InputError, match="adapters has 'lear' twice"):
        Engine(STACK, CONFIG, FAST, adapters=["hamlet", "lear", "lear"])
    for tree, names in ((STACK, ["hamlet"]), (PARAMS, ["hamlet"]), (HAMLET, ["hamlet"]), (STACK, [])):
        with pytest.raises(InputError, match=rf"adapters has {len(names)} names and the tree (0|3) adapters"):
            Engine(tree, CONFIG, FAST, adapters=names)


@pytest.mark.parametrize("names", ["abc", ["hamlet", "lear", 3]], ids=str)
def test_names_that_are_no_list_of_texts_are_refused(names: Any) -> None:
    with pytest.raises(InputError, match=r"^adapters is .* where a list of names is expected\.$"):
        Engine(STACK, CONFIG, FAST, adapters=names)
