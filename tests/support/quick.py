"""Compilation in half the time, for tests in which XLA's optimizations play no part."""

import functools
import os
import sys

import jax


@functools.cache
def _options():
    """XLA's older way of compiling fusions on CPU, if this XLA still has it."""
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
    """Variables for processes that run the examples and share what they compile."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
