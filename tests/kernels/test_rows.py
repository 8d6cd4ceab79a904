"""How kernels see a problem: `_kernels/_rows.py`."""

import re

import jax
import jax.numpy as jnp
import pytest

from jax_layernorm._equations import NormSpec
from jax_layernorm._kernel_op import Problem
from jax_layernorm._kernels._rows import Rows, as_rows


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forward(x, scale=None, bias=None, *, axes=(-1,), mask=None, partitioned=False):
    spec = NormSpec(True, axes, 1e-6, 0.0, jnp.dtype(jnp.float32))
    return Problem(
        "layer_norm_forward",
        (x, None, scale, bias, mask),
        {"spec": spec, "with_statistics": False},
        "cpu",
        partitioned,
        False,
    )


@pytest.mark.parametrize(
    ("shape", "scale", "bias", "axes", "expected"),
    [
        ((6,), None, (6,), (-1,), Rows(1, 6, None, 1, None)),
        ((2, 3, 6), (6,), (6,), (-1,), Rows(6, 6, 1, 1, None)),
        ((2, 3, 6), (3, 6), (1, 3, 6), (-1, -2), Rows(2, 18, 1, 1, None)),
        ((2, 3, 6), (1, 1, 6), (2, 1, 6), (-1,), Rows(6, 6, 1, 2, None)),
        ((2, 3, 6), (2, 3, 6), None, (-1,), Rows(6, 6, 6, None, None)),
        ((1, 3, 1, 6), (1, 3, 1, 6), (3, 1, 6), (-1,), Rows(3, 6, 3, 3, None)),
    ],
)
def test_leading_axes_become_rows_and_groups(shape, scale, bias, axes, expected):
    scale = None if scale is None else array(*scale)
    bias = None if bias is None else array(*bias)
    assert as_rows(forward(array(*shape), scale, bias, axes=axes)) == expected


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (forward(array(2, 6), partitioned=True), "partitions the program"),
        (forward(array(2, 6), mask=array(2, 1)), "there is a mask"),
        (forward(array(2, 3, 6), axes=(-2,)), "are not the last ones"),
        (forward(array(2, 3, 6), axes=(-3, -1)), "are not the last ones"),
        (forward(array(0, 6)), "x is empty"),
        (forward(array(2, 3, 6), array(1, 3, 6)), "shape (1, 3, 6) is not one row"),
        (forward(array(2, 6), array(2, 1)), "is not one row of features"),
    ],
)
def test_a_problem_that_is_not_a_matrix_has_a_reason(problem, reason):
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        as_rows(problem)
