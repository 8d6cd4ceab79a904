"""Bad calls: each raises before any computation, and states the rule and the fix."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jax_layernorm as jln

X = jnp.ones((2, 3, 8))
F8 = jnp.ones((2, 8), jnp.float8_e4m3fn)
BOXED = linen.Partitioned(jnp.ones(8), ("features",))


class Foreign:
    """Stands for a tensor of torch, which the tests do not install."""


Foreign.__module__, Foreign.__qualname__ = "torch", "Tensor"

# Each row: what is wrong, the call's arguments, the error, and what its message says.
BAD_X = [
    ("a list", [1.0, 2.0], TypeError, "jnp.asarray(x)"),
    ("a number", 1.0, TypeError, "got float"),
    ("a string", "x", TypeError, "got str"),
    ("None", None, TypeError, "must be a JAX or NumPy array"),
    ("a torch tensor", Foreign(), TypeError, "x.detach().numpy()"),
    ("params", {"scale": jnp.ones(8)}, TypeError, "got dict. Did you swap"),
    ("a masked array", np.ma.ones((2, 8)), TypeError, "mask"),
    (
        "the other byte order",
        np.ones((2, 8), np.dtype("f4").newbyteorder()),
        TypeError,
        "byte order",
    ),
    ("an array of objects", np.array(["a"], object), TypeError, "got dtype object"),
    ("integers", jnp.ones((2, 8), int), TypeError, "got dtype int32"),
    ("NumPy integers", np.ones((2, 8), int), TypeError, "got dtype int"),
    ("booleans", jnp.ones((2, 8), bool), TypeError, "got dtype bool"),
    ("complex", jnp.ones((2, 8), complex), TypeError, "got dtype complex64"),
    ("float8", F8, TypeError, "got dtype float8_e4m3fn"),
    ("keys", jax.random.key(0), TypeError, "got dtype key"),
    ("a scalar", jnp.float32(1), ValueError, "at least one axis"),
]
BAD_PARAMS = [
    ("None", None, TypeError, "must be a mapping"),
    ("a tuple", (jnp.ones(8), jnp.zeros(8)), TypeError, "got tuple"),
    ("an array", jnp.ones(8), TypeError, "must be a mapping"),
    ("a module", nnx.LayerNorm(8, rngs=nnx.Rngs(0)), TypeError, "nnx.state(module)"),
    ("an unknown key", {"gain": jnp.ones(8)}, ValueError, "got ['gain']"),
    ("torch's key", {"weight": jnp.ones(8)}, ValueError, "is called scale here"),
    ("variables", {"params": {}}, ValueError, "variables['params']"),
    ("short", {"scale": jnp.ones(7)}, ValueError, "must have shape (8,)"),
    ("short bias", {"bias": jnp.ones(7)}, ValueError, "params['bias'] must have"),
    ("one long", {"scale": jnp.ones(1)}, ValueError, "got (1,)"),
    ("of rank 0", {"scale": jnp.ones(())}, ValueError, "got ()"),
    ("of rank 2", {"scale": jnp.ones((3, 8))}, ValueError, "got (3, 8)"),
    ("of rank 4", {"scale": jnp.ones((1, 1, 1, 8))}, ValueError, "rank 3 and broad"),
    ("unfit of rank 3", {"scale": jnp.ones((5, 1, 8))}, ValueError, "got (5, 1, 8)"),
    ("too wide", {"scale": jnp.ones((2, 2, 8))}, ValueError, "got (2, 2, 8)"),
    ("integers", {"scale": jnp.ones(8, int)}, TypeError, "params['scale'] must be an"),
    ("float8", {"bias": jnp.ones(8, F8.dtype)}, TypeError, "got dtype float8"),
    ("complex", {"bias": jnp.ones(8, complex)}, TypeError, "got dtype complex64"),
    ("a list", {"scale": [1.0] * 8}, TypeError, "jnp.asarray(params['scale'])"),
    ("a number", {"scale": 1.0}, TypeError, "got float"),
    ("boxed", {"scale": BOXED}, TypeError, "flax.linen.meta.unbox(params)"),
]
BAD_OPTIONS = [
    ({"axis": 3}, ValueError, "between -3 and 2 for x of rank 3; got 3"),
    ({"axis": -4}, ValueError, "between -3 and 2"),
    ({"axis": ()}, ValueError, "at least one axis"),
    ({"axis": (2, 2)}, ValueError, "name each axis once; got (2, 2)"),
    ({"axis": (-1, 2)}, ValueError, "name each axis once"),
    ({"axis": None}, TypeError, "integer or a tuple of integers; got None"),
    ({"axis": 1.0}, TypeError, "got 1.0"),
    ({"axis": True}, TypeError, "got True"),
    ({"axis": "features"}, TypeError, "got 'features'"),
    ({"axis": [2]}, TypeError, "got [2]"),
    ({"axis": (1, -2)}, ValueError, "name each axis once; got (1, -2)"),
    ({"axis": (0, 3)}, ValueError, "between -3 and 2 for x of rank 3; got (0, 3)"),
    ({"epsilon": -1e-6}, ValueError, "zero or positive"),
    ({"epsilon": float("nan")}, ValueError, "got nan"),
    ({"epsilon": float("inf")}, ValueError, "got inf"),
    ({"epsilon": 1e39}, ValueError, "finite in float32"),
    ({"epsilon": "1e-6"}, TypeError, "of type str"),
    ({"epsilon": None}, TypeError, "of type NoneType"),
    ({"epsilon": True}, TypeError, "of type bool"),
    ({"epsilon": 1j}, TypeError, "of type complex"),
    ({"epsilon": jnp.float32(1e-6)}, TypeError, "must be a Python number"),
    ({"scale_offset": float("nan")}, ValueError, "finite in float32; got nan"),
    ({"scale_offset": float("-inf")}, ValueError, "got -inf"),
    ({"scale_offset": 1e39}, ValueError, "finite in float32; got 1e+39"),
    ({"scale_offset": "1"}, TypeError, "of type str"),
    ({"scale_offset": jnp.ones(8)}, TypeError, "must be a Python number"),
    ({"dtype": "int32"}, TypeError, "got 'int32'"),
    ({"dtype": bool}, TypeError, "or None for that of x"),
    ({"dtype": "float33"}, TypeError, "got 'float33'"),
    ({"dtype": jnp.float8_e5m2}, TypeError, "dtype must be bfloat16"),
    ({"dtype": jnp.complex64}, TypeError, "dtype must be bfloat16"),
    ({"dtype": 3}, TypeError, "got 3"),
    ({"dtype": jnp.float64}, ValueError, "jax_enable_x64"),
    ({"mask": jnp.ones(8)}, TypeError, "mask must be an array of booleans"),
    ({"mask": np.ones(8, int)}, TypeError, "as with mask != 0"),
    ({"mask": [True] * 8}, TypeError, "mask must be a JAX or NumPy array; got"),
    ({"mask": True}, TypeError, "got bool"),
    ({"mask": jnp.ones(7, bool)}, ValueError, "got shape (7,)"),
    ({"mask": jnp.ones((3, 3, 8), bool)}, ValueError, "x of shape (2, 3, 8)"),
    ({"mask": jnp.ones((2, 3), bool)}, ValueError, "pass mask[..., None]"),
    ({"mask": jnp.ones(2, bool)}, ValueError, "pass mask[..., None, None]"),
    ({"mask": jnp.ones((2, 8), bool)}, ValueError, "as with mask[:, None]"),
    ({"mask": jnp.ones((1, 2, 3, 8), bool)}, ValueError, "more axes than x"),
    ({"axis_name": "i"}, ValueError, "mapped around the call; got 'i'"),
    ({"axis_name": ("i", "j")}, ValueError, "mapped around the call; got 'i'"),
    ({"axis_name": ()}, ValueError, "at least one axis, and each once; got ()"),
    ({"axis_name": ("i", "i")}, ValueError, "each once; got ('i', 'i')"),
    ({"axis_name": 0}, TypeError, "a string or a tuple of strings; got 0"),
    ({"axis_name": ["i"]}, TypeError, "a string or a tuple of strings; got ['i']"),
    ({"return_statistics": 1}, TypeError, "must be True or False; got 1"),
    ({"custom_vjp": None}, TypeError, "must be True or False; got None"),
    ({"implementation": "gpu"}, ValueError, "must be None or one of 'cuda'"),
    ({"implementation": True}, ValueError, "got True"),
    ({"implementation": ["xla"]}, ValueError, "got ['xla']"),
    (
        {"implementation": "pallas_tpu", "custom_vjp": False},
        ValueError,
        "Drop one of the two arguments",
    ),
]
BAD_RESIDUALS = [
    ("None", None, TypeError, "residual must be a JAX or NumPy array"),
    ("a number", 0.0, TypeError, "got float"),
    ("integers", jnp.ones((2, 3, 8), int), TypeError, "residual must be an array"),
    ("one row", jnp.ones(8), ValueError, "the shape of x, (2, 3, 8); got (8,)"),
    ("a broadcast batch", jnp.ones((1, 3, 8)), ValueError, "jnp.broadcast_to"),
    ("longer", jnp.ones((2, 3, 9)), ValueError, "got (2, 3, 9)"),
]
BAD_FEATURES = [
    (-1, ValueError, "none negative; got -1"),
    ((), ValueError, "at least one length"),
    (2.0, TypeError, "got 2.0"),
    (True, TypeError, "got True"),
    ("8", TypeError, "got '8'"),
    ([8], TypeError, "got [8]"),
]


def raises(error, says):
    return pytest.raises(error, match=re.escape(says))


def names(rows):
    return [str(row[0]) for row in rows]


@pytest.mark.parametrize(("_", "x", "error", "says"), BAD_X, ids=names(BAD_X))
def test_bad_x_is_refused(_, x, error, says):
    with raises(error, says):
        jln.layer_norm({}, x)


@pytest.mark.parametrize(
    ("_", "params", "error", "says"), BAD_PARAMS, ids=names(BAD_PARAMS)
)
def test_bad_params_are_refused(_, params, error, says):
    with raises(error, says):
        jln.rms_norm(params, X)


@pytest.mark.parametrize(
    ("options", "error", "says"), BAD_OPTIONS, ids=names(BAD_OPTIONS)
)
def test_bad_options_are_refused(options, error, says):
    with raises(error, says):
        jln.layer_norm({}, X, **options)


def test_numpys_float64_is_float32_without_x64():
    y = jln.layer_norm({"scale": np.ones(8)}, np.ones((2, 8)))
    assert y.dtype == jnp.float32


def test_the_error_of_a_named_implementation_names_the_platform():
    traced = jax.jit(lambda x: jln.layer_norm({}, x, implementation="pallas_tpu"))
    with raises(NotImplementedError, "layer_norm_forward on 'cpu': it supports TPUs"):
        traced.lower(X)


def test_an_offset_that_is_rounded_must_be_finite_then():
    params = {"scale": jnp.ones(8, jnp.float16)}
    jln.layer_norm(params, X, scale_offset=-1e5)
    jln.layer_norm(params, X, scale_offset=-6e4, round_before_scale=True)
    with raises(ValueError, "finite in float16; got -100000.0"):
        jln.layer_norm(params, X, scale_offset=-1e5, round_before_scale=True)


@pytest.mark.parametrize(
    ("_", "residual", "error", "says"), BAD_RESIDUALS, ids=names(BAD_RESIDUALS)
)
def test_bad_residuals_are_refused(_, residual, error, says):
    with raises(error, says):
        jln.add_layer_norm({}, X, residual)


@pytest.mark.parametrize(
    ("features", "error", "says"), BAD_FEATURES, ids=names(BAD_FEATURES)
)
def test_bad_features_are_refused(features, error, says):
    with raises(error, says):
        jln.init_params(features)


@pytest.mark.parametrize("dtype", ("int32", None, "float33"))
def test_bad_dtypes_of_params_are_refused(dtype):
    with raises(TypeError, f"got {dtype!r}"):
        jln.init_params(8, dtype=dtype)


@pytest.mark.parametrize("name", ("epsilon", "scale_offset"))
def test_traced_static_arguments_are_refused(name):
    def norm(value):
        return jln.layer_norm({}, X, **{name: value})

    with raises(TypeError, "got a traced value"):
        jax.jit(norm)(1e-6)


FUNCTIONS = (jln.layer_norm, jln.rms_norm, jln.add_layer_norm, jln.add_rms_norm)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_misspelled_keyword_is_refused_with_the_functions_name(function):
    arrays = (X, X) if "add" in function.__name__ else (X,)
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\).* 'eps'"):
        function({}, *arrays, eps=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_signatures_show_the_keywords_of_layer_norm(function):
    shown = inspect.signature(function).parameters
    arrays = ["params", "x", *["residual"] * ("add" in function.__name__)]
    expected = inspect.signature(jln.layer_norm).parameters
    assert [*shown] == [*arrays, *[*expected][2:]]
    assert all(shown[name] == expected[name] for name in shown if name in expected)


@pytest.mark.parametrize("function", (jln.rms_norm, jln.add_layer_norm))
def test_every_function_checks(function):
    arrays = (X, X) if function is jln.add_layer_norm else (X,)
    with raises(ValueError, "epsilon must be"):
        function({}, *arrays, epsilon=-1.0)
    with raises(ValueError, "must have shape (8,)"):
        jax.jit(function)({"scale": jnp.ones(7)}, *arrays)


@pytest.mark.parametrize(
    ("shape", "axis", "expected", "shared"),
    [
        ((1,), -1, (8,), "one number for all"),
        ((), -1, (8,), "one number for all"),
        ((8,), (-2, -1), (3, 8), "the same for several"),
        ((1, 8), (-2, -1), (3, 8), "the same for several"),
        ((3, 1), (-2, -1), (3, 8), "the same for several"),
    ],
)
def test_the_error_of_a_shared_scale_says_what_to_write(shape, axis, expected, shared):
    x, scale = jax.random.normal(jax.random.key(0), (2, 3, 8)), 2 * jnp.ones(shape)
    fix = f"jnp.broadcast_to(params['scale'], {expected})"
    with raises(ValueError, f"If it is {shared} features, pass {fix}."):
        jln.layer_norm({"scale": scale}, x, axis=axis)

    def as_it_says(params):
        scale = eval(fix)
        return jln.layer_norm({"scale": scale}, x, axis=axis)

    y, pullback = jax.vjp(as_it_says, {"scale": scale})
    assert jnp.allclose(y, 2 * jln.layer_norm({}, x, axis=axis), atol=1e-6)
    assert pullback(y)[0]["scale"].shape == shape


@pytest.mark.parametrize("axis", ((-1, -2), (-2, -1)))
def test_a_scale_that_fits_no_axis_is_not_spread(axis):
    with raises(ValueError, "Did you normalize the wrong axis?"):
        jln.layer_norm({"scale": jnp.ones(3)}, jnp.ones((2, 3, 8)), axis=axis)


def test_parameters_of_several_axes_have_their_shape_in_the_order_of_axis():
    with raises(ValueError, "must have shape (8, 3), the shape of x (2, 3, 8) along"):
        jln.layer_norm({"scale": jnp.ones((3, 8))}, X, axis=(2, 1))
    with raises(ValueError, "got (8,)"):
        jln.layer_norm({"scale": jnp.ones(8)}, X, axis=(1, 2))


def test_there_are_at_least_80_bad_calls():
    tables = (BAD_X, BAD_PARAMS, BAD_OPTIONS, BAD_RESIDUALS, BAD_FEATURES)
    assert sum(map(len, tables)) >= 80


@pytest.mark.usefixtures("x64")
def test_float64_is_taken_where_it_is_enabled():
    y = jln.layer_norm({}, X, dtype=jnp.float64)
    assert y.dtype == jnp.float64


def test_messages_state_the_rule_what_was_received_and_the_fix():
    for options, _, _ in BAD_OPTIONS:
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            jln.layer_norm({}, X, **options)
        rule, received = str(error.value).split("got", 1)
        assert len(rule) > 10 and len(received.split(". ", 1)[-1]) > 10


def test_float64_from_where_it_was_on_is_refused_and_spoils_nothing():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
    for arguments in (({}, x), ({"scale": x[0]}, jnp.ones((3, 5)))):
        with pytest.raises(ValueError, match="needs 64-bit types, which are off"):
            jln.layer_norm(*arguments)
    with jax.enable_x64(True):
        assert jax.grad(lambda x: jln.layer_norm({}, x)[0, 0])(x).dtype == "float64"


@pytest.mark.parametrize("name", ("epsilon", "scale_offset"))
def test_an_integer_beyond_floats_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*finite in float32"):
        jln.layer_norm({"scale": jnp.ones(8)}, jnp.ones((2, 8)), **{name: 10**400})
