"""One chunk's keys and values as a file.

The file is safetensors (https://github.com/huggingface/safetensors#format) with one tensor, `keys_and_values`
`[2*layers kv_heads chunk head_dim]` in the config's dtype. The header's metadata are the facts that keys and
values depend on, the chunk's tokens, the name of the chunk before it, and the SHA-256 sum of the data. The reader knows
all of these except for the sum. So it parses nothing: it builds the header for this data, and compares it byte for
byte.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from dbrx_fn.generation.cache_file import DTYPE_CODES
from dbrx_fn.serving.prefix_chunks import Chunk, Form, KeysAndValues

# NumPy has no bfloat16, and a file needs only the bits.
_BITS: Mapping[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32}
_NO_SUM = "0" * 64


def size_in_file(form: Form, chunk: Chunk) -> int:
    """Bytes of a chunk's file."""
    return len(_header(form, chunk, _NO_SUM)) + form.nbytes


def as_bits(array: KeysAndValues) -> mx.array:
    """Keys and values as unsigned integers with the same bits."""
    return array.view(mx.uint16 if array.itemsize == 2 else mx.uint32)


def write_chunk(file: BinaryIO, form: Form, chunk: Chunk, data: memoryview) -> None:
    """Writes a chunk's file; `data` are its bits. It doesn't use MLX, so any thread may call it."""
    file.write(_header(form, chunk, hashlib.sha256(data).hexdigest()))
    file.write(data)


def read_chunk(file: BinaryIO, form: Form, chunk: Chunk) -> list[mx.array]:
    """The bits of a chunk's keys and values. Any thread may read them, since nothing is computed.

    Returns:
        Unsigned integers `[kv_heads chunk head_dim]` of each layer's keys, then of each layer's values. `mx.stack` and
        `view` make keys and values of them. They are separate, since NumPy's arrays become MLX's without another Python
        thread running: 1 MiB of DBRX's takes that less than a millisecond, and all 80 some 50.

    Raises:
        ValueError: if the file isn't that chunk's, whole and unchanged.
        OSError: if it can't be read.
    """
    if os.fstat(file.fileno()).st_size != size_in_file(form, chunk):
        raise ValueError("it has another size")
    header = file.read(size_in_file(form, chunk) - form.nbytes)
    data = file.read(form.nbytes)
    if header != _header(form, chunk, hashlib.sha256(data).hexdigest()):
        raise ValueError("it has another header or other data")
    return [mx.array(part) for part in np.frombuffer(data, _BITS[form.dtype.size]).reshape(form.shape)]


def _header(form: Form, chunk: Chunk, checksum: str) -> bytes:
    texts = {
        "dbrx_fn_prefix": form.facts,
        "before": chunk.before,
        "tokens": json.dumps(chunk.tokens),
        "sha256": checksum,
    }
    tensor = {"dtype": DTYPE_CODES[form.config.dtype], "shape": form.shape, "data_offsets": [0, form.nbytes]}
    text = json.dumps({"__metadata__": texts, "keys_and_values": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
