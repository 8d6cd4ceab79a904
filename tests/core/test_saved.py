"""The backward pass keeps alive and computes only what the wanted gradients need."""

import functools
import re

import implementations
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

import jax_layernorm as jln
from jax_layernorm import _equations

ROWS, FEATURES = 48, 256
ADD = (jln.add_layer_norm, jln.add_rms_norm)
FUNCTIONS = (jln.layer_norm, jln.rms_norm, *ADD)


def saved_bytes(function, params, *arrays):
    _, vjp = jax.vjp(function, params, *arrays)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def a_row(function, width=4):
    """Numbers kept for each row: mean, its low-order word, rstd; rstd alone for RMS."""
    center = function in (jln.layer_norm, jln.add_layer_norm)
    return ROWS * width * (3 if center else 1)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_saved_are_x_scale_and_at_most_12_bytes_a_row(function, dtype):
    x = jnp.ones((ROWS, FEATURES), dtype)
    params = jln.init_params(FEATURES)
    arrays = (x, x) if function in ADD else (x,)  # of an add: the sum, not the summands
    expected = x.nbytes + params["scale"].nbytes + a_row(function)
    assert saved_bytes(function, params, *arrays) == expected
    assert expected <= x.nbytes + params["scale"].nbytes + 12 * ROWS


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_saved_are_at_most_24_bytes_a_row_in_float64(function):
    x = jnp.ones((ROWS, FEATURES), "float64")
    params = jln.init_params(FEATURES, dtype="float64")
    arrays = (x, x) if function in ADD else (x,)
    expected = x.nbytes + params["scale"].nbytes + a_row(function, 8)
    assert saved_bytes(function, params, *arrays) == expected


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bias_is_not_saved(function):
    x = jnp.ones((ROWS, FEATURES))
    arrays = (x, x) if function in ADD else (x,)
    without = saved_bytes(function, {}, *arrays)
    assert saved_bytes(function, {"bias": jnp.ones(FEATURES)}, *arrays) == without
    assert without == x.nbytes + a_row(function)


def test_the_sum_of_a_wide_residual_stream_is_saved_in_its_own_dtype():
    x, stream = jnp.ones((ROWS, FEATURES), "bfloat16"), jnp.ones((ROWS, FEATURES))
    saved = saved_bytes(jln.add_layer_norm, {}, x, stream)
    assert saved == stream.nbytes + a_row(jln.add_layer_norm)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_returned_statistics_are_saved_once(function):
    x = jnp.ones((ROWS, FEATURES))
    arrays = (x, x) if function in ADD else (x,)

    def with_statistics(*args):
        return function(*args, return_statistics=True)

    assert saved_bytes(with_statistics, {}, *arrays) == x.nbytes + a_row(function)


def test_a_remat_policy_can_save_exactly_the_statistics():
    x = jnp.ones((ROWS, FEATURES))
    policy = jax.checkpoint_policies.save_only_these_names("layer_norm_statistics")

    @jax.checkpoint
    def nothing_saved(x):
        return jnp.sin(jln.layer_norm({}, jnp.sin(x)))

    statistics_saved = jax.checkpoint(nothing_saved.__wrapped__, policy=policy)
    before = saved_bytes(nothing_saved, x)
    assert saved_bytes(statistics_saved, x) == before + a_row(jln.layer_norm)


def test_x_is_kept_and_not_copied():
    x = jnp.ones((ROWS, FEATURES))
    _, vjp = jax.vjp(functools.partial(jln.layer_norm, {}), x)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(vjp)]
    assert x.unsafe_buffer_pointer() in pointers


X, STATISTICS, SCALE, MASK = "x", "statistics", "scale", "mask"
WANTED = {  # the arguments whose gradients are wanted, and what is kept for them
    "x scale bias": (X, STATISTICS, SCALE),
    "x bias": (X, STATISTICS, SCALE),
    "x": (X, STATISTICS, SCALE),  # frozen parameters
    "scale bias": (X, STATISTICS),  # a constant x
    "scale": (X, STATISTICS),
    "bias": (),
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(
    ("function", "masked"), ((jln.layer_norm, False), (jln.add_rms_norm, True))
)
def test_kept_is_what_the_wanted_gradients_need(function, wanted, masked):
    x = jnp.ones((ROWS, FEATURES))
    arguments = {"x": x, **jln.init_params(FEATURES)}
    mask = jnp.ones((ROWS, FEATURES), bool) if masked else None

    def norm(given):
        x, scale, bias = ({**arguments, **given}[name] for name in arguments)
        arrays = (x, jnp.ones_like(x)) if function in ADD else (x,)
        return function({"scale": scale, "bias": bias}, *arrays, mask=mask)

    sizes = {
        X: x.nbytes,
        STATISTICS: a_row(function),
        SCALE: arguments["scale"].nbytes,
        MASK: x.size,
    }
    expected = sum(sizes[name] for name in WANTED[wanted]) + masked * sizes[MASK]
    _, vjp = jax.vjp(norm, {name: arguments[name] for name in wanted.split()})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) == expected


