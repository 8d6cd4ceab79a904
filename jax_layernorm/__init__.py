"""Layer normalization for JAX, with a hand-written backward pass."""

from jax_layernorm._explain import explain as explain
from jax_layernorm._functions import add_layer_norm as add_layer_norm
from jax_layernorm._functions import add_rms_norm as add_rms_norm
from jax_layernorm._functions import init_params as init_params
from jax_layernorm._functions import layer_norm as layer_norm
from jax_layernorm._functions import rms_norm as rms_norm
from jax_layernorm._results import Statistics as Statistics

__version__ = "0.1.0"


_ON_FIRST_USE = ("linen", "nnx", "convert")  # because some need flax


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})


def __getattr__(name: str) -> object:
    if name in _ON_FIRST_USE:
        import importlib

        return importlib.import_module(f"jax_layernorm.{name}")
    raise AttributeError(f"module 'jax_layernorm' has no attribute {name!r}")
