"""Placements together: names and meshes, masks, parameters per example, mixed axes.

Arrays are small, and each test has one `jax.jit`. The reference is the norm of the same
arrays on one device, which other tests compare with NumPy.
"""

import functools

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion", "quick_compilation")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
FUNCTIONS = (jln.layer_norm, jln.rms_norm)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def mesh_of(*kinds):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def value_and_gradients(norm, *arguments):
    """The value, and the gradients for a cotangent that differs in each element."""

    def run(*arguments):
        y, pullback = jax.vjp(norm, *arguments)
        return y, *pullback(jnp.cos(3 * y))

    return jax.tree.map(np.asarray, jax.jit(run)(*arguments))


def assert_same(actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_name_given_by_the_caller_joins_an_explicit_split_of_the_features(function):
    if jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12 lowers no psum over an axis of vmap under explicit axes")
    x = (
        draw(4, 2, 16) * jnp.array([1.0, 5.0])[None, :, None]
    )  # rows, parts, features of each

    def parts(x):
        norm = functools.partial(function, {}, axis_name="i")
        return jax.vmap(norm, 1, 1, axis_name="i")(x)

    def whole(x):
        return function({}, x.reshape(4, 32)).reshape(x.shape)

    expected = value_and_gradients(whole, x)
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    with jax.set_mesh(mesh):
        split = put(mesh, x, None, None, "model")
        assert_same(value_and_gradients(parts, split), expected)


@pytest.mark.parametrize("varying", ("scale", "bias", "x", "mask"))
def test_in_shard_map_any_argument_alone_may_vary(varying):
    arguments = {
        "scale": draw(2, 8, seed=1),
        "bias": draw(2, 8, seed=2),
        "x": draw(2, 3, 8, seed=3),
        "mask": draw(2, 3, 8, seed=4) > -1,
    }
    arguments = {
        key: value if key == varying else value[0] for key, value in arguments.items()
    }
    mask = arguments.pop("mask")

    def norm(arguments, mask):
        params = {key: arguments[key] for key in ("scale", "bias")}
        return jln.layer_norm(params, arguments["x"], mask=mask)

    def on_one(arguments, mask):
        axes = {key: 0 if key == varying else None for key in arguments}
        mapped = jax.vmap(norm, (axes, 0 if varying == "mask" else None))
        return mapped(arguments, mask)

    def split(key):
        return P("data") if key == varying else P()

    specs = ({key: split(key) for key in arguments}, split("mask"))

    def local(arguments, mask):
        alone = {k: v[0] if k == varying else v for k, v in arguments.items()}
        return norm(alone, mask[0] if varying == "mask" else mask)[None]

    sharded = jax.shard_map(
        local, mesh=mesh_of(AUTO, AUTO), in_specs=specs, out_specs=P("data")
    )
    expected, actual = (
        value_and_gradients(lambda a, f=f: f(a, mask), arguments)
        for f in (on_one, sharded)
    )
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("function", "kinds"),
    ((jln.layer_norm, (EXPLICIT, EXPLICIT)), (jln.rms_norm, (AUTO, AUTO))),
)
@pytest.mark.parametrize("shape", ((4, 6, 1), (1, 6, 1), (16,), (4, 6, 16)), ids=str)
def test_masks_of_every_shape_with_the_features_split(function, shape, kinds):
    x, mask = draw(4, 6, 16), draw(*shape, seed=1) > -0.3
    params = {"scale": draw(16, seed=2)}
    norm = functools.partial(function, mask=mask)
    expected = value_and_gradients(norm, params, x)
    mesh = mesh_of(*kinds)
    with jax.set_mesh(mesh):
        split = put(mesh, x, "data", None, "model")
        params = {"scale": put(mesh, params["scale"], None)}
        assert_same(value_and_gradients(norm, params, split), expected)


@pytest.mark.parametrize("spec", (P("data"), P(None, "model"), P("data", "model")))
@pytest.mark.parametrize("kinds", ((EXPLICIT, AUTO), (AUTO, EXPLICIT)), ids=str)
def test_a_mesh_may_have_automatic_and_explicit_axes(kinds, spec):
    x, params = draw(4, 16), {"scale": draw(16, seed=1), "bias": draw(16, seed=2)}
    expected = value_and_gradients(jln.layer_norm, params, x)
    mesh = mesh_of(*kinds)
    with jax.set_mesh(mesh):
        split = put(mesh, x, *spec)
        params = jax.tree.map(lambda p: put(mesh, p, None), params)
        assert_same(value_and_gradients(jln.layer_norm, params, split), expected)


@pytest.mark.parametrize("implementation", (None, *implementations.NAMES))
def test_parameters_of_each_example_are_split_with_the_rows(implementation):
    """A kernel sees the shapes of its shard, those of the gradients too."""
    if implementation is not None:
        implementations.needed(implementation)
    x = draw(4, 6, 16)
    params = {"scale": draw(4, 1, 16, seed=1), "bias": draw(16, seed=2)}
    norm = functools.partial(jln.layer_norm, implementation=implementation)
    expected = value_and_gradients(norm, params, x)
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    with jax.set_mesh(mesh):
        split = put(mesh, x, "data")
        params = {
            "scale": put(mesh, params["scale"], "data"),
            "bias": put(mesh, params["bias"], None),
        }
        actual = value_and_gradients(norm, params, split)
        lowered = jax.jit(norm).lower(params, split).as_text()
    assert_same(actual, expected)
    if implementation == "native_cpu":
        assert "jax_layernorm_forward" in lowered


def test_xla_may_be_named_with_axis_name():
    x = draw(3, 2, 8)

    def parts(x):
        norm = functools.partial(
            jln.layer_norm, {}, implementation="xla", axis_name="i"
        )
        return jax.vmap(norm, 1, 1, axis_name="i")(x)

    whole = jln.layer_norm({}, x.reshape(3, 16)).reshape(x.shape)
    assert_same(parts(x), whole)


@pytest.mark.parametrize("given", ("a scale", "nothing"))
def test_a_residual_needs_no_parameters_with_the_features_split(given):
    x, residual = draw(4, 16), draw(4, 16, seed=1)
    params = {"scale": draw(16, seed=2)} if given == "a scale" else {}

    def norm(params, x, residual):
        y, residual_out = jln.add_layer_norm(params, x, residual)
        return y + residual_out

    expected = value_and_gradients(norm, params, x, residual)
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    with jax.set_mesh(mesh):
        split = [put(mesh, array, None, "model") for array in (x, residual)]
        params = jax.tree.map(lambda p: put(mesh, p, None), params)
        assert_same(value_and_gradients(norm, params, *split), expected)
