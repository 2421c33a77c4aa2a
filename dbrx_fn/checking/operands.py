"""Inputs of single operations, for checks that would take too long with a whole model: many tokens, far positions."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checking.draws import Array, floats, quantized, whole_numbers
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import Leaf
from dbrx_fn.ops.experts import ExpertsParams
from dbrx_fn.ops.formats import Format

EXPERTS, WIDTH, TOP_K = 4, 128, 2
_KEPT = 1200


@dataclass(frozen=True)
class Mixture:
    """Experts, and tokens that go to two of them each. Some experts get many more tokens than others."""

    tokens: int
    form: Format | None = None

    @property
    def name(self) -> str:
        """Its name in the reference and the report."""
        kind = "dense" if self.form is None else f"{self.form.mode} {self.form.bits} bits"
        return f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'}, {kind} experts"

    @property
    def step(self) -> int:
        """The reference holds every `step`-th number of the results, row by row, so some for each token."""
        return min(WIDTH - 1, max(1, self.tokens * WIDTH // _KEPT) | 1)

    def matrices(self) -> dict[str, dict[str, Array]]:
        """`w1`, `v1`, `w2`, each `[expert width width]`, by their leaves."""
        leaf = Leaf(("expert", "ffn_hidden", "d_model"), (EXPERTS, WIDTH, WIDTH))
        made: dict[str, dict[str, Array]] = {}
        for place, name in enumerate(("w1", "v1", "w2")):
            seed = (self.tokens, place)
            dense = {"weight": floats(seed, WIDTH, *leaf.shape)} if self.form is None else None
            made[name] = cast(dict[str, Array], dense or quantized(seed, leaf, cast(Format, self.form)))
        return made

    def inputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Activations `[tokens width]`, the experts' weights and the experts `[tokens top_k]`."""
        x = floats((self.tokens, 3), 1, self.tokens, WIDTH)
        shape = (self.tokens, TOP_K)
        weights = ((1 + whole_numbers((self.tokens, 4), 8, *shape)) / 8).astype(np.float32)
        experts = whole_numbers((self.tokens, 5), 16, *shape)
        return x, weights, np.minimum(experts // 2, EXPERTS - 1)

    def arrays(self, dtype: Dtype) -> tuple[ExpertsParams, mx.array, mx.array, mx.array]:
        """The arguments of `mix_experts`, in a dtype."""
        x, weights, experts = self.inputs()
        params = {
            name: {leaf: in_dtype(part, dtype) for leaf, part in parts.items()}
            for name, parts in self.matrices().items()
        }
        return cast(ExpertsParams, params), in_dtype(x, dtype), in_dtype(weights, dtype), mx.array(experts, mx.uint32)


def in_dtype(array: Array, dtype: Dtype) -> mx.array:
    """An array with its floats in a dtype."""
    made = mx.array(array)
    return made.astype(getattr(mx, dtype)) if array.dtype == np.float32 else made


MIXTURES = (
    *(Mixture(tokens) for tokens in (1, 9, 40, 200, 600, 2200)),
    *(Mixture(tokens, Format(4, 64)) for tokens in (1, 9, 40, 200, 600)),
    Mixture(40, Format(4, 32, "mxfp4")),
)
"""Numbers of tokens for which segments have each length that a machine can choose."""

POSITIONS = (0, 1, 2, 63, 1000, 8191, 20_000, 32_767)
HEAD_DIM, THETA = 128, 5e5


def turned_heads() -> NDArray[np.float32]:
    """The heads to rotate, `[position head_dim]`."""
    return floats((7,), 1, len(POSITIONS), HEAD_DIM)
