"""The TPU kernels: their values in interpret mode, and what they are lowered to.

Interpret mode, on CPU, shows values, what is read past the end, and what is read before
it is written, but neither layouts nor limits; `test_tpu_compiled.py` is for these.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export, lax
from jax.experimental.pallas import tpu as pltpu

import jax_layernorm as jln
from jax_layernorm import _kernels
from jax_layernorm._kernels import _tpu_blocks, pallas_tpu

FUNCTIONS = (jln.layer_norm, jln.rms_norm)
DTYPES = ("float32", "bfloat16")
OFFSETS = (0.0, 1e2, 1e4, 1e6)
SHAPES = (  # one of each kind of block; ragged and odd ones
    (1, 128), (37, 64), (300, 128), (40, 200), (1100, 256), (130, 768), (21, 1000),
    (50, 2304), (19, 5120),
)  # fmt: skip
NAN_ROW = 3


class OnTheCpu:
    """The TPU kernels, where they would run if this were a TPU."""

    def __init__(self):
        self.ran = []

    def unsupported(self, problem):
        return pallas_tpu.unsupported(problem._replace(platform="tpu"))

    def forward(self, problem):
        self.ran.append("forward")
        return pallas_tpu.forward(problem)

    def backward(self, problem):
        self.ran.append("backward")
        return pallas_tpu.backward(problem)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels are what `implementation="pallas_tpu"` means here, interpreted."""
    kernel = OnTheCpu()
    monkeypatch.setitem(_kernels.KERNELS, "pallas_tpu", kernel)
    jax.clear_caches()
    # Interpreted as array operations. Scratch memory and rows past the end hold NaN.
    call = functools.partial(_tpu_blocks.pl.pallas_call, interpret=True)
    monkeypatch.setattr(_tpu_blocks.pl, "pallas_call", call)
    yield kernel
    jax.clear_caches()


def draw(shape, *, offset=0.0, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x, residual, dy, dtotal = rng.normal(size=(4, *shape))
    scale, bias = rng.normal(size=(2, shape[-1])) + [[1], [0]]
    whole = (jnp.asarray(a, dtype) for a in (x + offset, residual, dy, dtotal))
    params = {"scale": jnp.asarray(scale, "float32"), "bias": jnp.asarray(bias, "float32")}
    return params, *whole


def assert_right(out, params, x, dy, dtotal=None, **options):
    y, dparams, dx = out
    expected = oracle.norm(x, params.get("scale"), params.get("bias"), dy, **options)
    assert y.dtype == dy.dtype and dx.dtype == x.dtype
    oracle.assert_close(y, expected.y, against=expected.y_size, computed_in="float32")
    right, size = expected.dx, expected.dx_size
    if dtotal is not None:
        right = right + np.asarray(dtotal, np.float64)
        size = size + np.max(np.abs(right), -1, keepdims=True)
    oracle.assert_close(dx, right, against=size)
    rows = x.size // x.shape[-1]
    for name in params:
        oracle.assert_close(
            dparams[name],
            getattr(expected, f"d{name}"),
            summed=rows,
            against=getattr(expected, f"d{name}_size"),
        )


def value_and_gradients(function, params, x, dy, **options):
    def run(params, x, dy):
        norm = functools.partial(function, implementation="pallas_tpu", **options)
        y, pullback = jax.vjp(norm, params, x)
        return y, *pullback(dy)

    return jax.jit(run)(params, x, dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_gradients_are_right(function, dtype, shape, interpreted):
    params, x, _, dy, _ = draw(shape, dtype=dtype)
    out = value_and_gradients(function, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    assert_right(out, params, x, dy, center=function is jln.layer_norm)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((20, 128), (20, 384), (20, 2304)), ids=str)
def test_offset_costs_no_accuracy(shape, dtype, offset, interpreted):
    params, x, _, dy, _ = draw(shape, offset=offset, dtype=dtype)
    out = value_and_gradients(jln.layer_norm, params, x, dy)
    assert interpreted.ran == ["forward", "backward"]
    assert_right(out, params, x, dy)