def backward_ops(jaxpr):
    """What the backward ops in a program compute: dx, dscale, dbias."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == _equations.BACKWARD:
            static = dict(equation.params["static"])
            yield (
                static["with_dx"],
                static["scale_shape"] is not None,
                static["bias_shape"] is not None,
            )
        for inner in jaxprs_in_params(equation.params):
            yield from backward_ops(inner)


def scanned(norm, params, x):
    def layer(x, _):
        return x + norm(params, x), None

    return jax.lax.scan(layer, x, length=2)[0]


def mapped(norm, params, x):
    return jax.vmap(functools.partial(norm, params))(x)


AROUND = {
    "nothing": lambda norm, params, x: norm(params, x),
    "jit": lambda norm, params, x: jax.jit(norm)(params, x),
    "jit of remat": lambda norm, params, x: jax.jit(jax.checkpoint(norm))(params, x),
    "remat": lambda norm, params, x: jax.checkpoint(norm)(params, x),
    "scan": scanned,
    "vmap": mapped,
}


@pytest.mark.parametrize("around", AROUND)
def test_only_wanted_gradients_are_computed(around):
    params, x = jln.init_params(FEATURES), jnp.ones((ROWS, FEATURES))
    run = functools.partial(AROUND[around], jln.layer_norm)

    def loss(given, frozen):
        given = {"scale": None, "bias": None, "x": None} | frozen | given
        x = given.pop("x")
        return jnp.sum(run(given, x) ** 2)

    everything = {**params, "x": x}
    for wanted in ("x scale bias", "x bias", "x scale", "x", "scale bias", "scale"):
        given = {name: everything[name] for name in wanted.split()}
        frozen = {name: everything[name] for name in everything if name not in given}
        jaxpr = jax.make_jaxpr(jax.grad(loss))(given, frozen)
        # A scan carries x, which the parameters of a layer change for the next.
        dx = "x" in given or around == "scan"
        assert {*backward_ops(jaxpr.jaxpr)} == {(dx, "scale" in given, "bias" in given)}
    bias = {"bias": params["bias"]}
    frozen = {"scale": params["scale"], "x": x}
    ops = [*backward_ops(jax.make_jaxpr(jax.grad(loss))(bias, frozen).jaxpr)]
    assert ops == ([(True, False, True)] if around == "scan" else [])


def cotangents(jaxpr):
    """Which cotangents (y, the sum, mean, rstd) each backward op in a program gets."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == _equations.BACKWARD:
            operands = jax.tree.unflatten(equation.params["treedef"], equation.invars)
            yield [operand is not None for operand in operands[-4:]]
        for inner in jaxprs_in_params(equation.params):
            yield from cotangents(inner)


def test_results_that_nothing_uses_have_no_cotangents():
    x = jnp.ones((ROWS, FEATURES))

    def used(which):
        def loss(x):
            out = jln.add_layer_norm({}, x, jnp.cos(x), return_statistics=True)
            return jnp.sum(jax.tree.leaves(out)[which])

        return jax.make_jaxpr(jax.grad(loss))(x).jaxpr

    assert [*cotangents(used(0))] == [[True, False, False, False]]  # y
    assert [*cotangents(used(1))] == []  # residual + x
    assert [*cotangents(used(2))] == [[True, False, True, False]]  # mean
    assert [*cotangents(used(3))] == [[True, False, False, True]]  # rstd


def test_the_gradient_of_scale_needs_the_cotangent_of_y_alone():
    x = jnp.ones((ROWS, FEATURES))

    def loss(scale):
        params = {"scale": scale}
        out = jln.add_layer_norm(params, x, x, return_statistics=True)
        return sum(jnp.sum(leaf * scale[0]) for leaf in jax.tree.leaves(out))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones(FEATURES)).jaxpr
    assert [*cotangents(jaxpr)] == [[True, False, False, False]]


def lowered(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text()


@pytest.mark.parametrize("around", ("nothing", "remat", "scan", "vmap"))
def test_a_program_that_uses_some_gradients_computes_those(around):
    """As if an optimizer freezes parameters after the gradients were taken."""
    implementations.needed("native_cpu")
    params, x = jln.init_params(FEATURES), jnp.ones((ROWS, FEATURES))
    run = functools.partial(AROUND[around], jln.layer_norm)

    def some(*names):
        def step(params, x):
            grads, dx = jax.grad(lambda p, x: jnp.sum(run(p, x) ** 2), (0, 1))(
                params, x
            )
            return [{**grads, "x": dx}[name] for name in names]

        return lowered(step, params, x)

    def computed(program):
        found = re.findall(r"with_(dx|dscale|dbias) = (true|false)", program)
        return {name for name, flag in found if flag == "true"}

    assert computed(some("x", "scale", "bias")) == {"dx", "dscale", "dbias"}
    assert computed(some("x", "bias")) == {"dx", "dbias"}
    assert computed(some("x")) == {"dx"}
    scanned = {"dx"} if around == "scan" else set()
    assert computed(some("scale")) == {"dscale"} | scanned


def test_what_only_dx_needs_is_not_computed_if_dx_is_not_used():
    """Here the scale and the cotangent of the sum."""
    x = jnp.ones((ROWS, FEATURES))

    def step(scale, x, dresidual_out):
        def norm(scale, x):
            return jln.add_layer_norm({"scale": scale}, x, x)

        _, pullback = jax.vjp(norm, jnp.sin(scale), x)
        dscale, _ = pullback((x, jnp.cos(dresidual_out)))
        return dscale

    program = lowered(step, x[0], x, x)
    assert "sine" in program  # the forward pass needs the scale
    assert "cosine" not in program


def test_statistics_that_a_program_does_not_use_are_not_computed():
    implementations.needed("native_cpu")

    def norm(x):
        return jln.layer_norm({}, x, return_statistics=True)

    x = jnp.ones((ROWS, FEATURES))
    assert "with_statistics = true" in lowered(norm, x)
    assert "with_statistics = true" in lowered(lambda x: norm(x)[1].rstd, x)
    assert "with_statistics = false" in lowered(lambda x: norm(x)[0], x)
    assert "custom_call" not in lowered(lambda x: (norm(x), x)[1], x)
