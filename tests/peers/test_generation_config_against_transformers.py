"""generation_config.json as transformers follows it: the same tokens greedily, the same logits to draw from, and a
warning of whatever would change the text there and can't here."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import DbrxForCausalLM, GenerationConfig

from dbrx_fn.generation.generation_config import read_generation_config
from dbrx_fn.generation.sampling import History, init_history, sample
from dbrx_fn.generation.stream import stream_tokens
from tests.peers.reference import transformers_model
from tests.support import trees

RAW: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "vocab_size": 80,
    "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}
CASE = trees.case_of(RAW, np.random.default_rng(2))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 11, 12, 13]
LENGTH = 24

# Each alone and with do_sample; what acts only together with something else comes with it.
FILES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.7, "top_k": 5},
    {"top_k": 7},
    {"top_k": 0},
    {"top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.2},
    {"renormalize_logits": True, "early_stopping": True, "length_penalty": 3.0, "use_cache": True},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": list(range(40))},
    {"begin_suppress_tokens": list(range(40))},
    {"bad_words_ids": [[token] for token in range(40)]},
    {"sequence_bias": [[[token], -50.0] for token in range(40)]},
    {"encoder_repetition_penalty": 3.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"exponential_decay_length_penalty": [3, 2.0], "eos_token_id": 20},
    {"min_new_tokens": 30, "eos_token_id": list(range(40))},
    {"typical_p": 0.3},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05},
    {"top_h": 0.3},
]


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return transformers_model(RAW, CASE.tensors)


def theirs(model: DbrxForCausalLM, folder: Path) -> tuple[list[int], list[Any]]:
    """What transformers makes with the folder's file, and the logits that it chose each token from."""
    model.generation_config = GenerationConfig.from_pretrained(folder)
    prompt = torch.tensor([PROMPT])
    torch.manual_seed(0)
    out: Any = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LENGTH,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(PROMPT) :].tolist(), [scores[0].numpy() for scores in out.scores]


def until_stop(tokens: list[int], stops: frozenset[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: last + 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", FILES, ids=lambda content: ",".join(content) or "nothing")
def test_greedy_tokens_are_theirs_or_it_is_said_why_not(
    content: dict[str, Any], model: DbrxForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    expected, _ = theirs(model, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = read_generation_config(tmp_path)
    stops = content.get("eos_token_id", [])
    stop_tokens = frozenset([stops] if isinstance(stops, int) else stops)
    made = stream_tokens(
        CASE.params, CASE.config, PROMPT, max_tokens=LENGTH, sampling=ours.sampling, stop_tokens=stop_tokens
    )
    # Equal tokens and a warning can both be, where the setting happens to change nothing in this text.
    assert list(made) == until_stop(expected, stop_tokens) or said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", FILES, ids=lambda content: ",".join(content) or "nothing")
def test_draws_are_from_their_logits_or_it_is_said_why_not(
    content: dict[str, Any], model: DbrxForCausalLM, tmp_path: Path
) -> None:
    """Their first token's logits, filtered; ours must draw each token that is left, and no other."""
    (tmp_path / "generation_config.json").write_text(json.dumps(content | {"do_sample": True}))
    _, scores = theirs(model, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sampling = read_generation_config(tmp_path).sampling
    if said:
        return
    draws = 10_000
    prompt = torch.tensor([PROMPT])
    logits = mx.broadcast_to(mx.array(model(prompt).logits[0, -1].detach().numpy()), (draws, RAW["vocab_size"]))
    history = init_history([PROMPT], RAW["vocab_size"]) if sampling.uses_history else None
    if history is not None:
        history = History(
            prompted=mx.broadcast_to(history["prompted"], logits.shape),
            made=mx.broadcast_to(history["made"], logits.shape),
        )
    tokens, _, _ = sample(logits, mx.random.key(0), history, sampling=sampling)
    frequencies = np.bincount(np.array(tokens), minlength=RAW["vocab_size"]) / draws
    probabilities = torch.tensor(scores[0]).double().softmax(-1).numpy()
    deviations = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= 5 * deviations + 1e-12).all()
