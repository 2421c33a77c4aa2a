"""A short text that is another one for other weights."""

import hashlib
import json

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.generation.cache_file import cache_fields
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params

_SAMPLE = 4096
"""Words that are taken of each leaf."""


def weights_fingerprint(params: Params, config: Config) -> str:
    """64 hexadecimal digits that depend on all weights and on the config.

    They are the SHA-256 sum of each leaf's name, shape, dtype, a sample of its words of 32 bits, and the sum of the
    words of each of its rows. Training, another quantization or another seed change the sample, and a small edit
    changes a row's sum, which the device computes at about its memory's speed. Files aren't looked at, so a checkpoint
    that was copied keeps its fingerprint. It doesn't protect from someone who searches for other weights of the same.

    Args:
        params: the tree; all of it is evaluated.
        config: the model's.
    """
    leaves: dict[str, mx.array] = dict(tree_flatten(params))
    digest = hashlib.sha256(json.dumps(cache_fields(config)).encode())
    for path, leaf in sorted(leaves.items()):
        words = _words(leaf)
        step = max(1, words.size // _SAMPLE)
        digest.update(json.dumps([path, leaf.shape, str(leaf.dtype)]).encode())
        digest.update(np.array(mx.sum(words, axis=-1)).tobytes())
        digest.update(np.array(words.reshape(-1)[::step]).tobytes())
    return digest.hexdigest()


def _words(leaf: mx.array) -> mx.array:
    """A leaf's bits as unsigned words of 32 bits; the last axis has those of a row. A row of odd size has smaller ones.

    The result is `[... words]`, uint32.
    """
    if leaf.itemsize * leaf.shape[-1] % 4 == 0:
        return leaf.view(mx.uint32)
    return leaf.view(mx.uint8 if leaf.itemsize == 1 else mx.uint16).astype(mx.uint32)
