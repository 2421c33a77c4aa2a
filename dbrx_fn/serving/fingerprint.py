"""Fingerprints that differ if the weights differ, or anything else that changes the bits of keys and values."""

import hashlib
import json
import os
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dbrx_fn.generation.cache_file import cache_fields
from dbrx_fn.model.config import Config
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import backend
from dbrx_fn.serving.limits import Limits

_SAMPLE = 4096
"""The number of words in the sample of each leaf."""


_SETTINGS = ("DBRX_FN_", "MLX_", "OPENBLAS_", "OMP_", "MKL_")


def fingerprint(params: Params, config: Config, limits: Limits, release: str) -> str:
    """64 hexadecimal digits for a `PrefixStore`. They are equal only if engines compute the same keys and values.

    They depend on `weights_fingerprint`, and on what rounding depends on (`docs/exactness.md`): this package's release,
    MLX's, the device, the BLAS, the number of cores, and environment variables for these. The exact mode has its own
    prefixes for each capacity, since the fast mode also keeps what was decoded.

    Args:
        params: the tree; all of it is evaluated.
        config: the model's.
        limits: the engine's.
        release: `dbrx_fn.__version__`.
    """
    facts = {
        "weights": weights_fingerprint(params, config),
        "releases": [release, version("mlx")],
        "device": [backend(), *(str(mx.device_info().get(name)) for name in ("device_name", "architecture"))],
        "blas": [FAST_BLAS, os.cpu_count()],
        "settings": {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)},
        "exact": limits.capacity if limits.exact else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(params: Params, config: Config) -> str:
    """64 hexadecimal digits that depend on all weights and on the config.

    They are the SHA-256 sum of each leaf's name, shape, dtype, a sample of its words of 32 bits, and the sum of the
    words of each of its rows. Training, another quantization or another seed change the sample, and a small edit
    changes a row's sum, which the device computes at about its memory's speed. Files aren't looked at, so a checkpoint
    that was copied keeps its fingerprint. It doesn't protect against somebody who searches for other weights with the
    same fingerprint.

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
    leaf = leaf.reshape(1) if leaf.ndim == 0 else leaf
    if leaf.itemsize * leaf.shape[-1] % 4 == 0:
        return leaf.view(mx.uint32)
    return leaf.view(mx.uint8 if leaf.itemsize == 1 else mx.uint16).astype(mx.uint32)
