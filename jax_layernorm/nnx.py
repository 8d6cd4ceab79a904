"""Flax NNX modules: Flax's norms, computed by `jax_layernorm`.

To switch, change the import and nothing else. The constructor arguments, the defaults,
the parameters and the dtype rules are Flax's.
"""

from jax_layernorm._flax import Report as Report
from jax_layernorm._nnx_norms import LayerNorm as LayerNorm
from jax_layernorm._nnx_norms import RMSNorm as RMSNorm
from jax_layernorm._nnx_replace import _replaced_class as _replaced_class
from jax_layernorm._nnx_replace import replace as replace
from jax_layernorm._nnx_replace import report as report
