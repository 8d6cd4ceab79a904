"""What the benchmarks compare: each norm is a layer norm, each program has a floor."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

pytest.importorskip("benchmarks.support", reason="no benchmarks here")

from benchmarks.support import (
    errors,
    peers,
    programs,
    shapes,
    torch_peer,
)

SHAPE = shapes.Shape(8, 128)


@pytest.mark.parametrize("name", peers.NORMS)
def test_every_norm_is_layer_norm(name):
    reason = peers.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    params, x, dy = errors.inputs(SHAPE, 0.0, jnp.dtype("float32"), 0)
    right = oracle.norm(x, params["scale"], params["bias"], dy, epsilon=peers.EPSILON)
    norm = peers.NORMS[name].norm
    run = (
        torch_peer.forward_backward
        if norm is None
        else jax.jit(programs.forward_backward(norm))
    )
    expected = (right.y, right.dx, right.dscale, right.dbias)
    for actual, value in zip(run(params, x, dy), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=0, atol=2e-5)
    for value, other in zip(errors.oracle(params, x, dy), expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", peers.RMS_NORMS)
def test_every_rms_norm_is_one(name):
    reason = peers.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    params, x, dy = errors.inputs(SHAPE, 0.0, jnp.dtype("float32"), 0)
    scale = params["scale"]
    peer = peers.RMS_NORMS[name]
    y, dx, dscale = jax.jit(programs.forward_backward(peer.norm))(
        {"scale": scale}, x, dy
    )
    right = oracle.norm(x, scale, dy=dy, center=False, epsilon=peers.EPSILON)
    for actual, value in ((y, right.y), (dx, right.dx), (dscale, right.dscale)):
        np.testing.assert_allclose(actual, value, rtol=0, atol=2e-5)
    added, residual_out = jax.jit(peer.add)({"scale": scale}, x, dy)
    np.testing.assert_array_equal(residual_out, np.add(dy, x))
    right = oracle.norm(residual_out, scale, center=False, epsilon=peers.EPSILON)
    np.testing.assert_allclose(added, right.y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in peers.NORMS if n != "torch"])
def test_every_norm_has_its_residual_sum(name):
    reason = peers.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    params, x, residual = errors.inputs(SHAPE, 0.0, jnp.dtype("float32"), 0)
    y, residual_out = jax.jit(peers.NORMS[name].add)(params, x, residual)
    np.testing.assert_array_equal(residual_out, np.add(residual, x))
    right = oracle.norm(
        residual_out, params["scale"], params["bias"], epsilon=peers.EPSILON
    )
    np.testing.assert_allclose(y, right.y, rtol=0, atol=2e-5)


def test_torch_runs_the_same_programs():
    pytest.importorskip("torch", reason="torch is not installed")
    given = errors.inputs(SHAPE, 0.0, jnp.dtype("float32"), 0)
    for name, run in torch_peer.programs(*given).items():
        function = programs.make(name, peers.NORMS["ours"], SHAPE, "float32").function
        arrays = given[:2] if name == "inference" else given
        expected = jax.tree.leaves(jax.jit(function)(*arrays))
        actual = torch_peer.as_arrays(_flat(run()))
        if name == "add joint":  # dx; the gradients of the parameters; dx once more
            dscale, dbias = expected[2:4][::-1]
            expected = [*expected[:2], expected[4], dscale, dbias, expected[4]]
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=2e-5, err_msg=name)


def _flat(out):
    if not isinstance(out, tuple):
        return [out]
    return [t for each in out for t in _flat(each)]


def test_every_program_has_a_floor():
    assert programs.FLOOR_ARRAYS.keys() >= programs.PROGRAMS.keys()


@pytest.mark.parametrize("name", ("inference", "backward", "add", "add backward"))
def test_the_floor_of_one_pass_is_its_arrays(name):
    made = programs.make(name, peers.NORMS["ours"], SHAPE, jnp.dtype("float32"))
    results = jax.eval_shape(made.function, *made.arguments)
    sizes = [a.size for a in jax.tree.leaves((made.arguments, results))]
    assert sizes.count(math.prod(SHAPE)) == programs.FLOOR_ARRAYS[name]


def test_the_floor_of_both_passes_is_that_of_each():
    floors = programs.FLOOR_ARRAYS
    assert floors["joint"] == floors["forward"] + floors["backward"]
    assert floors["add joint"] == floors["add"] + floors["add backward"]


def test_norms_that_cannot_run_are_left_out_with_the_reason(capsys, monkeypatch):
    monkeypatch.setitem(peers.NORMS, "absent", peers.Peer(None, None, "no_such_module"))
    found = peers.available(("absent", "native_cpu", "ours"), "tpu")
    assert list(found) == ["ours"]
    absent, native, ours = capsys.readouterr().out.splitlines()
    assert absent.startswith("absent left out: ModuleNotFoundError")
    assert native.startswith("native_cpu left out: implementation='native_cpu'")
    assert ours == "ours is xla"
