"""What the functions return: dtypes, statistics, residual sums, options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion")

DTYPES = ("float32", "bfloat16", "float16")
ADDS = {jln.add_layer_norm: jln.layer_norm, jln.add_rms_norm: jln.rms_norm}
NORMS = {jln.layer_norm: True, jln.rms_norm: False}  # whether the mean is subtracted


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", NORMS)
def test_y_keeps_the_dtype_of_x_whatever_that_of_the_parameters(
    function, dtype, param_dtype
):
    x, params = draw(4, 8, dtype=dtype), jln.init_params(8, dtype=param_dtype)
    y, vjp = jax.vjp(function, params, x)
    dparams, dx = vjp(y)
    assert y.dtype == dx.dtype == x.dtype
    assert dparams["scale"].dtype == dparams["bias"].dtype == jnp.dtype(param_dtype)
    oracle.assert_close(y, oracle.norm(x, center=NORMS[function]).y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_sets_that_of_y_with_one_rounding_at_the_end(dtype):
    x, params = draw(16, 64), {"scale": draw(64, seed=1)}
    wide = jln.layer_norm(params, x)
    np.testing.assert_array_equal(
        jln.layer_norm(params, x, dtype=dtype), wide.astype(dtype)
    )


@pytest.mark.parametrize(
    "given", ((), ("scale",), ("bias",), ("scale", "bias")), ids=str
)
@pytest.mark.parametrize("function", NORMS)
def test_parameters_left_out_or_none_play_no_part(function, given):
    x, dy = draw(6, 32), draw(6, 32, seed=1)
    every = {"scale": draw(32, seed=2), "bias": draw(32, seed=3)}
    params = {key: every[key] if key in given else None for key in every}
    y, vjp = jax.vjp(function, params, x)
    expected = oracle.norm(
        x, params["scale"], params["bias"], dy, center=NORMS[function]
    )
    dparams, dx = vjp(dy)
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    assert set(key for key in every if dparams[key] is not None) == set(given)
    shorter = {key: every[key] for key in given}
    np.testing.assert_array_equal(function(shorter, x), y)


@pytest.mark.parametrize("function", NORMS)
def test_scale_offset_is_added_to_scale_in_float32(function):
    x, dy = draw(6, 32), draw(6, 32, seed=1)
    scale = draw(32, seed=2, dtype="bfloat16")
    norm = functools.partial(function, scale_offset=1.0)
    y, vjp = jax.vjp(norm, {"scale": scale}, x)
    expected = oracle.norm(x, scale, None, dy, center=NORMS[function], scale_offset=1.0)
    oracle.assert_close(y, expected.y)
    oracle.assert_close(vjp(dy)[1], expected.dx, against=expected.dx_size)
    np.testing.assert_array_equal(norm({}, x), function({}, x))  # no scale, no offset


@pytest.mark.parametrize("epsilon", (0.0, 1e-12, 1e-5, 1.0, 100, np.array(0.5)))
@pytest.mark.parametrize("function", NORMS)
def test_epsilon_is_added_to_the_variance(function, epsilon):
    x = draw(6, 32)
    expected = oracle.norm(x, center=NORMS[function], epsilon=epsilon)
    oracle.assert_close(function({}, x, epsilon=epsilon), expected.y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", NORMS)
def test_statistics_are_float32_and_keep_the_normalized_axis(function, dtype):
    x = draw(3, 5, 64, dtype=dtype) + jnp.asarray(100.0, dtype)
    y, statistics = function({}, x, return_statistics=True)
    expected = oracle.norm(x, center=NORMS[function])
    assert isinstance(statistics, jln.Statistics)
    assert statistics.mean.dtype == statistics.rstd.dtype == jnp.float32
    oracle.assert_close(statistics.mean, expected.mean)
    oracle.assert_close(statistics.rstd, expected.rstd)
    np.testing.assert_array_equal(y, function({}, x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("custom_vjp", (True, False))
@pytest.mark.parametrize("function", (*NORMS, *ADDS))
def test_gradients_flow_through_the_statistics(function, custom_vjp):
    arrays = [draw(4, 16, dtype="float64", seed=i) for i in range(2)]
    arrays = arrays if function in ADDS else arrays[:1]
    params = {"scale": draw(16, dtype="float64", seed=2)}
    weights = [draw(4, n, dtype="float64", seed=3 + n) for n in (16, 16, 1, 2)]

    def loss(params, *arrays):
        y, *residual_out, (mean, rstd) = function(
            params, *arrays, return_statistics=True, custom_vjp=custom_vjp
        )
        outputs = [y, *residual_out, mean, jnp.concatenate([rstd, rstd**2], axis=1)]
        weighted = [weights[0], *weights[1 : 1 + len(residual_out)], *weights[2:]]
        return sum(
            jnp.sum(w * jnp.sin(a)) for w, a in zip(weighted, outputs, strict=True)
        )

    arguments = (params, *arrays)
    gradients = jax.tree.leaves(
        jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)
    )
    leaves, treedef = jax.tree.flatten(arguments)
    for i, gradient in enumerate(gradients):
        direction = draw(*leaves[i].shape, dtype="float64", seed=20 + i)
        h = 1e-6

        def moved(step, i=i, direction=direction):
            shifted = list(leaves)
            shifted[i] = leaves[i] + step * direction
            return loss(*jax.tree.unflatten(treedef, shifted))

        slope = (moved(h) - moved(-h)) / (2 * h)
        np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-7)


def test_rms_norm_has_no_mean():
    x = draw(3, 8) + 5
    _, (mean, _) = jln.rms_norm({}, x, return_statistics=True)
    np.testing.assert_array_equal(mean, np.zeros((3, 1)))


@pytest.mark.parametrize("stream_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add_norm", ADDS)
def test_an_added_norm_is_the_norm_of_the_stored_sum(add_norm, dtype, stream_dtype):
    x, stream = draw(32, 64, dtype=dtype), draw(32, 64, dtype=stream_dtype, seed=1)
    params = {"scale": draw(64, seed=2), "bias": draw(64, seed=3)}
    y, residual_out = jax.jit(add_norm)(params, x, stream)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(residual_out, stream + x)
        assert residual_out.dtype == (stream + x).dtype
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, ADDS[add_norm](params, residual_out, dtype=dtype))


@pytest.mark.parametrize("stream_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add_norm", ADDS)
def test_an_added_norm_has_the_gradients_of_its_two_steps(
    add_norm, dtype, stream_dtype
):
    x, stream = draw(32, 64, dtype=dtype), draw(32, 64, dtype=stream_dtype, seed=1)
    params = {"scale": draw(64, seed=2), "bias": draw(64, seed=3)}
    (y, residual_out), vjp = jax.vjp(add_norm, params, x, stream)
    dy = draw(32, 64, seed=4, dtype=y.dtype)
    dresidual_out = draw(32, 64, seed=5, dtype=residual_out.dtype)
    dparams, dx, dstream = vjp((dy, dresidual_out))
    expected = oracle.norm(
        residual_out,
        params["scale"],
        params["bias"],
        dy,
        center=add_norm is jln.add_layer_norm,
    )
    both = expected.dx + np.asarray(dresidual_out, np.float64)
    size = expected.dx_size + np.abs(np.asarray(dresidual_out, np.float64)).max()
    for gradient, like in ((dx, x), (dstream, stream)):
        assert gradient.dtype == like.dtype
        # It is rounded first to the dtype of the sum, then to that of the summand.
        coarse = both.astype(residual_out.dtype)
        oracle.assert_close(gradient, np.asarray(coarse, np.float64), against=2 * size)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=32)
    oracle.assert_close(dparams["bias"], expected.dbias, summed=32)


@pytest.mark.parametrize("function", (*NORMS, *ADDS))
def test_custom_vjp_false_gives_the_same_values_and_gradients(function):
    arrays = (draw(8, 32), draw(8, 32, seed=1))[: 2 if function in ADDS else 1]
    params = {"scale": draw(32, seed=2), "bias": draw(32, seed=3)}

    def values_and_gradients(custom_vjp):
        out, vjp = jax.vjp(
            functools.partial(function, custom_vjp=custom_vjp), params, *arrays
        )
        return out, vjp(jax.tree.map(jnp.cos, out))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        values_and_gradients(True),
        values_and_gradients(False),
    )


@pytest.mark.parametrize("function", NORMS)
def test_naming_the_default_gives_its_bits(function):
    x = draw(8, 32)
    name = jln.explain({}, x, function=function)["cpu"].implementation
    named = function({}, x, implementation=name)
    np.testing.assert_array_equal(named, function({}, x))


def test_axis_may_name_the_last_axis_from_either_end():
    x = draw(2, 3, 16)
    for axis in (2, -1, (2,), (-1,), np.int64(2)):
        np.testing.assert_array_equal(
            jln.layer_norm({}, x, axis=axis), jln.layer_norm({}, x)
        )


@pytest.mark.parametrize("axis", ((1,), (0, 2), (2, 0), (-1, -3), (1, 2, 0)), ids=str)
@pytest.mark.parametrize("function", NORMS)
def test_any_axes_in_any_order_are_a_transpose_away_from_the_last(function, axis):
    x, dy = draw(4, 5, 6), draw(4, 5, 6, seed=1)
    shape = tuple(x.shape[a] for a in axis)
    params = {"scale": draw(*shape, seed=2), "bias": draw(*shape, seed=3)}
    others = [a for a in range(3) if a not in [b % 3 for b in axis]]
    order = (*others, *axis)

    def by_hand(params, x):
        moved = jnp.transpose(x, [a % 3 for a in order])
        flat = moved.reshape(*moved.shape[: len(others)], -1)
        flat_params = jax.tree.map(jnp.ravel, params)
        y = function(flat_params, flat).reshape(moved.shape)
        return jnp.transpose(y, np.argsort([a % 3 for a in order]))

    y, vjp = jax.vjp(functools.partial(function, axis=axis), params, x)
    expected, expected_vjp = jax.vjp(by_hand, params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (y, vjp(dy)), (expected, expected_vjp(dy)))


@pytest.mark.parametrize("function", (*NORMS, *ADDS))
def test_parameters_of_each_example_get_gradients_of_their_own_shape(function):
    arrays = (draw(4, 5, 8), draw(4, 5, 8, seed=1))[: 2 if function in ADDS else 1]
    params = {"scale": draw(4, 1, 8, seed=2), "bias": draw(1, 5, 1, seed=3)}

    def adaptive(params, *arrays):
        out = function(params, *arrays)
        return out[0] if function in ADDS else out

    def by_hand(params, *arrays):
        out = function({}, *arrays)
        y = out[0] if function in ADDS else out
        return y * params["scale"] + params["bias"]

    y, vjp = jax.vjp(adaptive, params, *arrays)
    expected, expected_vjp = jax.vjp(by_hand, params, *arrays)
    dy = draw(4, 5, 8, seed=4)
    assert jax.tree.map(jnp.shape, vjp(dy)[0]) == jax.tree.map(jnp.shape, params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (y, vjp(dy)), (expected, expected_vjp(dy)))


def test_a_parameter_of_each_example_may_have_one_feature():
    x, scale = draw(4, 5, 1), draw(4, 1, 1, seed=1)
    norm = functools.partial(jln.rms_norm, x=x, implementation="xla")
    y, vjp = jax.vjp(norm, {"scale": scale})
    dscale = vjp(jnp.ones_like(y))[0]["scale"]
    np.testing.assert_allclose(dscale, norm({}).sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("function", NORMS)
def test_the_gradient_of_the_bias_alone_is_summed_in_float32(function):
    x, bias = draw(257, 8).astype("bfloat16"), {"bias": jnp.zeros(8)}
    gradients = jax.grad(lambda bias: function(bias, x).astype("float32").sum())(bias)
    assert (gradients["bias"] == 257).all()  # 256 in bfloat16


def test_numpy_arrays_and_other_mappings_are_taken():
    from types import MappingProxyType

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    params = {"scale": np.full(8, 2, np.float32), "bias": None}
    y = jln.layer_norm(MappingProxyType(params), x)
    np.testing.assert_array_equal(y, jln.layer_norm({"scale": jnp.full(8, 2.0)}, x))


def test_a_length_of_0_gives_empty_parameters():
    assert jln.init_params((3, 0), bias=False)["scale"].shape == (3, 0)


def test_init_params_makes_the_tree_that_flax_stores():
    params = jln.init_params(5)
    assert list(params) == ["scale", "bias"]
    np.testing.assert_array_equal(params["scale"], np.ones(5))
    np.testing.assert_array_equal(params["bias"], np.zeros(5))
    assert list(jln.init_params(5, bias=False)) == ["scale"]
    assert jln.init_params(5, scale=False, dtype="bfloat16")["bias"].dtype == "bfloat16"
    assert jln.init_params((2, 3))["scale"].shape == (2, 3)
