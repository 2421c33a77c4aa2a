"""The model that ships with the package, in mlx-lm."""

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

import dbrx_fn
from tests.peers.reference import mlx_lm_greedy, mlx_lm_logits
from tests.support.trees import relative_error


def test_mlx_lm_gives_the_same_logits_and_tokens() -> None:
    model, _ = load_model(dbrx_fn.SMALL)
    params, config = dbrx_fn.load(dbrx_fn.SMALL)
    prompt = dbrx_fn.load_tokenizer(dbrx_fn.SMALL).encode("To be, or not to be: that is the question")
    logits, _ = dbrx_fn.forward(params, mx.array([prompt]), dbrx_fn.init_cache(config, 1, 0))
    assert relative_error(np.array(logits[0]), mlx_lm_logits(model, prompt)) <= 5e-6
    ours = list(dbrx_fn.stream_tokens(params, config, prompt, max_tokens=64))
    assert ours == mlx_lm_greedy(model, prompt, 64)
