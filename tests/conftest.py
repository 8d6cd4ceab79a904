"""Settings of the whole test run."""

import gc
import importlib
import sys
import typing

import beartype  # noqa: F401  before TYPE_CHECKING is set, which it reads
import jax
import jaxtyping
import pytest

import jax_layernorm

jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(50_000, 50, 100)  # tracing makes many objects, and little garbage

# The equations name their shapes under TYPE_CHECKING, because jaxtyping is not a runtime
# dependency. Here they are loaded a second time, with annotations that are real and
# checked at every call.
typing.TYPE_CHECKING = True
with jaxtyping.install_import_hook("jax_layernorm._equations", "beartype.beartype"):
    for name in [name for name in sys.modules if name.startswith("jax_layernorm")]:
        del sys.modules[name]
    jax_layernorm = importlib.import_module("jax_layernorm")
typing.TYPE_CHECKING = False

import implementations  # noqa: E402  they import the package
from marking_kernel import MarkingKernel  # noqa: E402


@pytest.fixture(params=(*implementations.NAMES, *implementations.FORMS))
def implementation(request, monkeypatch):
    """Runs a test once with each implementation; calls take `**implementations.chosen`."""
    if request.param in implementations.FORMS:
        form = implementations.FORMS[request.param]
        monkeypatch.setitem(implementations.KERNELS, request.param, form)
    else:
        implementations.needed(request.param)
    monkeypatch.setitem(implementations.chosen, "implementation", request.param)
    return request.param


@pytest.fixture
def strict_promotion():
    """Implicit promotion of dtypes or ranks is an error, as in careful users' code."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _compile_flax_quickly(request):
    """Comparisons with Flax do not depend on how well XLA optimizes."""
    if request.path.parent.name == "flax":
        request.getfixturevalue("quick_compilation")


@pytest.fixture(autouse=True)
def _allow_benchmarks_without_the_kernel(request, monkeypatch):
    """Their tests run without the CPU kernel too, because they time nothing."""
    if request.path.parent.name == "benchmarks":
        monkeypatch.setenv("JAX_LAYERNORM_ALLOW_XLA", "1")


@pytest.fixture
def quick_compilation():
    """Leaves out most of XLA's passes, in tests that compile much and time nothing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def marking_kernel(monkeypatch):
    """A kernel called "marking" that CPUs prefer to all others; see `MarkingKernel`."""
    kernels = {"marking": MarkingKernel(), **jax_layernorm._kernels.KERNELS}
    monkeypatch.setattr("jax_layernorm._kernels.KERNELS", kernels)
    monkeypatch.setattr("jax_layernorm._arguments.KERNELS", kernels)
    jax.clear_caches()
    yield
    jax.clear_caches()
