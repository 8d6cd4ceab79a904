"""What `round_before_scale` means, in NumPy, operation by operation; and its cases."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm as jln


class Case(NamedTuple):
    dtype: str
    scale: str | None  # dtypes
    bias: str | None
    center: bool = False
    scale_offset: float = 0.0
    residual: str | None = None


CASES = (
    Case("bfloat16", "bfloat16", None),
    Case("bfloat16", "float32", None),
    Case("bfloat16", "bfloat16", "bfloat16", True, 1.0),
    Case("bfloat16", "bfloat16", "float32", True, 0.1),
    Case("bfloat16", "float32", "bfloat16", True, 1.0),
    Case("bfloat16", None, "bfloat16", True),
    Case("bfloat16", "bfloat16", None, residual="bfloat16"),
    Case("bfloat16", "bfloat16", None, residual="float32"),
    Case("float16", "float16", "float16", True),
    Case("float16", "bfloat16", None, False, 1.0),
    Case("float32", "bfloat16", None, True, 1.0),
)


def check(case, shape, implementation):
    """Calls the function with `implementation`, and checks `y`, `dscale` and `dx`."""
    rng = np.random.default_rng(0)
    x, residual, dy = (jnp.asarray(a, case.dtype) for a in rng.normal(size=(3, *shape)))
    params = {}
    if case.scale:
        scale = 1 - case.scale_offset + rng.normal(size=shape[-1]) / 8
        params["scale"] = jnp.asarray(scale, case.scale)
    if case.bias:
        params["bias"] = jnp.asarray(rng.normal(size=shape[-1]), case.bias)
    arrays = [x]
    if case.residual:
        arrays.append(residual.astype(case.residual))
    name = (
        ("add_" if case.residual else "")
        + ("layer" if case.center else "rms")
        + "_norm"
    )
    normalized = np.asarray(sum(a.astype(jnp.float32) for a in arrays))
    normalized = normalized.astype(jnp.result_type(*arrays))
    dtype = jnp.result_type(normalized, *params.values())
    dy = dy.astype(dtype)

    def run(round_before_scale, params, *arrays):
        def y(params, *arrays):
            out = getattr(jln, name)(
                params, *arrays, dtype=dtype, scale_offset=case.scale_offset,
                round_before_scale=round_before_scale, implementation=implementation,
            )  # fmt: skip
            return out[0] if case.residual else out

        out, pullback = jax.vjp(y, params, *arrays)
        return out, *pullback(dy)

    y, dparams, dx, *_ = jax.jit(run, static_argnums=0)(True, params, *arrays)
    x_hat, right = _op_by_op(case, normalized, params)
    # The last bit of rstd depends on the order of a sum, and moves few roundings.
    same = np.asarray(y) == right
    assert y.dtype == right.dtype
    if jnp.finfo(dtype).bits == 16:
        assert same.mean() > 0.997
        np.testing.assert_allclose(
            np.asarray(y, np.float32), right.astype(np.float32),
            rtol=2 * float(jnp.finfo(dtype).eps), atol=float(jnp.finfo(dtype).eps),
        )  # fmt: skip
        y_once = jax.jit(run, static_argnums=0)(False, params, *arrays)[0]
        assert case.scale is None or np.mean(np.asarray(y_once) == right) < 0.95
    else:
        unit = float(jnp.finfo(normalized.dtype).eps)
        off = np.abs(np.asarray(y) - right) > 4e-6 * (1 + np.abs(right))
        assert off.mean() < 0.003
        np.testing.assert_allclose(
            np.asarray(y), right, rtol=2 * unit + 1e-5, atol=unit
        )
    if case.scale:
        dscale = np.sum(np.asarray(dy, np.float64) * x_hat.astype(np.float64), 0)
        size = np.sum(np.abs(np.asarray(dy, np.float64)) * np.abs(x_hat), 0)
        own = float(jnp.finfo(case.scale).eps)
        moved = float(jnp.finfo(normalized.dtype).eps) * np.abs(dy).max() * 5
        off = np.abs(np.asarray(dparams["scale"], np.float64) - dscale)
        assert (off <= own * np.abs(dscale) + 2e-6 * size + moved).all()
        exact = off <= own / 2 * np.abs(dscale) + 2e-6 * size
        assert exact.mean() > 0.9
    plain = jax.jit(run, static_argnums=0)(False, params, *arrays)[2]
    np.testing.assert_allclose(
        np.asarray(dx, np.float32), np.asarray(plain, np.float32),
        rtol=2 * float(jnp.finfo(dx.dtype).eps), atol=0.02 if case.scale_offset else 1e-6,
    )  # fmt: skip


def _op_by_op(case, x, params):
    """`x_hat` rounded to the dtype of `x`, and the result, rounded after each step."""
    wide = x.astype(np.float64)
    c = wide - wide.mean(-1, keepdims=True) if case.center else wide
    rstd = 1 / np.sqrt(np.mean(c * c, -1, keepdims=True) + 1e-6)
    x_hat = (c * rstd).astype(np.float32).astype(x.dtype)

    def rounded(a, *dtypes):
        return a.astype(jnp.promote_types(*dtypes))

    y = x_hat
    if case.scale:
        scale = np.asarray(params["scale"], np.float32)
        offset = np.asarray(case.scale_offset, case.scale).astype(np.float32)
        gamma = (scale + offset).astype(case.scale)
        product = y.astype(np.float32) * gamma.astype(np.float32)
        y = rounded(product, y.dtype, gamma.dtype)
    if case.bias:
        bias = np.asarray(params["bias"])
        y = rounded(y.astype(np.float32) + bias.astype(np.float32), y.dtype, bias.dtype)
    return x_hat, y
