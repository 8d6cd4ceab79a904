"""What holds for linen and NNX modules: dtypes, values, gradients, options, errors."""

import itertools

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax_cases import (
    APIS,
    AXES,
    FEATURES,
    FLOATS,
    INTEGERS,
    PARAM_DTYPES,
    PARAMS_AND_RESULTS,
    RESULT_DTYPES,
    ROWS,
    SHAPE,
    SUMS,
    as_function,
    as_functions,
    assert_agree,
    assert_equal,
    assert_right,
    draw,
    draw_params,
    dtypes,
    for_all,
    for_both,
    forward_and_gradients,
)

import jax_layernorm as jln


@pytest.mark.parametrize("use_scale", [True, False])
@for_all
def test_result_dtype_is_flaxs_for_every_combination(api, name, use_scale, x64):
    for x_dtype, param_dtype, dtype in itertools.product(
        (*FLOATS, *INTEGERS), PARAM_DTYPES, RESULT_DTYPES
    ):
        params = draw_params(name, param_dtype)
        if not use_scale:
            del params["scale"]
        arguments = params, jax.ShapeDtypeStruct(SHAPE, x_dtype)
        options = {"dtype": dtype, "param_dtype": param_dtype, "use_scale": use_scale}
        ours, flaxs = (
            jax.eval_shape(norm, *arguments).dtype
            for norm in as_functions(api, name, **options)
        )
        assert ours == flaxs, (x_dtype, param_dtype, dtype)


@pytest.mark.parametrize(("param_dtype", "dtype"), PARAMS_AND_RESULTS)
@pytest.mark.parametrize("x_dtype", FLOATS)
@for_both
def test_values_and_gradients_are_right_and_flaxs(
    name, x_dtype, param_dtype, dtype, x64
):
    case = FLOATS.index(x_dtype) + PARAMS_AND_RESULTS.index((param_dtype, dtype))
    api = [*APIS][(case + (name == "RMSNorm")) % 2]  # the two APIs alternate
    x, params = draw(0, *SHAPE, dtype=x_dtype), draw_params(name, param_dtype)
    ours, flaxs = as_functions(api, name, dtype=dtype, param_dtype=param_dtype)
    got, dy = forward_and_gradients(ours, params, x)
    want, _ = forward_and_gradients(flaxs, params, x)
    assert_right(name, got, dy, params, x)
    through_dtype = [dy.dtype] * 4  # NNX rounds x, scale and bias to it as well
    assert_agree(got, want, x_dtype, param_dtype, *through_dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@for_all
def test_integers_are_normalized_as_float32(api, name, dtype, x64):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, SHAPE), dtype)
    params = draw_params(name)
    ours, flaxs = (norm(params, x) for norm in as_functions(api, name))
    assert ours.dtype == jnp.float32
    oracle.assert_close(ours, oracle.norm(x, **params, center=name == "LayerNorm").y)
    assert_agree(ours, flaxs)


@for_all
def test_what_is_no_real_array_is_refused(api, name):
    norm, params = as_function(APIS[api][0], name), draw_params(name)
    with pytest.raises(TypeError, match=r"x must be .*; got dtype complex64"):
        norm(params, draw(0, *SHAPE) * 1j)
    with pytest.raises(ValueError, match=r"scalar, shape \(\)"):
        norm(params, jnp.float32(1))


@pytest.mark.parametrize("compiled", [jax.jit, lambda norm: norm], ids=("jit", "eager"))
@pytest.mark.parametrize("api", APIS)
def test_offset_costs_no_accuracy_where_flax_loses_all(api, compiled):
    x, params = draw(0, *SHAPE) + 1e4, draw_params("LayerNorm")
    ours, flaxs = as_functions(api, "LayerNorm")
    assert np.abs(flaxs(params, x) - oracle.norm(x, **params).y).max() > 1
    got, dy = forward_and_gradients(compiled(ours), params, x)
    assert_right("LayerNorm", got, dy, params, x)


