"""A norm split over devices has the right collectives, and the unsplit norm's values."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion")

FEATURES = 64
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
LAYOUTS = {  # of x and of the parameters over a mesh of 2 ("data") by 4 ("model")
    "batch": (P("data", None, None), P(None)),
    "features": (P(None, None, "model"), P("model")),
    "both": (P("data", None, "model"), P("model")),
}
ADD = (jln.add_layer_norm, jln.add_rms_norm)
FUNCTIONS = (jln.layer_norm, jln.add_rms_norm)
"""With and without a mean, with and without a residual."""


def draw(*shape, seed, offset=0.0):
    a = np.random.default_rng(seed).normal(size=shape) + offset
    return jnp.asarray(a, jnp.float32)


def data(function, offset=0.0):
    """The parameters, and `x` or `x` and the residual."""
    params = {"scale": draw(FEATURES, seed=0) + 1, "bias": draw(FEATURES, seed=1)}
    x = draw(4, 6, FEATURES, seed=2, offset=offset)
    return params, x, *((draw(4, 6, FEATURES, seed=3),) if function in ADD else ())


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def placed(arguments, mesh, layout):
    of_x, of_params = LAYOUTS[layout]
    return jax.tree.map(
        lambda a: jax.device_put(
            a, NamedSharding(mesh, of_params if a.ndim == 1 else of_x)
        ),
        arguments,
    )


def collectives(function, *arguments):
    """The collectives of the compiled program, in its order."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return re.findall(rf" = [^=\n]*?\b({COLLECTIVES})(?:-start)?\(", text)


def forward_and_backward(function, arguments, **options):
    """The function, its pullback, and a cotangent for it."""
    out, pullback = jax.vjp(functools.partial(function, **options), *arguments)
    return out, pullback, jax.tree.map(jnp.cos, out)


def values_and_gradients(function, arguments, **options):
    def run(*arguments):
        out, pullback, cotangent = forward_and_backward(function, arguments, **options)
        return out, pullback(cotangent)

    return jax.tree.map(np.asarray, jax.jit(run)(*arguments))


def assert_same(actual, expected):
    """To a few roundings of float32, because sums are taken in another order."""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6),
        actual,
        expected,
    )


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sharded_norm_is_the_unsharded_one(function, layout, kind):
    arguments = data(function)
    expected = values_and_gradients(function, arguments, return_statistics=True)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        split = placed(arguments, mesh, layout)
        actual = values_and_gradients(function, split, return_statistics=True)
    assert_same(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_collectives_under_automatic_axes(function, layout):
    mesh = mesh_of(AxisType.Auto)
    arguments = placed(data(function), mesh, layout)
    forward = collectives(function, *arguments)
    _, pullback, cotangent = forward_and_backward(function, arguments)
    backward = collectives(lambda pullback, dy: pullback(dy), pullback, cotangent)
    of_rows = {"batch": 0, "features": 3, "both": 3}[layout]
    assert forward.count("all-reduce") == len(forward) <= of_rows
    of_both = {"batch": 1, "features": 1, "both": 2}[layout]
    assert backward.count("all-reduce") == len(backward) == of_both


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_collectives_under_explicit_axes(function, layout):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = placed(data(function), mesh, layout)
        forward = collectives(function, *arguments)
        _, pullback, cotangent = forward_and_backward(function, arguments)
        backward = collectives(lambda pullback, dy: pullback(dy), pullback, cotangent)
    assert len(forward) == (0 if layout == "batch" else 1)
    assert backward == ["all-reduce"] * {"batch": 1, "features": 1, "both": 2}[layout]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_one_collective_moves_a_few_numbers_a_row(function):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = placed(data(function), mesh, "features")
        text = jax.jit(function).lower(*arguments).compile().as_text()
    (shape,) = re.findall(r" = f32\[([\d,]+)\][^=\n]*?\ball-gather(?:-start)?\(", text)
    moved = np.prod([int(n) for n in shape.split(",")])
    assert moved <= 4 * 3 * (4 * 6)  # four devices, three numbers, rows


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_in_shard_map_it_is_the_unsharded_norm(function, layout, check_vma):
    arguments = data(function)
    expected = values_and_gradients(function, arguments, return_statistics=True)
    of_x, of_params = LAYOUTS[layout]
    named = {} if layout == "batch" else {"axis_name": "model"}
    rows = P(*of_x[:-1], "model" if named else None)  # one copy on each device
    count = 2 if function in ADD else 1

    def local(*arguments):
        *out, statistics = function(*arguments, **named, return_statistics=True)
        return *out, statistics

    sharded = jax.shard_map(
        local,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(of_params, *(of_x,) * count),
        out_specs=(*(of_x,) * count, jln.Statistics(rows, rows)),
        check_vma=check_vma,
    )

    def run(*arguments):
        out, pullback = jax.vjp(sharded, *arguments)
        # Only the last of each row's copies of the statistics gets a cotangent.
        own = jax.tree.map(jnp.cos, out)
        last = jax.tree.map(lambda a: a.at[..., :-1].set(0), own[-1])
        gradients = pullback((*own[:-1], last))
        return (*out[:-1], jax.tree.map(lambda a: a[..., -1:], out[-1])), gradients

    assert_same(jax.tree.map(np.asarray, jax.jit(run)(*arguments)), expected)


@pytest.mark.parametrize("layout", ("features", "both"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_collectives_in_shard_map(function, layout):
    of_x, of_params = LAYOUTS[layout]
    count = 2 if function in ADD else 1
    sharded = jax.shard_map(
        functools.partial(function, axis_name="model"),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(of_params, *(of_x,) * count),
        out_specs=(of_x,) * count if count > 1 else of_x,
    )
    arguments = placed(data(function), mesh_of(AxisType.Auto), layout)
    assert collectives(sharded, *arguments) == ["all-gather"]
    _, pullback, cotangent = forward_and_backward(sharded, arguments)
    backward = collectives(lambda pullback, dy: pullback(dy), pullback, cotangent)
    assert backward == ["all-reduce"] * {"features": 1, "both": 2}[layout]


@pytest.mark.parametrize("offset", (0.0, 1e2, 1e4, 1e6))
def test_splitting_the_features_costs_no_accuracy(offset):
    params, x = data(jln.layer_norm, offset)
    dy = draw(*x.shape, seed=4)
    expected = oracle.norm(x, params["scale"], params["bias"], dy)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = placed((params, x, dy), mesh, "features")
        y, pullback = jax.vjp(jln.layer_norm, *split[:2])
        dparams, dx = pullback(split[2])
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=24)


@pytest.mark.parametrize("given", ("scale and bias", "nothing"))
def test_replicated_parameters_get_replicated_gradients(given):
    params, x = data(jln.layer_norm)
    params = params if given != "nothing" else {}
    gradient = jax.grad(lambda p, x: jnp.sum(jnp.sin(jln.layer_norm(p, x))), (0, 1))
    expected = gradient(params, x)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        params = jax.device_put(params, NamedSharding(mesh, P(None)))
        actual = jax.jit(gradient)(params, x)
    for gradient in jax.tree.leaves(actual[0]):
        assert gradient.sharding.spec == P(None)
    assert_same(jax.tree.map(np.asarray, actual), expected)


@pytest.mark.parametrize(
    "spec",
    (P("data"), P(None, "model"), P("data", "model"), P(None, None, "model")),
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "named"),
    ((AxisType.Explicit, None), (AxisType.Auto, "data")),
    ids=("explicit", "spmd_axis_name"),
)
def test_vmap_over_an_axis_of_the_mesh(spec, kind, named):
    params, _ = data(jln.layer_norm)
    x = draw(4, 8, FEATURES, seed=2)

    def per_example(params, x):
        y, pullback = jax.vjp(jln.layer_norm, params, x)
        return y, pullback(jnp.cos(x))

    def over_examples(params, x, named=None):
        return jax.jit(jax.vmap(per_example, (None, 0), spmd_axis_name=named))(
            params, x
        )

    expected = jax.tree.map(np.asarray, over_examples(params, x))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        actual = over_examples(params, split, named)
        assert_same(jax.tree.map(np.asarray, actual), expected)


@pytest.mark.parametrize("order", (1, 2))
def test_higher_derivatives_with_explicit_axes(order):
    x = data(jln.layer_norm)[1][:2, :2, :8]

    def loss(x):
        return jnp.sum(jnp.sin(jln.layer_norm({}, x)) * jnp.cos(x))

    derivative = functools.reduce(lambda f, _: jax.jacrev(f), range(order), loss)
    expected = derivative(x)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        assert_same(np.asarray(jax.jit(derivative)(split)), expected)


# Features split over an axis of vmap. Outputs that are the same for all members of the
# axis are where gradients go wrong most easily.


@pytest.mark.parametrize("custom_vjp", (True, False))
@pytest.mark.parametrize("outside", (True, False), ids=("outside", "inside"))
@pytest.mark.parametrize(
    ("function", "masked"),
    ((jln.layer_norm, True), (jln.rms_norm, False)),
)
def test_gradients_over_an_axis_of_vmap_are_those_of_the_unsplit_norm(
    function, masked, outside, custom_vjp
):
    x = draw(3, 4, 5, seed=0, offset=3.0)  # rows, parts, elements of each
    mask = np.random.default_rng(1).random((3, 4, 5)) > 0.3 if masked else None
    weights = draw(3, 4, 5, seed=2)
    if masked:
        mask[0, 1], mask[1, 0] = False, False  # parts without elements
    options = {"return_statistics": True, "custom_vjp": custom_vjp}

    def part(x, mask):
        return function({}, x, mask=mask, axis_name="part", **options)

    def split(x):
        over_parts = jax.vmap(
            part, (1, None if mask is None else 1), 1, axis_name="part"
        )
        y, (mean, rstd) = over_parts(x, mask)
        return y, mean[:, 0], rstd[:, 0]

    def whole(x):
        flat = None if mask is None else mask.reshape(3, 20)
        y, (mean, rstd) = function({}, x.reshape(3, 20), mask=flat, **options)
        return y.reshape(3, 4, 5), mean, rstd

    def loss(norm, x):
        y, mean, rstd = norm(x)
        return jnp.sum(weights * jnp.sin(y)) + jnp.sum(mean**2) + jnp.sum(rstd**3)

    assert_same(split(x), whole(x))
    expected = jax.grad(functools.partial(loss, whole))(x)
    if outside:
        assert_same(jax.grad(functools.partial(loss, split))(x), expected)
    else:

        def part_of_gradient(x, mask, weights):
            def own_loss(x):
                y, (mean, rstd) = part(x, mask)
                # Each part's loss takes a quarter of the shared statistics' terms.
                shared = jnp.sum(mean**2) + jnp.sum(rstd**3)
                return jnp.sum(weights * jnp.sin(y)) + shared / 4

            return jax.grad(own_loss)(x)

        axes = (1, None if mask is None else 1, 1)
        inside = jax.vmap(part_of_gradient, axes, 1, axis_name="part")
        assert_same(inside(x, mask, weights), expected)


def test_two_axis_names_split_the_rows_over_both():
    x = draw(3, 2, 4, 5, seed=0, offset=100.0)

    def split(x):
        inner = jax.vmap(
            lambda x: jln.layer_norm({}, x, axis_name=("i", "j")), 1, 1, axis_name="j"
        )
        return jax.vmap(inner, 1, 1, axis_name="i")(x)

    def whole(x):
        return jln.layer_norm({}, x.reshape(3, 40)).reshape(x.shape)

    assert_same(split(x), whole(x))
    for norm in (split, whole):
        assert norm(x).shape == x.shape
    gradients = [
        jax.grad(lambda x, norm=norm: jnp.sum(jnp.sin(norm(x)) * x))(x)
        for norm in (split, whole)
    ]
    assert_same(*gradients)


def test_statistics_of_split_features_come_out_of_shard_map():
    """Their type says that they vary, so they are stacked or averaged."""
    x = draw(4, FEATURES, seed=0)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    def statistics(x, **options):
        return jln.layer_norm({}, x, return_statistics=True, **options)[1]

    def local(x):
        stacked = statistics(x, axis_name="model")
        return stacked, jax.tree.map(lambda a: lax.pmean(a, "model"), stacked)

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=P(None, "model"),
        out_specs=(P(None, "model"), P()),
    )

    @jax.jit
    def values_and_gradients(x):
        def loss(out):
            return jnp.sum(jnp.sin(out.mean[:, :1]) * out.rstd[:, :1])

        whole = (statistics(x), jax.grad(lambda x: loss(statistics(x)))(x))
        parts = [jax.grad(lambda x, i=i: loss(split(x)[i]))(x) for i in range(2)]
        return split(x), parts, whole

    (stacked, averaged), gradients, (expected, gradient) = values_and_gradients(x)
    for got in (stacked, averaged):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b.repeat(a.shape[1], 1), rtol=1e-5)
    for got in gradients:
        np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kinds", (("Explicit",) * 3, ("Explicit", "Auto", "Explicit")))
