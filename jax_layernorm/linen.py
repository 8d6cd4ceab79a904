"""Flax linen modules: Flax's norms, computed by `jax_layernorm`.

To switch, change the import and nothing else. The classes inherit from Flax's, so the
constructor arguments, the defaults, the parameter tree and the dtype rules stay the
same.
"""

# `Implementation` is here because the modules' annotations name it, and
# `typing.get_type_hints` looks it up in the module that the classes name as theirs.
from jax_layernorm._arguments import Implementation as Implementation
from jax_layernorm._flax import Report as Report
from jax_layernorm._linen_norms import LayerNorm as LayerNorm
from jax_layernorm._linen_norms import RMSNorm as RMSNorm
from jax_layernorm._linen_replace import replace as replace