@for_all
def test_flaxs_switches_of_accuracy_are_without_effect(api, name):
    x, params = draw(0, *SHAPE, dtype=jnp.bfloat16), draw_params(name)
    norms = APIS[api][0]
    want = as_function(norms, name)(params, x)
    switches = ["use_fast_variance", "force_float32_reductions"]
    for switch in switches[: 1 if api == "nnx" else 2]:
        assert_equal(as_function(norms, name, **{switch: False})(params, x), want)


@pytest.mark.parametrize("groups", ([[0, 1], [2, 3]], [[0]]), ids=str)
@for_all
def test_axis_index_groups_are_refused(api, name, groups):
    norm = as_function(APIS[api][0], name, axis_index_groups=groups)
    with pytest.raises(NotImplementedError, match="axis_index_groups must be None"):
        norm(draw_params(name), draw(0, *SHAPE))


@pytest.mark.parametrize("axes", AXES)
@for_all
def test_axes_are_flaxs(api, name, axes):
    reduction, features = AXES[axes]
    x = draw(0, 4, 6, FEATURES)
    listed = features if isinstance(features, tuple) else (features,)
    shape = tuple(x.shape[axis] for axis in listed)
    if api == "nnx":
        shape = (int(np.prod(shape)),)
    params = {key: draw(i, *shape) for i, key in enumerate(draw_params(name))}
    options = {"reduction_axes": reduction, "feature_axes": features}
    ours, flaxs = (
        forward_and_gradients(norm, params, x)[0]
        for norm in as_functions(api, name, **options)
    )
    assert_agree(ours, flaxs)


def test_linen_params_are_in_the_order_of_feature_axes():
    x = draw(0, 4, 6, FEATURES)
    norm = jln.linen.LayerNorm(reduction_axes=(1, 2), feature_axes=(2, 1))
    variables = norm.init(jax.random.key(0), x)
    assert variables["params"]["scale"].shape == (FEATURES, 6)
    scale = draw(1, FEATURES, 6)
    y = norm.apply({"params": {"scale": scale, "bias": 0 * scale}}, x)
    assert_agree(y, jln.layer_norm({"scale": scale.T}, x, axis=(1, 2)))


def test_parameters_that_do_not_fit_feature_axes_are_refused():
    norm = jln.nnx.LayerNorm(
        FEATURES, reduction_axes=(1, 2), rngs=flax.nnx.Rngs(0), use_bias=False
    )
    with pytest.raises(ValueError, match=r"must have shape \(5,\).*Are feature_axes"):
        norm(draw(0, 4, 6, 5))


@pytest.mark.parametrize("features", tuple(itertools.permutations((1, 2, 3))))
def test_linen_params_of_three_feature_axes_are_in_their_order(features):
    x, shape = draw(0, 2, 4, 3, 5), (4, 3, 5)
    stored = tuple(shape[axis - 1] for axis in features)
    scale = draw(1, *stored)
    axes = {"reduction_axes": (1, 2, 3), "feature_axes": features}
    norm = jln.linen.LayerNorm(**axes, use_bias=False)
    y = norm.apply({"params": {"scale": scale}}, x)
    in_the_order_of_x = jnp.transpose(scale, np.argsort(features))
    assert_agree(y, jln.layer_norm({"scale": in_the_order_of_x}, x, axis=(1, 2, 3)))


@for_all
def test_a_residual_in_the_place_of_the_mask_is_refused(api, name):
    x, params = draw(0, *SHAPE), draw_params(name)
    ours, _ = as_functions(api, name)
    with pytest.raises(TypeError, match=r"got float32. Write residual=\.\.\."):
        ours(params, x, mask=x)
    some = jnp.ones((*SHAPE[:-1], 1))  # as models pass masks of floats
    assert_agree(ours(params, x, mask=some), ours(params, x))


