"""Compilation in half the time, for tests in which XLA's optimizations play no part."""

import functools

import jax


@functools.cache
def _options():
    """XLA's older way of compiling fusions on CPU, unless this XLA has it no longer."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return None
    return options


def jit(function):
    return jax.jit(function, compiler_options=_options())
