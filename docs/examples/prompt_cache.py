"""Saves the cache of a long prompt, loads it, and continues from it several times without computing it again."""

import tempfile
import time
from pathlib import Path

import dbrx_fn
import mlx.core as mx

PROMPT = Path(__file__).with_name("macbeth.txt").read_text()[:1500]
LENGTH = 24

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "prompt.safetensors")
    start = time.perf_counter()
    prompt = mx.array([tokenizer.encode(PROMPT)])
    cache = dbrx_fn.init_cache(config, batch_size=1, capacity=prompt.size)
    _, cache = dbrx_fn.forward(params, prompt, cache, last_only=True)
    dbrx_fn.save_cache(file, cache)
    print(f"{prompt.size} tokens read and saved in {time.perf_counter() - start:.2f} s: {file.stat().st_size:,} bytes")

    start = time.perf_counter()
    cache = dbrx_fn.load_cache(file, config)
    print(f"Loaded in {time.perf_counter() - start:.3f} s")

warm = dbrx_fn.Sampling(temperature=0.7)
for seed, speaker in enumerate(["MACBETH", "Doctor", "LADY MACBETH"]):
    tokens = prompt[0].tolist() + tokenizer.encode(f"\n\n**{speaker}**  \n")
    drawn = {"max_tokens": LENGTH, "sampling": warm, "key": mx.random.key(seed)}
    pieces = dbrx_fn.stream_text(params, config, tokenizer, tokens, cache=cache, **drawn)
    text = "".join(piece.text for piece in pieces)
    print(f"\n{speaker}: {text!r}")
