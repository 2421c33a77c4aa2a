"""The exact mode: the same bits whoever else is served, in any order of arrival, with a cached prefix or without."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dbrx_fn import SMALL, load, load_tokenizer
from dbrx_fn.errors import InputError
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.structured import Structure, TokenTrie
from dbrx_fn.ops.kernels.cpu.library import has_kernels
from dbrx_fn.runtime.device import as_if
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.request import PromptRead, Request
from tests.support.engine_requests import (
    CONFIG,
    EXACT,
    FAST,
    PARAMS,
    Events,
    made,
    requests,
    served,
    tokens,
    without_prompts,
)


def test_exact_answers_are_the_same_bits_under_any_load() -> None:
    asked = requests(24)
    alone = [served(EXACT, [request], [0])[0] for request in asked]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(asked)).tolist()
        assert served(EXACT, asked, order) == alone


def test_exact_answers_are_the_same_bits_with_a_cached_prefix() -> None:
    long = tokens(5, 700)
    asked = [
        replace(request, prompt=long[: 300 + 17 * n] + request.prompt[:9]) for n, request in enumerate(requests(9))
    ]
    expected = served(EXACT, asked, list(range(9)))
    events = Events(9)
    with Engine(PARAMS, CONFIG, EXACT, prefixes=PrefixStore(CONFIG, "", chunk=EXACT.chunk)) as engine:
        for number, request in enumerate(asked):
            engine.submit(request, events.receiver(number))
            events.wait(1)
        said = engine.statistics()
    assert without_prompts(events.of) == without_prompts(expected)
    assert [event.cached_tokens for (event, *_) in events.of if isinstance(event, PromptRead)] == [
        0,
        *[256] * 5,
        *[384] * 3,
    ]
    assert said.cached_tokens == 5 * 256 + 3 * 384


def test_exact_answers_are_the_same_bits_behind_prefixes_on_disk(tmp_path: Path) -> None:
    """A second engine has them from the first one's folder, while it decodes for others."""
    long = tokens(5, 700)
    asked = [replace(request, prompt=long[:400] + request.prompt[:9]) for request in requests(4)]
    other = replace(requests(1)[0], max_tokens=60)
    expected = served(EXACT, [*asked, other], list(range(5)))

    def kept() -> PrefixStore:
        return PrefixStore(CONFIG, "", chunk=EXACT.chunk, memory=2**18, folder=tmp_path / "kept")

    served(EXACT, asked[:1], [0], kept())
    store = kept()
    again = served(EXACT, [*asked, other], [4, 0, 1, 2, 3], store)
    assert without_prompts(again) == without_prompts(expected)
    assert [event.cached_tokens for (event, *_) in again if isinstance(event, PromptRead)] == [384] * 4 + [0]
    assert store.statistics().hits == 4


def test_a_text_keeps_to_its_structure_beside_others_that_have_none() -> None:
    params, config = load(SMALL)
    tokenizer = load_tokenizer(SMALL)
    prompt = tuple(tokenizer.encode("The answer: "))
    structures = [Structure.regex("[0-9]{3}-[a-f]{2}"), None, Structure.choice(["yes", "no", "perhaps"]), None]
    asked = [
        Request(
            prompt,
            max_tokens=40,
            structure=structure,
            seed=number,
            sampling=Sampling(temperature=1.0 if number > 1 else 0.0),
            stop_tokens=frozenset(tokenizer.stop_tokens),
        )
        for number, structure in enumerate(structures)
    ]
    texts: list[str] = []
    for together in (False, True):
        events = Events(4)
        with Engine(
            params, config, replace(FAST, exact=True, capacity=256), trie=TokenTrie(tokenizer, config.vocab_size)
        ) as engine:
            for number, request in enumerate(asked):
                engine.submit(request, events.receiver(number))
                if not together:
                    events.wait(1)
            if together:
                events.wait(4)
        texts += [tokenizer.decode(made(got)) for got in events.of]
    assert texts[:4] == texts[4:]
    stop = tokenizer.decode(sorted(tokenizer.stop_tokens)[:1])
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", texts[0].removesuffix(stop))
    assert texts[2].removesuffix(stop) in ("yes", "no", "perhaps")


def test_more_rows_than_a_cpu_computes_alike_are_refused() -> None:
    with as_if(kernels=False), pytest.raises(InputError, match="at most 8 texts at once on this CPU"):
        Engine(PARAMS, CONFIG, replace(EXACT, rows=9))
    with pytest.raises(InputError, match=r"at most (8|64) texts at once on this CPU"):
        Engine(PARAMS, CONFIG, replace(EXACT, rows=65))


@pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")
def test_the_cpu_s_kernels_compute_many_rows_alike() -> None:
    limits, asked = replace(EXACT, rows=24), requests(24)
    alone = [served(limits, [request], [0])[0] for request in asked[:6]]
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    assert served(limits, asked, order)[:6] == alone
