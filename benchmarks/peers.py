"""Layer norms under one signature, `(params, x) -> y` with `y` in the dtype of `x`.

A peer that is not installed is left out, with the reason printed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_layernorm as jln

Norm = Callable[[Mapping[str, Any], jax.Array], jax.Array]
EPSILON = 1e-6


def ours(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return jln.layer_norm(params, x, epsilon=EPSILON)


def ours_autodiff(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The same equations, differentiated by JAX."""
    return jln.layer_norm(params, x, epsilon=EPSILON, custom_vjp=False)


def flax(
    params: Mapping[str, Any], x: jax.Array, *, fast_variance: bool = True
) -> jax.Array:
    from flax import linen

    norm = linen.LayerNorm(
        epsilon=EPSILON, dtype=x.dtype, use_fast_variance=fast_variance
    )
    return norm.apply({"params": dict(params)}, x)


def tokamax(
    params: Mapping[str, Any], x: jax.Array, *, implementation: Any = "xla"
) -> jax.Array:
    import tokamax

    return tokamax.layer_norm(
        x,
        params["scale"],
        params["bias"],
        epsilon=EPSILON,
        implementation=implementation,
    )


def equinox(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    import equinox

    norm = equinox.nn.LayerNorm(x.shape[-1], EPSILON)
    weights = (params["scale"], params["bias"])
    norm = equinox.tree_at(lambda n: (n.weight, n.bias), norm, weights)
    return jax.vmap(norm)(x).astype(x.dtype)


@jax.custom_vjp
def plain(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A custom_vjp as people write it: two passes, float32, mean and rstd saved."""
    return _plain_forward(params, x)[0]


def _plain_forward(params: Mapping[str, Any], x: jax.Array) -> Any:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    c = wide - mean
    rstd = jax.lax.rsqrt(jnp.mean(c * c, -1, keepdims=True) + EPSILON)
    y = c * rstd * params["scale"] + params["bias"]
    return y.astype(x.dtype), (params["scale"], x, mean, rstd)


def _plain_backward(saved: Any, dy: jax.Array) -> Any:
    scale, x, mean, rstd = saved
    x_hat = (x.astype(jnp.float32) - mean) * rstd
    g = dy.astype(jnp.float32) * scale
    along = jnp.mean(g * x_hat, -1, keepdims=True)
    dx = rstd * (g - jnp.mean(g, -1, keepdims=True) - x_hat * along)
    dscale = jnp.sum(dy.astype(jnp.float32) * x_hat, 0)
    dbias = jnp.sum(dy.astype(jnp.float32), 0)
    return {"scale": dscale, "bias": dbias}, dx.astype(x.dtype)


plain.defvjp(_plain_forward, _plain_backward)


def available(names: tuple[str, ...]) -> dict[str, Norm]:
    """The JAX norms among `names` that can be imported; says why the others cannot."""
    norms: dict[str, Norm] = {
        "ours": ours,
        "ours autodiff": ours_autodiff,
        "flax": flax,
        "flax two-pass": functools.partial(flax, fast_variance=False),
        "tokamax": tokamax,
        "equinox": equinox,
        "plain": plain,
    }
    modules = {"flax": "flax.linen", "flax two-pass": "flax.linen"}
    found = {}
    for name in names:
        if not name.startswith(("ours", "plain")):
            reason = import_error(modules.get(name, name))
            if reason is not None:
                print(f"{name} left out: {reason}")
                continue
        if name == "tokamax":  # or it reads the command line as its own
            from absl import flags

            flags.FLAGS.mark_as_parsed()
        found[name] = norms[name]
    return found


def import_error(module: str) -> str | None:
    """Why `module` cannot be imported, or None."""
    import importlib

    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def forward_backward(norm: Norm) -> Callable[..., tuple[jax.Array, ...]]:
    """`(params, x, dy) -> (y, dx, dscale, dbias)`, to be one jitted program."""

    def run(params: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(norm, params, x)
        dparams, dx = vjp(dy)
        return y, dx, dparams["scale"], dparams["bias"]

    return run


def torch_forward_backward(
    params: Any, x: jax.Array, dy: jax.Array
) -> list[np.ndarray]:
    """The same by torch on CPU, as float64 arrays of what it returns."""
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16}

    def tensor(array: jax.Array) -> torch.Tensor:
        wide = np.array(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
        return torch.from_numpy(wide).to(names.get(array.dtype.name)).requires_grad_()

    inputs = [tensor(x), tensor(params["scale"]), tensor(params["bias"])]
    y = torch.nn.functional.layer_norm(inputs[0], x.shape[-1:], *inputs[1:], EPSILON)
    gradients = torch.autograd.grad(y, inputs, tensor(dy).detach())
    return [t.detach().to(torch.float64).numpy() for t in (y, *gradients)]
