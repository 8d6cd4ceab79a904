"""A kernel runs where it is chosen, and agrees with the equations everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marking_kernel import MARK

import jax_layernorm as jln
from jax_layernorm import _equations, _kernels


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), "float32")


def ran(y):
    """Whether the kernel computed y, rather than the equations."""
    return bool(jnp.all(jnp.asarray(y) > MARK / 2))


@pytest.mark.usefixtures("marking_kernel")
def test_a_kernel_runs_forward_and_backward_where_it_can(x):
    y, vjp = jax.vjp(lambda x: jln.layer_norm({}, x), x)
    assert ran(y)
    assert ran(vjp(jnp.ones_like(x))[0])
    assert ran(jax.jit(functools.partial(jln.layer_norm, {}))(x))


@pytest.mark.usefixtures("marking_kernel")
def test_elsewhere_the_next_implementation_runs(x):
    assert not ran(jln.layer_norm({}, x[:, :8]))
    assert not ran(jln.layer_norm({}, x, implementation="xla"))
    assert not ran(jln.layer_norm({}, x, custom_vjp=False))


@pytest.mark.usefixtures("marking_kernel")
def test_a_named_kernel_that_cannot_run_raises_with_its_reason(x):
    assert ran(jln.layer_norm({}, x, implementation="marking"))
    with pytest.raises(NotImplementedError, match="features must be 16"):
        jln.layer_norm({}, x[:, :8], implementation="marking")
    norm = jax.jit(lambda x: jln.layer_norm({}, x, implementation="marking"))
    with pytest.raises(NotImplementedError, match="it supports CPUs only"):
        norm.trace(x).lower(lowering_platforms=("tpu",))


@pytest.mark.usefixtures("marking_kernel")
def test_where_a_kernel_is_slower_it_runs_only_by_name(x):
    assert not ran(jln.layer_norm({}, x[:1]))
    assert ran(jln.layer_norm({}, x[:1], implementation="marking"))


@pytest.mark.usefixtures("marking_kernel")
def test_the_kernel_is_chosen_for_the_platform_of_the_lowering(x):
    traced = jax.jit(lambda x: jln.layer_norm({}, x)).trace(x)
    assert "1.000000e+03" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "1.000000e+03" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.usefixtures("marking_kernel")
def test_an_exported_program_holds_no_kernel_that_cannot_be_exported(x):
    exported = export.export(
        jax.jit(lambda x: jln.layer_norm({}, x)), platforms=("cpu", "tpu")
    )(x)
    y = export.deserialize(exported.serialize()).call(x)
    assert not ran(y)
    assert ran(jln.layer_norm({}, x))


@pytest.mark.usefixtures("marking_kernel")
def test_xla_runs_where_it_must_partition_and_the_kernel_inside_shard_map(x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    norm = functools.partial(jln.layer_norm, {})
    assert not ran(jax.jit(norm)(split))
    specs = {"in_specs": P("data"), "out_specs": P("data")}
    assert ran(jax.jit(jax.shard_map(norm, mesh=mesh, **specs))(x))


@pytest.mark.usefixtures("marking_kernel")
@pytest.mark.parametrize(
    "spec", (P("data"), P(None, "data"), P("data", "model")), ids=str
)
def test_under_explicit_axes_the_kernel_runs_unless_they_split_the_rows(x, spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}

    def gradients(params, x):
        y, pullback = jax.vjp(jln.layer_norm, params, x)
        return y, *pullback(jnp.cos(x))

    _, expected, _ = gradients(params, x)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        y, dparams, dx = jax.jit(gradients)(params, split)
    whole_rows = len(spec) == 1
    assert ran(y) == ran(dx) == whole_rows
    assert y.sharding.spec == P(*spec, *(None,) * (2 - len(spec)))
    for key, gradient in expected.items():
        assert dparams[key].sharding.spec == P(None)
        np.testing.assert_allclose(dparams[key], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("marking_kernel")
def test_a_named_kernel_that_cannot_run_raises_at_the_call(x):
    norm = functools.partial(jln.layer_norm, {}, implementation="marking")
    assert jax.eval_shape(norm, x).shape == x.shape
    with pytest.raises(NotImplementedError, match="features must be 16"):
        jax.eval_shape(norm, x[:, :8])
    split = jax.vmap(functools.partial(norm, axis_name="i"), 1, 1, axis_name="i")
    with pytest.raises(NotImplementedError, match="are split over 'i'"):
        jax.eval_shape(split, x.reshape(4, 1, 16))


@pytest.mark.usefixtures("marking_kernel")
def test_a_named_kernel_that_cannot_run_a_batch_leaves_it_to_the_equations(
    x, monkeypatch
):
    def of_one_row_of_parameters(problem):
        shapes = (problem.static.get("scale_shape"), problem.static.get("bias_shape"))
        if any(len(s) > 1 for s in shapes if s):
            raise NotImplementedError("too many")

    kernel = _kernels.KERNELS["marking"]
    monkeypatch.setattr(kernel, "require_support", of_one_row_of_parameters)

    def gradients(x):
        norm = functools.partial(jln.layer_norm, implementation="marking")
        y, pullback = jax.vjp(norm, {"scale": jnp.ones(16)}, x)
        return y, *pullback(jnp.cos(x))

    y, dparams, dx = jax.vmap(gradients)(jnp.stack([x, x]))
    assert ran(y) and not ran(dx)
    assert dparams["scale"].shape == (2, 16)


@pytest.mark.usefixtures("marking_kernel")
def test_second_derivatives_and_batched_parameters_use_the_equations(x):
    def loss(x):
        return jnp.sum(jnp.sin(jln.layer_norm({}, x)))

    def plain(x):
        return jnp.sum(jnp.sin(jln.layer_norm({}, x, custom_vjp=False)))

    hvp = jax.jvp(jax.grad(loss), (x,), (x,))[1]
    # sin(y + 1000) turns the sines; the kernel's mark itself has no derivative.
    assert np.isfinite(hvp).all() and not ran(hvp)
    scales = {"scale": jnp.ones((3, 16))}
    batched = jax.vmap(jln.layer_norm, (0, None))
    assert not ran(batched(scales, x))
    assert np.isfinite(jax.grad(plain)(x)).all()


@pytest.mark.usefixtures("marking_kernel")
@pytest.mark.parametrize("axis", (0, 1))
def test_vmap_keeps_the_kernel_and_the_handwritten_backward_pass(x, axis):
    params = {"scale": jnp.linspace(1.0, 2.0, 16), "bias": jnp.zeros(16)}
    stacked = jnp.stack([x, x[::-1]], axis)

    def value_and_gradients(x):
        y, pullback = jax.vjp(jln.layer_norm, params, x)
        return y, *pullback(jnp.cos(x))

    y, dparams, dx = jax.vmap(value_and_gradients, axis)(stacked)
    assert ran(y) and ran(dx)
    jaxpr = jax.make_jaxpr(jax.vmap(value_and_gradients, axis))(stacked)
    assert str(jaxpr).count("layer_norm_forward[") == 1
    assert str(jaxpr).count("layer_norm_backward[") == 1
    for i, each in enumerate((x, x[::-1])):
        _, expected, _ = value_and_gradients(each)
        for key, gradient in expected.items():
            np.testing.assert_allclose(dparams[key][i], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("marking_kernel")
def test_vmap_over_everything_keeps_the_kernel(x):
    batch = (3, 4, 16)
    data = {"scale": jnp.ones((3, 16)), "bias": jnp.zeros((3, 16))}
    arrays = [jnp.broadcast_to(x, batch), jnp.ones(batch), jnp.ones((3, 4, 1), bool)]

    def norm(params, x, residual, mask):
        return jln.add_layer_norm(params, x, residual, mask=mask)[0]

    assert ran(jax.vmap(norm)(data, *arrays))


@pytest.mark.usefixtures("marking_kernel")
def test_a_primitive_is_compiled_even_where_jit_is_disabled(x):
    with jax.disable_jit():
        assert ran(jln.layer_norm({}, x))


def test_a_jaxpr_shows_one_op_each_way(x):
    def gradient(x):
        return jax.vjp(lambda x: jln.layer_norm({}, x), x)[1](x)

    text = str(jax.make_jaxpr(gradient)(x))
    assert text.count("layer_norm_forward[") == 1
    assert text.count("layer_norm_backward[") == 1


def test_many_norms_of_one_shape_are_traced_once(x, monkeypatch):
    calls = []
    forward = _equations.forward

    def counting(*operands, **static):
        calls.append(static)
        return forward(*operands, **static)

    monkeypatch.setattr(_equations, "forward", counting)
    jax.clear_caches()

    @jax.jit
    def model(x):
        for _ in range(48):
            x = jln.layer_norm({}, x, epsilon=1.25e-6, implementation="xla")
        return x

    model.lower(x)
    assert 1 <= len(calls) <= 2
