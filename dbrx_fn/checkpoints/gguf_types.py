"""GGUF's tensor types: the size of their blocks, and the formats of MLX that hold them exactly.

Sources: `enum ggml_type` of https://github.com/ggml-org/ggml/blob/master/include/ggml.h, and ggml's src/ggml-common.h.
"""

from dataclasses import dataclass

from dbrx_fn.model.config import Dtype
from dbrx_fn.ops.formats import Format


@dataclass(frozen=True)
class BlockType:
    """A tensor type that is read: a row is blocks of `items` entries, of `size` bytes each.

    `dtype`: of the floats that become of it: its entries, or the scales and biases of `form`.
    `form`: the format of MLX that holds every quantized tensor of this type exactly. `None` if there is none: then the
        entries become floats.
    """

    name: str
    items: int
    size: int
    dtype: Dtype
    form: Format | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether entries share a scale."""
        return self.items > 1

    @property
    def needs_package(self) -> bool:
        """Whether only the package `gguf` can read its entries."""
        return self.is_quantized and self.form is None


def _k_quant(name: str, size: int) -> BlockType:
    return BlockType(name, 256, size, "float32")


TYPES = {
    0: BlockType("F32", 1, 4, "float32"),
    1: BlockType("F16", 1, 2, "float16"),
    30: BlockType("BF16", 1, 2, "bfloat16"),
    2: BlockType("Q4_0", 32, 18, "float16", Format(4, 32)),
    3: BlockType("Q4_1", 32, 20, "float16", Format(4, 32)),
    6: BlockType("Q5_0", 32, 22, "float16", Format(5, 32)),
    7: BlockType("Q5_1", 32, 24, "float16", Format(5, 32)),
    8: BlockType("Q8_0", 32, 34, "float16", Format(8, 32)),
    # A product of a float16 scale and a 6-bit one fits float32.
    12: BlockType("Q4_K", 256, 144, "float32", Format(4, 32)),
    13: BlockType("Q5_K", 256, 176, "float32", Format(5, 32)),
    # Their entries are whole numbers of 8 bits.
    20: BlockType("IQ4_NL", 32, 18, "float16", Format(8, 32)),
    23: BlockType("IQ4_XS", 256, 136, "float32", Format(8, 32)),
    39: BlockType("MXFP4", 32, 17, "float16", Format(4, 32, "mxfp4")),
    41: BlockType("Q1_0", 128, 18, "float16", Format(2, 128)),
    42: BlockType("Q2_0", 64, 18, "float16", Format(2, 64)),
    10: _k_quant("Q2_K", 84),
    11: _k_quant("Q3_K", 110),
    14: _k_quant("Q6_K", 210),
    16: _k_quant("IQ2_XXS", 66),
    17: _k_quant("IQ2_XS", 74),
    18: _k_quant("IQ3_XXS", 98),
    19: _k_quant("IQ1_S", 50),
    21: _k_quant("IQ3_S", 110),
    22: _k_quant("IQ2_S", 82),
    29: _k_quant("IQ1_M", 56),
    34: _k_quant("TQ1_0", 54),
    35: _k_quant("TQ2_0", 66),
    40: BlockType("NVFP4", 64, 36, "float32"),
}
"""The types that are read, by their numbers in a file."""

REFUSED = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
}  # fmt: skip
"""The other known types. llama.cpp's quantizer writes none of them, and no longer the last three."""

NAMES = ", ".join(kind.name for kind in TYPES.values())
