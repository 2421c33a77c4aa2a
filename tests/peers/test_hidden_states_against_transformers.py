"""`hidden_states` is what transformers returns under `output_hidden_states`, but for the last."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from dbrx_fn.model.hidden_states import hidden_states, logits_of
from tests.peers import reference
from tests.support.trees import random_case, relative_error

BAR = 5e-6


@pytest.mark.parametrize("seed", range(8))
def test_streams_equal_transformers(seed: int) -> None:
    case, rng = random_case(seed)
    tokens = rng.integers(case.config.vocab_size, size=(2, int(rng.integers(1, 30))))
    model = reference.transformers_model(case.raw, case.tensors, "float64")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), use_cache=False, output_hidden_states=True)
    ours = hidden_states(case.params, mx.array(tokens), case.config)
    assert len(theirs.hidden_states) == len(ours)
    # Theirs has been through the final norm.
    for mine, expected in zip(ours[:-1], theirs.hidden_states[:-1], strict=True):
        assert relative_error(mine, np.asarray(expected)) <= BAR
    assert relative_error(logits_of(case.params, ours[-1], case.config), np.asarray(theirs.logits)) <= BAR
