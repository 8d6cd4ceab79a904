"""Compilation in half the time, for tests in which XLA's optimizations play no part."""

import functools
import os
import sys

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


def environment(folder):
    """Of processes that run the examples; what one compiled, the next ones load."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
