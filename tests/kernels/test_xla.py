"""The XLA implementation for GPUs and for CPUs, run on the CPU."""

import functools

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln
from jax_layernorm._kernels import xla

IN_PARTS = (
    ((8192, 16), 256),
    ((2, 2048, 16), 128),
    ((1000, 16), 8),
    ((4, 3, 64, 16), 16),
)
IN_ONE = ((4097, 16), (255, 16), (126, 2, 16), (1, 16), (0, 16))


def sum_of(shape, leading):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")
    run = jax.jit(functools.partial(xla.sum_in_parts, leading=leading))
    expected = np.sum(np.asarray(x, "float64"), tuple(range(leading)))
    np.testing.assert_allclose(run(x), expected, rtol=0, atol=1e-3)
    return run.lower(x).as_text()


@pytest.mark.parametrize(("shape", "part"), IN_PARTS, ids=str)
def test_rows_are_summed_in_parts_where_a_power_of_two_divides_them(shape, part):
    parts = np.prod(shape[:-1]) // part
    assert parts >= xla.PARTS
    assert f"tensor<{parts}x{part}x16xf32>" in sum_of(shape, len(shape) - 1)


@pytest.mark.parametrize("shape", IN_ONE, ids=str)
def test_other_rows_are_summed_at_once(shape):
    assert "optimization_barrier" not in sum_of(shape, len(shape) - 1)


def value_and_gradients(params, x, dy, **options):
    y, pullback = jax.vjp(functools.partial(jln.layer_norm, **options), params, x)
    return y, *pullback(dy)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("shape", ((2, 256, 96), (1000, 24), (257, 40)), ids=str)
def test_gradients_of_the_xla_implementation_for_gpus_are_right(
    shape, dtype, monkeypatch
):
    form = implementations.XlaAsOn("cuda")
    monkeypatch.setitem(implementations.KERNELS, "xla_as_on_cuda", form)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(a, dtype) for a in rng.normal(size=(2, *shape)))
    scale, bias = rng.normal(size=(2, shape[-1]))
    params = {
        "scale": jnp.asarray(scale, "float32"),
        "bias": jnp.asarray(bias, "float32"),
    }
    run = functools.partial(value_and_gradients, implementation="xla_as_on_cuda")
    oracle.assert_right(jax.jit(run)(params, x, dy), params, x, dy)


@pytest.mark.parametrize("platform", ("cuda", "rocm", "tpu"))
@pytest.mark.parametrize("devices", (1, 2))
def test_parts_are_for_one_gpu(devices, platform):
    """If XLA splits the rows over devices, they would have to exchange parts."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((4096, 40), "float32", sharding=rows)
    params = jax.eval_shape(lambda: jln.init_params(40))
    run = functools.partial(value_and_gradients, implementation="xla")
    lowered = jax.jit(run).trace(params, x, x).lower(lowering_platforms=(platform,))
    in_parts = "tensor<32x128x40xf32>" in lowered.as_text()
    assert in_parts == (devices == 1 and platform != "tpu")


@pytest.mark.parametrize("check_vma", (True, False))
def test_each_device_of_a_shard_map_sums_its_rows_in_parts(check_vma):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct((8192, 40), "float32")
    params = jax.eval_shape(lambda: jln.init_params(40))

    def gradients(params, x, dy):
        _, dparams, _ = value_and_gradients(params, x, dy, implementation="xla")
        return jax.lax.psum(dparams, "data") if not check_vma else dparams

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    lowered = jax.jit(sharded).trace(params, x, x).lower(lowering_platforms=("cuda",))
    assert "tensor<32x128x40xf32>" in lowered.as_text()


@pytest.mark.parametrize("offset", (0, 1e2, 1e4, 1e6))
@pytest.mark.parametrize(
    ("shape", "axis", "masked"),
    (
        ((64, 1000), -1, False),
        ((7, 33), -1, True),
        ((4, 96, 14, 14), 1, False),
        ((8, 30, 16), (1, 2), True),
        ((1, 100_001), -1, False),
    ),
)
def test_on_cpu_an_offset_costs_no_accuracy_where_nothing_is_saved(
    shape, axis, masked, offset
):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) + offset, "float32")
    mask = rng.random(shape) < 0.8 if masked else None
    options = {"axis": axis, "mask": mask}
    norm = jax.jit(
        functools.partial(jln.layer_norm, {}, implementation="xla", **options)
    )
    assert "optimization_barrier" not in norm.lower(x).as_text()
    oracle.assert_close(norm(x), oracle.norm(x, **options).y)


@pytest.mark.parametrize("x", (1e30, 1e34))
def test_on_cpu_squares_that_overflow_give_the_bias_where_nothing_is_saved(x):
    x = jnp.asarray([[x, -x, x, 0.5 * x], [x, x, x, x], [1, 2, 3, 4]], "float32")
    y = jln.layer_norm({"bias": jnp.ones(4)}, x, implementation="xla")
    np.testing.assert_array_equal(y[:2], 1)
    assert np.isfinite(y[2]).all() and y[2].std() > 0.9
