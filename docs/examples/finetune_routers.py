"""Fine-tunes only the routers, 0.3% of the parameters, on another kind of text. The experts don't change."""

from pathlib import Path

import dbrx_fn
import mlx.core as mx
from mlx.optimizers import Adam

DOCS = Path(__file__).parents[1]

params, config = dbrx_fn.load(dbrx_fn.SMALL)
params = dbrx_fn.dequantize(params, config)  # packed integers have no gradient
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
blocks = params["transformer"]["blocks"]


def windows(file: str) -> mx.array:
    """A text's tokens, [window, 64]."""
    tokens = mx.array(tokenizer.encode((DOCS / file).read_text()))
    return tokens[: len(tokens) // 64 * 64].reshape(-1, 64)


def loss(tuned: dict, tokens: mx.array) -> mx.array:
    """The model's loss with these routers in the place of its own."""
    ffns = [block["ffn"] | {"router": router} for block, router in zip(blocks, tuned["routers"])]
    transformer = params["transformer"] | {"blocks": [block | {"ffn": ffn} for block, ffn in zip(blocks, ffns)]}
    return dbrx_fn.loss(params | {"transformer": transformer}, tokens, None, config)[0]


text, unseen = windows("training.md"), windows("bench.md")[:6]
tuned, optimizer = {"routers": [block["ffn"]["router"] for block in blocks]}, Adam(learning_rate=2e-3)
print(f"step  0: loss {loss(tuned, unseen).item():.3f} on a page that isn't trained on")
for step in range(1, 13):
    batch = text[mx.random.randint(0, len(text), (4,), key=mx.random.key(step))]
    tuned = optimizer.apply_gradients(mx.grad(loss)(tuned, batch), tuned)
    mx.eval(tuned)
    if step % 4 == 0:
        print(f"step {step:2}: loss {loss(tuned, unseen).item():.3f}")
