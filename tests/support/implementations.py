"""The implementations, and which of them can run here, on the CPU of the tests."""

import functools

import jax
import pytest

import jax_layernorm as jln
from jax_layernorm._kernels import KERNELS, xla

NAMES = tuple(name for name, kernel in KERNELS.items() if "cpu" in kernel.platforms)
chosen = {}  # set by the fixture `implementation`


class XlaAsOn:
    """On the CPU, what the XLA implementation runs on another platform."""

    platforms = ("cpu",)
    not_default = staticmethod(xla.not_default)

    def __init__(self, platform):
        self.platform = platform

    def forward(self, problem):
        return xla.forward(problem._replace(platform=self.platform))

    def backward(self, problem):
        return xla.backward(problem._replace(platform=self.platform))


FORMS = {"xla_as_on_tpu": XlaAsOn("tpu")}  # variants of the XLA implementation


@functools.cache
def missing(implementation):
    """Why `implementation` cannot run here at all, or None."""
    x = jax.ShapeDtypeStruct((4, 128), "float32")
    norm = functools.partial(jln.layer_norm, implementation=implementation)
    try:
        jax.jit(norm).lower(jax.eval_shape(lambda: jln.init_params(128)), x)
    except NotImplementedError as error:
        return str(error)
    return None


def needed(implementation):
    """Skips the test, with the reason, if `implementation` cannot run here at all."""
    reason = missing(implementation)
    if reason is not None:
        pytest.skip(reason)
