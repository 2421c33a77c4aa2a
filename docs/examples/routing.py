"""Draws each token's experts and their weights, with a panel for each layer."""

import dbrx_fn
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np

TEXT = "And God said, Let there be light: and there was light.\n**HAMLET**  \nTo be, or not to be"

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
tokens = tokenizer.encode(TEXT)
_, routing = dbrx_fn.score(params, mx.array([tokens]), config)

# A chosen expert counts by its share of the chosen ones' probability; the others don't count at all.
probabilities = mx.softmax(routing.logits, axis=-1)
chosen = mx.take_along_axis(probabilities, routing.top_experts, axis=-1)
weights = mx.zeros_like(probabilities)
weights = mx.put_along_axis(weights, routing.top_experts, chosen / chosen.sum(-1, keepdims=True), axis=-1)
weights = np.array(weights[:, 0])  # [layer, time, expert]

figure, panels = plt.subplots(config.n_layers, sharex=True, figsize=(9, 11), layout="constrained")
for layer, panel in enumerate(panels):
    image = panel.imshow(weights[layer].T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set(ylabel=f"layer {layer}\nexpert", yticks=range(0, config.ffn.moe_num_experts, 5))
panels[-1].set_xticks(range(len(tokens)), [repr(tokenizer.decode([token])) for token in tokens], rotation=90)
figure.colorbar(image, ax=panels, label="weight", shrink=0.5)
figure.savefig("routing.png", dpi=150)

most = weights.max(axis=(1, 2))
print("Largest weight in each layer:", ", ".join(f"{weight:.0%}" for weight in most))
print("The picture is routing.png")
