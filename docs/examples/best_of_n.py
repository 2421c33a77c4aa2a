"""Best of n: generates eight answers to one prompt, which is computed once, and ranks them by likelihood."""

import dbrx_fn
import mlx.core as mx

PROMPT, N, LENGTH, TEMPERATURE = "**KING HENRY**  \nMy lords,", 8, 24, 0.8

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
prompt = tokenizer.encode(PROMPT)

cache = dbrx_fn.init_cache(config, batch_size=1, capacity=len(prompt) + LENGTH)
logits, cache = dbrx_fn.forward(params, mx.array([prompt]), cache, last_only=True)
logits, cache = mx.repeat(logits, N, axis=0), dbrx_fn.take_rows(cache, [0] * N)

answers, scores = [], mx.zeros(N)
for key in mx.random.split(mx.random.key(0), LENGTH):
    tokens = mx.random.categorical(logits[:, 0] / TEMPERATURE, key=key)
    # A reward model, or a test that code passes, would judge whole answers instead.
    log_probs = logits[:, 0] - mx.logsumexp(logits[:, 0], axis=-1, keepdims=True)
    scores += mx.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    answers.append(tokens)
    logits, cache = dbrx_fn.forward(params, tokens[:, None], cache)

answers = mx.stack(answers, axis=1)  # [N, LENGTH]
for row in mx.argsort(-scores).tolist():
    text = tokenizer.decode(answers[row].tolist())
    print(f"{scores[row].item() / LENGTH:6.2f} ln p a token: {text!r}")
