"""What training saves, mlx-lm loads: the same logits of a text, and the same tokens."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load as load_in_mlx_lm

from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.transformer import forward
from dbrx_fn.train import main
from tests.peers import reference
from tests.support.tiny_runs import arguments, sentences, write_config, write_text
from tests.support.trees import as_float64, relative_error

TEXT = " ".join(sentences(3, seed=7))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config, text = write_config(folder / "config.json"), write_text(folder / "text.md")
    assert main(arguments(folder / "run", config, [text], steps=30, save_every=15, learning_rate=0.01)) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["checkpoints/step-00000015", "checkpoints/step-00000030", "model"])
def test_mlx_lm_makes_the_same_logits(name: str, run: Path, measured: Any) -> None:
    tokens = load_tokenizer(run / name).encode(TEXT)[:60]
    params, config = load(run / name)
    ours, _ = forward(params, mx.array([tokens]), init_cache(config, 1, 0))
    theirs = reference.mlx_lm_logits(reference.mlx_lm_model(run / name), tokens)
    assert measured("trained here, float32 to mlx-lm", relative_error(theirs, as_float64(ours[0]))) <= 5e-6
    # It learned something, so that not only noise is compared.
    assert np.abs(theirs).max() > 2


def test_mlx_lm_takes_the_tokenizer_too(run: Path) -> None:
    """And the tokens that end a text."""
    _, theirs = load_in_mlx_lm(str(run / "model"))
    ours = load_tokenizer(run / "model")
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert {theirs.decode([token]) for token in theirs.eos_token_ids} == {"<|endoftext|>", "<|im_end|>"}