@pytest.mark.parametrize("kind", (bool, np.int32), ids=("booleans", "integers"))
@for_all
def test_where_the_mask_is_true_values_are_flaxs_and_elsewhere_0(api, name, kind):
    x, params = draw(0, *SHAPE), draw_params(name)
    mask = np.random.default_rng(1).random(SHAPE) > 0.3
    ours, flaxs = as_functions(api, name)
    y = ours(params, jnp.where(mask, x, jnp.nan), mask=mask.astype(kind))
    want = flaxs(params, x, mask=mask)
    assert_agree(y, jnp.where(mask, want, 0))
    assert_equal(ours(params, jnp.where(mask, x, 7), mask=mask), y)


@for_all
def test_over_a_mapped_axis_values_and_gradients_are_flaxs(api, name):
    x, params = draw(0, ROWS, 4, FEATURES), draw_params(name)
    ours, flaxs = (
        forward_and_gradients(
            jax.vmap(norm, (None, 1), 1, axis_name="parts"), params, x
        )[0]
        for norm in as_functions(api, name, axis_name="parts")
    )
    assert_agree(ours, flaxs)


def replaced_in_linen(x):
    with jln.linen.replace():
        norm = flax.linen.LayerNorm(use_bias=False, use_scale=False, axis_name="parts")
        return norm.apply({}, x)


def replaced_in_nnx(x):
    options = {"use_bias": False, "use_scale": False, "axis_name": "parts"}
    norm = flax.nnx.LayerNorm(8, **options, rngs=flax.nnx.Rngs(0))
    return jln.nnx.replace(norm)(x)


@pytest.mark.parametrize(
    "norm",
    (
        lambda x: jln.layer_norm({}, x, axis_name="parts"),
        lambda x: jln.layer_norm({}, x, axis_name="parts", custom_vjp=False),
        replaced_in_linen,
        replaced_in_nnx,
    ),
    ids=("layer_norm", "custom_vjp=False", "linen, replaced", "nnx, replaced"),
)
@pytest.mark.usefixtures("strict_promotion")
def test_over_a_mapped_axis_no_rank_is_promoted(norm):
    x = jnp.arange(80.0).reshape(2, 5, 8)
    rows = x.swapaxes(0, 1).reshape(5, 16)  # of 8 elements each in two parts

    def loss(x):
        return jnp.sum(jax.vmap(norm, axis_name="parts")(x) ** 3)

    expected = jln.layer_norm({}, rows).reshape(5, 2, 8).swapaxes(0, 1)
    got = jax.vmap(norm, axis_name="parts")(x)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    dx = jax.grad(lambda x: jnp.sum(jln.layer_norm({}, x) ** 3))(rows)
    expected = dx.reshape(5, 2, 8).swapaxes(0, 1)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-6)


@for_all
def test_last_axis_may_be_named_in_any_way(api, name):
    x, params, norms = draw(0, *SHAPE), draw_params(name), APIS[api][0]
    want = as_function(norms, name)(params, x)
    for reduction, features in ((1, -1), (-1, [1]), ((-1,), 1)):
        axes = {"reduction_axes": reduction, "feature_axes": features}
        assert_equal(as_function(norms, name, **axes)(params, x), want)


@pytest.mark.parametrize(("x_dtype", "residual_dtype", "dtype"), SUMS)
@for_all
def test_residual_gives_the_norm_of_the_very_sum_it_returns(
    api, name, x_dtype, residual_dtype, dtype, x64
):
    norm, params = as_function(APIS[api][0], name, dtype=dtype), draw_params(name)
    x, residual = draw(0, *SHAPE, dtype=x_dtype), draw(5, *SHAPE, dtype=residual_dtype)
    (y, residual_out), vjp = jax.vjp(
        jax.jit(lambda p, x, r: norm(p, x, residual=r)), params, x, residual
    )
    assert_equal(residual_out, residual + x)
    assert y.dtype == norm(params, x).dtype
    dy, dresidual_out = (
        draw(6, *SHAPE, dtype=y.dtype),
        draw(7, *SHAPE, dtype=residual_out.dtype),
    )
    grads, dx, dresidual = vjp((dy, dresidual_out))
    expected = oracle.norm(residual_out, **params, dy=dy, center=name == "LayerNorm")
    oracle.assert_close(y, expected.y)
    assert dtypes((dx, dresidual)) == dtypes((x, residual))
    want = expected.dx + np.asarray(dresidual_out, np.float64)
    for gradient in (dx, dresidual):
        size = expected.dx_size + np.abs(want).max()
        oracle.assert_close(gradient, want, against=size)
    for key, gradient in grads.items():
        oracle.assert_close(gradient, getattr(expected, f"d{key}"), summed=ROWS)


