"""Merges two checkpoints, a model and its fine-tune, weight by weight (https://arxiv.org/abs/2109.01903)."""

from pathlib import Path
from tempfile import TemporaryDirectory

import dbrx_fn
import mlx.core as mx
from mlx.utils import tree_map

DOCS = Path(__file__).parents[1]

original, config = dbrx_fn.load(dbrx_fn.SMALL)
original = dbrx_fn.dequantize(original, config)  # packed integers can't be trained, nor added
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)


def windows(file: str, count: int) -> mx.array:
    return mx.array(tokenizer.encode((DOCS / file).read_text())[: count * 64]).reshape(count, 64)


def merge(one: dbrx_fn.Params, other: dbrx_fn.Params, share: float) -> dbrx_fn.Params:
    return tree_map(lambda a, b: a + share * (b - a), one, other)


with TemporaryDirectory() as folder:
    # A checkpoint to merge with, made of another kind of text.
    recipe = dbrx_fn.Recipe(steps=8, warmup=0, learning_rate=3e-4)
    state = dbrx_fn.init_state(original, recipe, mx.random.key(0))
    for batch in windows("training.md", 32).reshape(8, 4, 64):
        state, _ = dbrx_fn.train_step(state, batch, None, config=config, recipe=recipe)
        mx.eval(state)
    dbrx_fn.save(f"{folder}/tuned", state["params"], config, tokenizer_files=dbrx_fn.SMALL)
    tuned, _ = dbrx_fn.load(f"{folder}/tuned")
    texts = [windows("bench.md", 6), windows("examples/macbeth.txt", 6)]
    print("share of the fine-tune   nats a token of docs   of Macbeth")
    for share in (0, 0.25, 0.5, 0.75, 1):
        merged = merge(original, tuned, share)
        docs, play = (dbrx_fn.loss(merged, text, None, config)[1].cross_entropy.item() for text in texts)
        print(f"{share:22.0%} {docs:22.3f} {play:12.3f}")
