"""Beam search: each step keeps the most likely continuations, by choosing rows of the cache."""

import dbrx_fn
import mlx.core as mx

PROMPT, LENGTH = "And the LORD said unto Moses,", 20

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
prompt = tokenizer.encode(PROMPT)


def search(width: int) -> tuple[list[str], list[float]]:
    """The likeliest texts that a beam of this width finds, and their log-probabilities."""
    cache = dbrx_fn.init_cache(config, batch_size=1, capacity=len(prompt) + LENGTH)
    logits, cache = dbrx_fn.forward(params, mx.array([prompt]), cache, last_only=True)
    beams: list[list[int]] = [[]]
    scores = mx.zeros(1)
    for _ in range(LENGTH):
        log_probs = logits[:, 0] - mx.logsumexp(logits[:, 0], axis=-1, keepdims=True)
        totals = (scores[:, None] + log_probs).reshape(-1)
        best = mx.argsort(-totals)[:width]
        scores = totals[best]
        rows, tokens = (best // config.vocab_size).tolist(), (best % config.vocab_size).tolist()
        beams = [[*beams[row], token] for row, token in zip(rows, tokens)]
        # A beam that forked is taken twice, one that was left behind not at all.
        cache = dbrx_fn.take_rows(cache, rows)
        logits, cache = dbrx_fn.forward(params, mx.array(tokens)[:, None], cache)
    return [tokenizer.decode(beam) for beam in beams], scores.tolist()


for width in (1, 4, 16):
    texts, scores = search(width)
    print(f"width {width:2}: ln p {scores[0]:6.2f}  {texts[0]!r}")
