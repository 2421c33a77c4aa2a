"""The chain of filters against transformers' own: its `generate` says which logits it draws from."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DbrxForCausalLM

from dbrx_fn.generation.sampling import (
    Sampling,
    apply_min_p,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    init_history,
    sample,
)
from tests.peers.reference import transformers_model
from tests.support import checkpoints

RAW: dict[str, Any] = {
    "model_type": "dbrx",
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "max_seq_len": 64,
    "vocab_size": 40,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 1},
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 11, 12, 13]
CHAINS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.8},
    # Those that databricks/dbrx's generate.py draws with.
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.01},
]


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return transformers_model(RAW, checkpoints.random_tensors(RAW, np.random.default_rng(0)))


def theirs(model: DbrxForCausalLM, chain: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The model's logits after the prompt, and what transformers makes of them before it draws; `[1 vocab]` both."""
    generate: Any = model.generate
    prompt = torch.tensor([PROMPT])
    # transformers keeps 50 tokens unless told otherwise.
    options = {"top_k": 0, **chain}
    out = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=1,
        pad_token_id=0,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.logits[0].numpy(), out.scores[0].numpy()


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_same_tokens_are_left_with_the_same_logits(model: DbrxForCausalLM, chain: dict[str, Any]) -> None:
    raw, expected = theirs(model, chain)
    logits = mx.array(raw)
    if "repetition_penalty" in chain:
        seen = init_history([PROMPT], 40)["prompted"]
        logits = apply_repetition_penalty(logits, seen, mx.array(chain["repetition_penalty"]))
    logits = logits / chain["temperature"]
    if "top_k" in chain and chain["top_k"] < 40:
        logits = apply_top_k(logits, k=chain["top_k"])
    if "top_p" in chain:
        logits = apply_top_p(logits, mx.array(chain["top_p"]))
    if "min_p" in chain:
        logits = apply_min_p(logits, mx.array(chain["min_p"]))
    actual = np.array(logits)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_draws_have_their_probabilities(model: DbrxForCausalLM, chain: dict[str, Any]) -> None:
    """What `sample` itself composes, seen from outside: 20000 draws, each token within five standard deviations."""
    raw, expected = theirs(model, chain)
    draws = 20_000
    rows = mx.broadcast_to(mx.array(raw), (draws, 40))
    sampling = Sampling(**chain)
    history = init_history([PROMPT], 40) if sampling.uses_history else None
    if history is not None:
        history = {
            "prompted": mx.broadcast_to(history["prompted"], (draws, 40)),
            "made": mx.broadcast_to(history["made"], (draws, 40)),
        }
    tokens, _, _ = sample(rows, mx.random.key(0), history, sampling=sampling)
    frequencies = np.bincount(np.array(tokens), minlength=40) / draws
    probabilities = torch.tensor(expected[0]).double().softmax(-1).numpy()
    deviations = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= 5 * deviations).all()
