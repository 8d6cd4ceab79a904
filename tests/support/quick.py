"""Compilation in half the time, for tests in which XLA's optimizations play no part."""

import functools

import jax

jit = functools.partial(
    jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False}
)
"""`jax.jit` without XLA's newer way of compiling fusions on CPU."""
