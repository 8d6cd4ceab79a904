"""`python -m jax_layernorm`."""

from jax_layernorm._explain import main

main()
