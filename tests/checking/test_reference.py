"""What ships to be compared with is what the oracle says now."""

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.checking.draws import quantized
from dbrx_fn.checking.models import QUANTIZED
from dbrx_fn.checking.reference import FILE
from dbrx_fn.model.params import Leaf
from dbrx_fn.ops.formats import Format, dequantize_matrix
from tests.support.dequantized import dequantized
from tests.support.make_check_reference import reference


def test_the_file_that_ships_is_what_the_script_makes() -> None:
    """Or else run `python -m tests.support.make_check_reference`. NumPy's BLAS may round a number to its neighbour."""
    made = reference()
    with np.load(FILE) as file:
        assert set(file.files) == made.keys()
        for name, array in made.items():
            assert file[name].dtype == array.dtype
            np.testing.assert_allclose(file[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    assert FILE.stat().st_size < 300_000


@pytest.mark.parametrize("form", [model.form for model in QUANTIZED], ids=str)
def test_quantized_bits_mean_to_numpy_what_they_mean_to_mlx(form: Format) -> None:
    parts = quantized((3, 1), Leaf(("expert", "outer", "inner"), (2, 5, 256)), form)
    ours = dequantized(parts, form)
    assert ours.std() > 0.01
    theirs = dequantize_matrix([mx.array(part) for part in parts.values()], form, mx.float32)
    np.testing.assert_array_equal(ours, np.array(theirs))
