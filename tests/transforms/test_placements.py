"""Every pair of placements of x, scale, bias and residual that plain `jax.numpy` accepts.

Results and gradients have the types and values of plain `jax.numpy`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("quick_compilation")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS, FEATURES = 4, 8
BOTH = ("data", "model")
MATRIX = (P(), P("data"), P(None, "model"), P("data", "model"), P(BOTH))
VECTOR = (P(), P("data"), P("model"))
PLACES = {"x": MATRIX, "residual": (None, *MATRIX), "scale": VECTOR, "bias": VECTOR}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (ROWS, FEATURES), "residual": (ROWS, FEATURES)}
    return {
        name: np.float32(rng.normal(size=shapes.get(name, FEATURES))) for name in PLACES
    }


def plain(function, x, residual, scale, bias):
    """The norm, spelled out."""
    x = x if residual is None else residual + x
    c = x - x.mean(-1, keepdims=True) if function is jln.layer_norm else x
    y = c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-6) * scale + bias
    return y if residual is None else (y, x)


def ours(function, x, residual, scale, bias, **options):
    params = {"scale": scale, "bias": bias}
    if residual is None:
        return function(params, x, **options)
    add = jln.add_layer_norm if function is jln.layer_norm else jln.add_rms_norm
    return add(params, x, residual, **options)


def with_gradients(norm, case):
    y, pullback = jax.vjp(norm, *case)
    return y, pullback(jax.tree.map(lambda y: jnp.cos(3 * y), y))


def put(mesh, places):
    return tuple(
        None
        if place is None
        else jax.device_put(arrays()[name], NamedSharding(mesh, place))
        for name, place in zip(PLACES, places, strict=True)
    )


def accepted(places, explicit):
    """JAX's rule: explicit names split an axis in one way, and each splits one axis."""
    ways = (set(), set())  # in which rows and features are split
    for name, place in zip(PLACES, places, strict=True):
        axes = (None, *place) if name in ("scale", "bias") else place or ()
        for way, names in zip(ways, axes, strict=False):
            names = names if isinstance(names, tuple) else (names,)
            way.add(tuple(n for n in names if n in explicit))
    rows, features = (way - {()} for way in ways)
    used = [name for names in (*rows, *features) for name in names]
    return max(len(rows), len(features)) <= 1 and len(used) == len(set(used))


def every_pair(explicit):
    """A few accepted cases, in which every pair of two arrays' places occurs."""
    pairs = {
        places: set(itertools.combinations(enumerate(places), 2))
        for places in itertools.product(*PLACES.values())
        if accepted(places, explicit)
    }
    missing = set().union(*pairs.values())
    while missing:
        best = max(pairs, key=lambda places: len(pairs[places] & missing))
        yield best
        missing -= pairs[best]


@pytest.mark.parametrize(
    ("function", "kinds"),
    (
        (jln.layer_norm, (EXPLICIT, EXPLICIT)),
        (jln.rms_norm, (EXPLICIT, AUTO)),
        (jln.layer_norm, (AUTO, EXPLICIT)),
        (jln.rms_norm, (AUTO, AUTO)),
    ),
)
def test_every_pair_of_placements_is_as_in_plain_jax_numpy(function, kinds):
    mesh = jax.make_mesh((2, 2), BOTH, axis_types=kinds)
    explicit = [
        name for name, kind in zip(BOTH, kinds, strict=True) if kind is EXPLICIT
    ]
    run_plain = functools.partial(with_gradients, functools.partial(plain, function))
    run_ours = functools.partial(with_gradients, functools.partial(ours, function))
    expected = {}
    for without_residual in (False, True):
        case = [*map(jnp.asarray, arrays().values())]
        case[1] = None if without_residual else case[1]
        expected[without_residual] = jax.tree.map(np.asarray, run_plain(case))
    with jax.set_mesh(mesh):
        cases = {places: put(mesh, places) for places in every_pair(explicit)}
        results = jax.jit(lambda cases: [*map(run_ours, cases)])([*cases.values()])
        for (places, case), result in zip(cases.items(), results, strict=True):
            as_plain = jax.tree.leaves(jax.eval_shape(run_plain, case))
            for array, wanted in zip(jax.tree.leaves(result), as_plain, strict=True):
                if wanted.sharding is not None:  # None if no axis is explicit
                    assert jax.typeof(array).sharding == wanted.sharding, places
            close = functools.partial(
                np.testing.assert_allclose, rtol=2e-5, atol=5e-6, err_msg=str(places)
            )
            jax.tree.map(close, result, expected[places[1] is None])


def replaced_in_linen(params, x):
    with jln.linen.replace():
        return nn.LayerNorm().apply({"params": params}, x)


def replaced_in_nnx(params, x):
    norm = jln.nnx.replace(nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)))
    norm.scale, norm.bias = nnx.Param(params["scale"]), nnx.Param(params["bias"])
    return norm(x)


MODULES = {
    "linen": lambda params, x: jln.linen.LayerNorm().apply({"params": params}, x),
    "linen, replaced": replaced_in_linen,
    "nnx, replaced": replaced_in_nnx,
}


@pytest.mark.parametrize("norm", MODULES.values(), ids=MODULES)
def test_parameters_of_modules_may_be_placed_otherwise_than_x(norm):
    x, _, scale, bias = map(jnp.asarray, arrays().values())
    params = {"scale": scale, "bias": bias}

    def gradients(norm, params, x):
        return jax.grad(lambda *args: jnp.sum(norm(*args) ** 3), (0, 1))(params, x)

    expected = jax.tree.map(np.asarray, gradients(MODULES["linen"], params, x))
    with jax.set_mesh(jax.make_mesh((2, 2), BOTH, axis_types=(EXPLICIT,) * 2)):
        x, _, *placed = put(jax.sharding.get_mesh(), (P("data"), None, P("model"), P()))
        params = dict(zip(params, placed, strict=True))
        result = gradients(norm, params, x)
        assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, (params, x))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
    jax.tree.map(close, result, expected)
