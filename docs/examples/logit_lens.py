"""Draws a logit lens: the model's predictions after each layer, read as if it were the last.

Method: https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
"""

import dbrx_fn
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np

TEXT = "And God said, Let there be light: and there was light."

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
tokens = [tokenizer.end_of_text, *tokenizer.encode(TEXT)]

streams = dbrx_fn.hidden_states(params, mx.array([tokens]), config)  # [layer + 1, 1, time, d_model]
probabilities = mx.softmax(dbrx_fn.logits_of(params, streams[:, 0], config), axis=-1)  # [layer + 1, time, vocab]
said = np.array(mx.argmax(probabilities, axis=-1))
certainty = np.array(mx.max(probabilities, axis=-1))

labels = [repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]
figure, axes = plt.subplots(figsize=(12, 4), layout="constrained")
image = axes.imshow(certainty, cmap="YlGn", vmin=0, vmax=1, aspect="auto", origin="lower")
for layer, position in np.ndindex(said.shape):
    token = tokenizer.decode([int(said[layer, position])])
    axes.text(position, layer, repr(token)[1:-1], ha="center", va="center", fontsize=8)
axes.set_xticks(range(len(tokens)), labels, rotation=60, fontsize=8)
axes.set_yticks(range(len(said)), ["embedding", *(f"after layer {n}" for n in range(config.n_layers))])
figure.colorbar(image, label="probability of the likeliest")
figure.savefig("logit_lens.png", dpi=150)

norms = mx.linalg.norm(streams[:, 0], axis=-1).mean(axis=-1).tolist()
for name, norm, agrees in zip(["embedding", *range(config.n_layers)], norms, (said == said[-1]).mean(axis=1)):
    print(f"{name!s:>9}: mean norm of the stream {norm:6.2f}, says what the last layer says for {agrees:.0%} of tokens")
print("The picture is logit_lens.png")