def test_in_shard_map_over_one_axis_the_others_may_split_rows_and_features(kinds):
    kinds = tuple(getattr(AxisType, kind) for kind in kinds)
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=kinds)
    params, x = data(jln.layer_norm)

    def loss(norm):
        return lambda params, x: jnp.sum(jnp.sin(norm(params, x)))

    expected = jax.grad(loss(jln.layer_norm), (0, 1))(params, x)
    mapped = jax.shard_map(
        lambda params, x: jln.layer_norm(params, x),
        in_specs=(P(), P("a")), out_specs=P("a"), axis_names={"a"},
    )  # fmt: skip
    explicit = P(
        *(
            name if kind == AxisType.Explicit else None
            for name, kind in zip(mesh.axis_names, kinds, strict=True)
        )
    )
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, explicit))
        actual = jax.jit(jax.grad(loss(mapped), (0, 1)))(params, split)
    assert_same(actual, expected)


@pytest.mark.parametrize("function", (jln.layer_norm, jln.rms_norm))
def test_features_over_an_axis_of_vmap_and_rows_over_an_explicit_one(function):
    norm = functools.partial(function, {}, axis_name="features")
    over_parts = jax.vmap(norm, axis_name="features")
    x = draw(2, 8, 4, seed=0)
    expected = over_parts(x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
        assert_same(np.asarray(over_parts(split)), np.asarray(expected))


def test_an_axis_of_the_mesh_with_one_device_stays_in_the_types():
    """A program for several devices, with one example, runs on one device too."""
    mesh = jax.make_mesh((1, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def step(x, _):
        return jln.add_layer_norm({}, x * 2, x)[1], None

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 3, 8)), NamedSharding(mesh, P("data")))
        assert jax.typeof(step(x, None)[0]) == jax.typeof(x + x)
        last, _ = jax.lax.scan(step, x, None, length=2)
    np.testing.assert_array_equal(last, 9)
