"""What compiled layers compute is what called ones compute; collected where the environment has layers compiled.

That is so on a GPU and with DBRX_FN_COMPILE=1, in `nox -s compiled`, which runs tests of other folders compiled too.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.transformer import forward
from dbrx_fn.runtime.device import Backend, as_if
from dbrx_fn.training.step import Recipe, init_state, train_step
from tests.support.trees import as_float64, random_case, relative_error

Measured = Callable[[str, float], float]


def test_layers_are_compiled_here(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    case, _ = random_case(0)
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        logits, _ = forward(case.params, mx.array([[3, 1, 4]]), init_cache(case.config, 1, 8))
    assert "tracing block" in caplog.messages
    assert not any(message.startswith("checking") for message in caplog.messages)
    # MLX names a fused operation by its parts: CompiledBroadcastDivideBroadcastSubtract.
    mx.export_to_dot(str(tmp_path / "graph.dot"), logits)
    assert 'label ="Compiled' in (tmp_path / "graph.dot").read_text()


@pytest.mark.parametrize("machine", ["metal", "cuda"])
def test_other_machines_arrangements_compiled(machine: Backend, measured: Measured) -> None:
    case, rng = random_case(2)
    tokens = rng.integers(case.config.vocab_size, size=40)
    expected = case.expected(tokens)
    row = mx.array(tokens[None])
    with as_if(backend=machine):
        whole, _ = forward(case.params, row, init_cache(case.config, 1, 0))
        prompt, cache = forward(case.params, row[:, :30], init_cache(case.config, 1, 300))
        one, cache = forward(case.params, row[:, 30:31], cache)
        rest, _ = forward(case.params, row[:, 31:], cache)
        in_parts = mx.concatenate([prompt, one, rest], axis=1)
        for logits in (whole, in_parts):
            error = relative_error(logits[0], expected)
            assert measured(f"float32 to the oracle, compiled as for {machine}", error) <= 5e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_step_of_training_is_the_called_one(recompute: bool, measured: Measured) -> None:
    """Two steps, with jitter; a parameter is compared as it moved."""
    case, rng = random_case(1, moe_jitter_eps=0.1)
    recipe = Recipe(steps=5, warmup=0, eps=1e-3, micro_batches=2, recompute=recompute, z_loss_weight=0.01)
    batches = [rng.integers(case.config.vocab_size, size=(4, 12)).astype(np.int32) for _ in range(2)]

    def run() -> tuple[dict[str, mx.array], list[float]]:
        state, losses = init_state(case.params, recipe, mx.random.key(0)), []
        for batch in batches:
            state, seen = train_step(state, mx.array(batch), None, config=case.config, recipe=recipe)
            losses.append(float(seen.loss))
        return dict(tree_flatten(state["params"])), losses

    made, losses = run()
    with as_if(compiles=False):
        expected, losses_expected = run()
    start = dict(tree_flatten(case.params))
    assert relative_error(losses, losses_expected) <= 1e-6
    for path, leaf in expected.items():
        moved, moved_expected = (as_float64(of) - as_float64(start[path]) for of in (made[path], leaf))
        assert measured("a compiled step of training to the called one", relative_error(moved, moved_expected)) <= 1e-5


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01)])
def test_compiled_layers_choose_the_same_tokens(sampling: Sampling) -> None:
    case, rng = random_case(4)
    prompt = rng.integers(case.config.vocab_size, size=10).tolist()

    def made() -> list[int]:
        key = mx.random.key(3)
        return list(stream_tokens(case.params, case.config, prompt, max_tokens=40, sampling=sampling, key=key))

    compiled = made()
    with as_if(compiles=False):
        assert made() == compiled
