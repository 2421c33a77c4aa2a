"""The model that ships with the package: DBRX in full, small, and better than noise at what it was trained for."""

import json
import lzma
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import dbrx_fn
from dbrx_fn.generate import main
from dbrx_fn.model.transformer import score
from dbrx_fn.training.losses import bits_per_byte
from dbrx_fn.training.target_nats import token_nats

# The beginning of Macbeth's fifth scene of act V, a play that the model was not trained on.
SCENE = """### SCENE V. Dunsinane. Within the castle.

_Enter MACBETH, SEYTON, and Soldiers, with drum and colours_

**MACBETH**  
Hang out our banners on the outward walls;  
The cry is still 'They come:' our castle's strength  
Will laugh a siege to scorn: here let them lie  
Till famine and the ague eat them up:  
Were they not forced with those that should be ours,  
We might have met them dareful, beard to beard,  
And beat them backward home.

_A cry of women within_

What is that noise?

**SEYTON**  
It is the cry of women, my good lord.

_Exit_

**MACBETH**  
I have almost forgot the taste of fears;  
The time has been, my senses would have cool'd  
To hear a night-shriek; and my fell of hair  
Would at a dismal treatise rouse and stir  
As life were in't: I have supp'd full with horrors;  
Direness, familiar to my slaughterous thoughts  
Cannot once start me.
"""


FUNCTION_WORD = re.compile(
    "a|all|and|are|as|at|be|but|by|do|for|from|had|have|he|her|him|his|i|in|is|it|me|my|no|not|of|on|our|shall|she|so"
    "|than|that|the|thee|their|them|then|they|this|thou|thy|to|unto|upon|was|we|were|what|which|will|with|ye|you|your"
)


@pytest.fixture(scope="module")
def model() -> tuple[dbrx_fn.Params, dbrx_fn.Config]:
    return dbrx_fn.load(dbrx_fn.SMALL)


def bits(text: str, model: tuple[dbrx_fn.Params, dbrx_fn.Config]) -> float:
    """Bits per byte of a text, from end-of-text on."""
    params, config = model
    tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
    assert tokenizer.end_of_text is not None
    tokens = mx.array([[tokenizer.end_of_text, *tokenizer.encode(text)]], mx.int32)
    logits, _ = score(params, tokens[:, :-1], config)
    nats = float(np.array(token_nats(logits, tokens[:, 1:])).mean())
    return bits_per_byte(nats, tokens.shape[1] - 1, len(text.encode()))


def test_it_is_dbrx_in_full_and_small(model: tuple[dbrx_fn.Params, dbrx_fn.Config]) -> None:
    params, config = model
    assert (config.ffn.moe_num_experts, config.ffn.moe_top_k) == (16, 4)
    assert config.attn.kv_n_heads < config.n_heads
    assert config.attn.clip_qkv == 8
    assert sum(path.stat().st_size for path in dbrx_fn.SMALL.glob("*.safetensors")) <= 8_000_000
    quantized = {path for path in dict(tree_flatten(params)) if path.endswith(".scales")}
    assert not any("router" in path for path in quantized)
    assert len(quantized) == 5 * config.n_layers + 2


def test_it_predicts_a_scene_that_it_never_saw(model: tuple[dbrx_fn.Params, dbrx_fn.Config]) -> None:
    text = SCENE.encode()
    scene = bits(SCENE, model)
    assert scene < 2.0
    assert scene < 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    # Words in another order are as frequent, and no sentence any more.
    words = SCENE.split(" ")
    shuffled = [words[place] for place in np.random.default_rng(0).permutation(len(words))]
    assert bits(" ".join(shuffled), model) > scene + 1


def test_generate_takes_it_when_no_other_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "To be, or not to be", "--max-tokens", "100", "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert Path(report["model"]) == dbrx_fn.SMALL
    words = re.findall("[a-z]+", report["text"].lower())
    assert len(words) >= 30
    # A third of English text is such words; of letters at random, none.
    assert sum(FUNCTION_WORD.fullmatch(word) is not None for word in words) >= 0.2 * len(words)
