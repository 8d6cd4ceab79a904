"""`explain` says what lowering decides, and `python -m jax_layernorm` prints it."""

import functools
import re
import subprocess
import sys

import implementations
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln
from jax_layernorm import _kernels

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


@pytest.fixture
def x():
    return jnp.ones((4, 16))


def test_xla_runs_where_no_kernel_does():
    explanation = jln.explain(jln.init_params(8), jnp.ones((2, 8)))
    assert list(explanation) == PLATFORMS
    for platform in PLATFORMS[1:]:
        choice = explanation[platform]
        assert choice.implementation == "xla"
        assert choice.reasons["native_cpu"] == "it supports CPUs only"
        assert choice.reasons.keys() == {"cuda", "native_cpu", "pallas_tpu"}
    assert "it runs only by name" in explanation["tpu"].reasons["pallas_tpu"]
    assert explanation["cuda"].reasons["pallas_tpu"] == "it supports TPUs only"


def test_the_cpu_kernel_runs_on_cpu_where_it_was_built():
    implementations.needed("native_cpu")
    choice = jln.explain(jln.init_params(8), jnp.ones((2, 8)))["cpu"]
    assert choice.implementation == "native_cpu"
    masked = jln.explain({}, jnp.ones((2, 8)), mask=jnp.ones(8, bool))["cpu"]
    assert masked.implementation == "xla"
    assert masked.reasons["native_cpu"] == "there is a mask"


@pytest.mark.usefixtures("marking_kernel")
def test_a_kernel_is_named_where_it_runs_and_its_reason_given_where_not(x):
    explanation = jln.explain({}, x)
    assert explanation["cpu"].implementation == "marking"
    assert explanation["cpu"].reasons["xla"] == "marking is preferred"
    assert explanation["tpu"].implementation == "xla"
    assert explanation["tpu"].reasons["marking"] == "it supports CPUs only"
    assert "not marking, native_cpu: it supports CPUs only" in str(explanation)
    narrow = jln.explain({}, x[:, :8])["cpu"]
    assert narrow.reasons["marking"] == "features must be 16"


@pytest.mark.usefixtures("marking_kernel")
def test_a_kernel_that_is_asked_for_by_name_and_cannot_run_is_reported(x):
    explanation = jln.explain({}, x, implementation="marking")
    assert explanation["cpu"].implementation == "marking"
    assert explanation["tpu"].implementation is None
    assert "tpu   none: it raises" in str(explanation)


