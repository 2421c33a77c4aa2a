"""Prunes the experts of each layer that a text uses least, and measures the loss of quality on another text."""

from dataclasses import replace
from pathlib import Path

import dbrx_fn
import mlx.core as mx
from mlx.utils import tree_map

TEXT = Path(__file__).with_name("macbeth.txt").read_text()

params, config = dbrx_fn.load(dbrx_fn.SMALL)
tokenizer = dbrx_fn.load_tokenizer(dbrx_fn.SMALL)
windows = mx.array(tokenizer.encode(TEXT)[: 8 * 128]).reshape(8, 128)
seen, unseen = windows[:4], windows[4:]


def pruned(order: mx.array, kept: int) -> tuple[dbrx_fn.Params, dbrx_fn.Config]:
    """The model with the first `kept` experts of each layer's row in `order` [layer, expert]."""
    # Router and experts have an expert for their first axis, packed or not.
    blocks = [
        block | {"ffn": tree_map(lambda leaf, rows=rows: leaf[rows], block["ffn"])}
        for block, rows in zip(params["transformer"]["blocks"], order[:, :kept])
    ]
    smaller = replace(config, ffn=replace(config.ffn, moe_num_experts=kept))
    return params | {"transformer": params["transformer"] | {"blocks": blocks}}, smaller


_, parts = dbrx_fn.loss(params, seen, None, config)
by_use = mx.argsort(-parts.expert_share, axis=-1)
print("experts  parameters   nats a token, least used pruned   most used pruned")
for kept in (16, 12, 8, 4):
    nats = []
    for order in (by_use, by_use[:, ::-1]):
        tree, smaller = pruned(order, kept)
        nats.append(dbrx_fn.loss(tree, unseen, None, smaller)[1].cross_entropy.item())
    print(f"{kept:7} {dbrx_fn.param_count(smaller):11,} {nats[0]:33.3f} {nats[1]:18.3f}")