@for_all
def test_residual_of_another_shape_is_refused(api, name, x64):
    norm, params = as_function(APIS[api][0], name), draw_params(name)
    for dtype in (jnp.float32, jnp.float64):
        x = draw(0, *SHAPE, dtype=dtype)
        with pytest.raises(ValueError, match="residual must have the shape of x"):
            norm(params, x, residual=x[0])


@pytest.mark.parametrize(
    "transformed",
    [
        jax.jit,
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.jit(jax.vmap(jax.checkpoint(f), (None, 0))),
        lambda f: jax.grad(lambda p, x: jnp.vdot(f(p, x), draw(3, *SHAPE)), (0, 1)),
        lambda f: lambda p, x: f(flax.core.freeze(p), x),
    ],
    ids=("jit", "vmap", "vmap of remat", "grad", "FrozenDict"),
)
@for_all
def test_jaxs_transformations_agree_with_flax(api, name, transformed):
    x, params = draw(0, *SHAPE), draw_params(name)
    assert_agree(*(transformed(norm)(params, x) for norm in as_functions(api, name)))


@for_all
def test_forward_mode_needs_custom_vjp_false(api, name):
    primals = draw_params(name), draw(0, *SHAPE)
    tangents = draw_params(name), draw(8, *SHAPE)
    ours, flaxs = as_functions(api, name)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(ours, primals, tangents)
    ours = as_function(APIS[api][0], name, custom_vjp=False)
    assert_agree(*(jax.jvp(norm, primals, tangents) for norm in (ours, flaxs)))


@for_all
def test_scale_offset_of_one_with_zeros_is_a_scale_of_ones(api, name):
    params, x = draw_params(name), draw(0, *SHAPE)
    ones, zeros = jnp.ones(FEATURES), jnp.zeros(FEATURES)
    plain = as_function(APIS[api][0], name)
    gemma = as_function(APIS[api][0], name, scale_offset=1.0)
    want, _ = forward_and_gradients(plain, params | {"scale": ones}, x)
    got, _ = forward_and_gradients(gemma, params | {"scale": zeros}, x)
    assert_equal(got, want)


@for_all
def test_round_before_scale_is_that_of_the_functions(api, name, x64):
    params, x = draw_params(name), draw(0, *SHAPE, dtype=jnp.bfloat16)
    norm = as_function(APIS[api][0], name, round_before_scale=True)
    function = jln.layer_norm if name == "LayerNorm" else jln.rms_norm
    options = {"dtype": jnp.float32, "round_before_scale": True}
    want = function(params, x, **options)
    assert_equal(norm(params, x), want)
    assert not (norm(params, x) == as_function(APIS[api][0], name)(params, x)).all()
    y, residual = norm(params, x, residual=x)
    assert_equal(y, function(params, residual, **options))
    wide = as_function(APIS[api][0], name, round_before_scale=True, dtype="float64")
    with pytest.raises(ValueError, match="needs x in float64"):
        wide(params, x)


@for_all
def test_implementation_is_a_name_or_a_value_error(api, name):
    x, params, norms = draw(0, *SHAPE), draw_params(name), APIS[api][0]
    default = jln.explain(params, x)["cpu"].implementation
    named = as_function(norms, name, implementation=default)
    assert_equal(named(params, x), as_function(norms, name)(params, x))
    with pytest.raises(ValueError, match=r"implementation must be .* 'no such'"):
        as_function(norms, name, implementation="no such")(params, x)