@pytest.mark.usefixtures("marking_kernel")
def test_placement_is_part_of_the_explanation(x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    choice = jln.explain({}, split)["cpu"]
    assert choice.implementation == "xla"
    assert "cannot be partitioned" in choice.reasons["marking"]


@pytest.mark.usefixtures("marking_kernel")
def test_what_runs_the_equations_themselves_says_so(x):
    choice = jln.explain({}, x, custom_vjp=False)["cpu"]
    assert choice.implementation == "xla"
    assert "custom_vjp=False" in choice.reasons["marking"]
    choices = []

    def inside(x):
        choices.append(jln.explain({}, x, axis_name="i")["cpu"])
        return x

    jax.vmap(inside, axis_name="i")(x)
    assert choices[0].implementation == "xla"
    assert "the normalized axes are split over 'i'" in choices[0].reasons["marking"]


@pytest.mark.parametrize(
    "function", (jln.layer_norm, jln.rms_norm, jln.add_layer_norm, jln.add_rms_norm)
)
def test_all_functions_and_arguments_can_be_explained(function):
    shape = jax.ShapeDtypeStruct((4, 6, 8), "bfloat16")
    residual = (shape,) if "add" in function.__name__ else ()
    scale = {"scale": jax.ShapeDtypeStruct((6, 4), "float32")}
    explain = functools.partial(jln.explain, scale, shape, *residual, function=function)
    mask = jnp.ones((6, 8), bool)
    choice = explain(axis=(1, 0), mask=mask, return_statistics=True)["tpu"]
    assert choice.implementation == "xla"
    with pytest.raises(ValueError, match="axis must lie between"):
        explain(axis=5)


def test_a_function_that_jax_has_compiled_is_explained_as_before():
    def first(params, x):
        return jln.layer_norm(params, x, custom_vjp=False)

    def body(x, _):
        return jln.layer_norm({}, x), None

    x = jnp.ones((4, 8))
    both = jax.jit(lambda params, x: jln.layer_norm(params, first(params, x)))
    scanned = lambda _, x: jax.lax.scan(body, x, None, 3)[0]  # noqa: E731
    for function in (jax.jit(first), both, scanned):
        fresh = jln.explain({}, x, function=function)
        jax.vjp(function, {}, x)[1](function({}, x))
        assert jln.explain({}, x, function=function) == fresh


@pytest.mark.usefixtures("marking_kernel")
def test_where_one_of_several_does_not_run_has_its_reason(x):
    def two_norms(params, x):
        return jln.layer_norm(params, jln.layer_norm(params, x), implementation="xla")

    choice = jln.explain({}, x, function=two_norms)["cpu"]
    assert {*choice.implementation.split(" and ")} == {"xla", "marking"}
    part = "in layer_norm_(forward|backward), "
    assert re.match(part + "implementation='xla'", choice.reasons["marking"])
    assert re.match(part + "marking is preferred", choice.reasons["xla"])
    assert choice.reasons["native_cpu"]


def test_a_function_without_a_gradient_is_explained():
    def constant(params, x):
        return jax.lax.stop_gradient(jln.layer_norm(params, x))

    def loop(params, x):
        params, x = jax.lax.stop_gradient((params, x))
        return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: norm(params, c), x)

    norm, x = jln.layer_norm, jnp.ones((4, 8))
    for function in (constant, loop):
        assert jln.explain({}, x, function=function) == jln.explain({}, x)


def test_a_function_without_a_norm_is_refused():
    with pytest.raises(ValueError, match="got one that calls none"):
        jln.explain({}, jnp.ones((4, 8)), function=lambda params, x: x)


def test_the_reasons_are_those_of_the_others():
    implementations.needed("native_cpu")
    x = jnp.ones((4, 8))
    for name in (None, "xla"):
        for choice in jln.explain({}, x, implementation=name).values():
            assert {*choice.reasons} == {*_kernels.KERNELS} - {choice.implementation}
    choice = jln.explain({}, x, implementation="xla")["cpu"]
    assert choice.reasons["native_cpu"] == "implementation='xla' was asked for"


def test_nothing_is_computed():
    shape = jax.ShapeDtypeStruct((2**20, 2**20), "float32")  # four terabytes
    assert jln.explain({}, shape)["cpu"].implementation in _kernels.KERNELS


def test_the_command_prints_versions_devices_and_the_choices():
    command = [sys.executable, "-m", "jax_layernorm"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"jax {jax.__version__}" in printed
    assert "cpu device(s)" in printed
    assert printed.count("tpu   xla") == 5


@pytest.mark.parametrize(
    ("implementation", "reason"),
    (
        (None, "jax.vmap maps parameters alone"),
        ("xla", "jax.vmap maps parameters alone"),
        (
            "native_cpu",
            "implementation='native_cpu' cannot run the norm with its mapped",
        ),
    ),
)
def test_parameters_that_are_mapped_alone_are_the_reason(implementation, reason):
    implementations.needed("native_cpu")
    norm = functools.partial(jln.layer_norm, implementation=implementation)
    with _kernels.record_decisions() as decisions:
        jax.eval_shape(
            jax.vmap(norm, (0, None)), {"scale": jnp.ones((3, 8))}, jnp.ones((4, 8))
        )
    (decision,) = decisions
    assert decision.chosen == "xla"
    assert decision.reasons["native_cpu"].startswith(reason)
