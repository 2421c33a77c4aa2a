"""Prints the log-probability of each token of a text, and the most likely tokens at its place."""

import dbrx_fn
import mlx.core as mx

TEXT = "To be, or not to be: that is the question of the day."

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)

# In training this token stood before each document, so the text's first token has something to follow.
tokens = mx.array([tokenizer.end_of_text, *tokenizer.encode(TEXT)])
logits, _ = dbrx_fn.score(params, tokens[None, :-1], config)
log_probs = logits[0] - mx.logsumexp(logits[0], axis=-1, keepdims=True)  # [time, vocab]
found = tokens[1:]
found_log_probs = mx.take_along_axis(log_probs, found[:, None], axis=-1)[:, 0]
likeliest = mx.argsort(-log_probs, axis=-1)[:, :3]

print(f"{'token':12} {'ln p':>6}   likeliest")
for token, log_prob, others, row in zip(found.tolist(), found_log_probs.tolist(), likeliest.tolist(), log_probs):
    shown = "   ".join(f"{tokenizer.decode([other])!r} {mx.exp(row[other]).item():.0%}" for other in others)
    print(f"{tokenizer.decode([token])!r:12} {log_prob:6.2f}   {shown}")
print(f"\nAll in all ln p {found_log_probs.sum().item():.1f}, perplexity {mx.exp(-found_log_probs.mean()).item():.1f}")
