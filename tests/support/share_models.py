"""A process that shares models with others: `python -m tests.support.share_models OUT FOLDER...`.

It writes what it computed from its part of each checkpoint to OUT/RANK-NUMBER.safetensors: `prompt` and `step`, the
logits of a prompt in chunks and of greedy decoding; `tokens`, what greedy decoding chose; for a dense model also the
loss and its part of each gradient, with and without recomputation.
"""

import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import dbrx_fn
from dbrx_fn.model.config import Config
from dbrx_fn.model.shard import Shard
from dbrx_fn.model.tree import Params

PROMPT, CHUNK, STEPS = 23, 8, 6


def computed(params: Params, config: Config) -> dict[str, mx.array]:
    """What is compared, of a whole model or of a process's part."""
    text = mx.random.randint(0, config.vocab_size, (2, PROMPT), key=mx.random.key(1)).astype(mx.int32)
    cache = dbrx_fn.init_cache(config, 2, 64)
    prompt, cache = dbrx_fn.forward(params, text, cache, lengths=[PROMPT, PROMPT - 3], chunk_size=CHUNK)
    token = mx.stack([prompt[0, PROMPT - 1], prompt[1, PROMPT - 4]]).argmax(axis=-1).astype(mx.int32)
    steps, tokens = [], [token]
    for _ in range(STEPS):
        logits, cache = dbrx_fn.forward(params, token[:, None], cache)
        token = logits[:, 0].argmax(axis=-1).astype(mx.int32)
        steps.append(logits[:, 0])
        tokens.append(token)
    results = {"prompt": prompt, "step": mx.stack(steps), "tokens": mx.stack(tokens)}
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    dense = all(mx.issubdtype(leaf.dtype, mx.floating) for leaf in leaves.values())
    for recompute in (False, True) if dense else ():
        (value, _), gradients = mx.value_and_grad(dbrx_fn.loss)(params, text, None, config, recompute=recompute)
        results[f"loss {recompute}"] = value
        of_leaves: dict[str, mx.array] = dict(tree_flatten(gradients))
        results |= {f"{path} {recompute}": leaf for path, leaf in of_leaves.items()}
    mx.eval(results)
    return results


def main(out: Path, folders: list[str]) -> None:
    """Shares each checkpoint in turn."""
    group = mx.distributed.init(strict=True)
    shard = Shard(group.rank(), group.size())
    for number, folder in enumerate(folders):
        results = computed(*dbrx_fn.load(folder, shard=shard))
        mx.save_safetensors(str(out / f"{shard.rank}-{number}.safetensors"), results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
