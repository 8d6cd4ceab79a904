"""Layer norms by name: ours, each implementation of ours, and those of other packages.

`NORMS` is the only list, and every command takes its `--norms` from it. If a norm's
package is not installed, or the norm cannot run here, it is left out and the reason is
printed. On a CPU without its kernel, "ours" would be the XLA implementation. That is
refused, unless `--allow-xla` or JAX_LAYERNORM_ALLOW_XLA=1 is given.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_layernorm as jln
from jax_layernorm._kernels import KERNELS

Params = Mapping[str, Any]
Norm = Callable[[Params, jax.Array], jax.Array]
"""`(params, x) -> y`, `y` in the dtype of `x`."""
AddNorm = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(params, x, residual) -> y, residual + x`."""
EPSILON = 1e-6
ALLOW_XLA = "JAX_LAYERNORM_ALLOW_XLA"


class Peer(NamedTuple):
    """How to call one norm."""

    norm: Norm | None
    """None for torch, which JAX cannot trace: `torch_peer` runs it."""
    add: AddNorm | None
    module: str | None = None
    """The module that it needs; None if it needs only this package."""
    linen: Callable[..., Any] | None = None
    """Makes it a Flax module, from the arguments of `flax.linen.LayerNorm`."""


def ours(implementation: str | None = None, *, custom_vjp: bool = True) -> Peer:
    options = {"implementation": implementation, "custom_vjp": custom_vjp}
    return Peer(
        functools.partial(jln.layer_norm, epsilon=EPSILON, **options),
        functools.partial(jln.add_layer_norm, epsilon=EPSILON, **options),
        linen=functools.partial(_linen, "jax_layernorm.linen", **options),
    )


def our_rms(implementation: str | None = None) -> Peer:
    options: Any = {"implementation": implementation, "epsilon": EPSILON}
    return Peer(
        lambda params, x: jln.rms_norm({"scale": params["scale"]}, x, **options),
        lambda params, *arrays: jln.add_rms_norm(
            {"scale": params["scale"]}, *arrays, **options
        ),
    )


def other(
    norm: Norm, module: str | None = None, linen: Callable[..., Any] | None = None
) -> Peer:
    """A norm without a fused residual sum."""

    def add(
        params: Params, x: jax.Array, residual: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        residual_out = residual + x
        return norm(params, residual_out), residual_out

    return Peer(norm, add, module, linen)


def flaxs(**options: Any) -> Peer:
    def norm(params: Params, x: jax.Array) -> jax.Array:
        made = _linen("flax.linen", dtype=x.dtype, **options)
        return made.apply({"params": dict(params)}, x)

    linen = functools.partial(_linen, "flax.linen", **options)
    return other(norm, "flax.linen", linen)


def _linen(module: str, **options: Any) -> Any:
    return importlib.import_module(module).LayerNorm(epsilon=EPSILON, **options)


def flax_rms(params: Params, x: jax.Array) -> jax.Array:
    import flax.linen as nn

    norm = nn.RMSNorm(epsilon=EPSILON, dtype=x.dtype)
    return norm.apply({"params": {"scale": params["scale"]}}, x)


def tokamax(params: Params, x: jax.Array) -> jax.Array:
    """With the implementation that tokamax chooses: XLA on a CPU, its kernel on a GPU."""
    return _tokamax(x, params["scale"], params["bias"])


def tokamax_rms(params: Params, x: jax.Array) -> jax.Array:
    return _tokamax(x, params["scale"], None, subtract_mean=False)


def _tokamax(*arguments: Any, **options: Any) -> jax.Array:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or it reads the command line as its own
    return tokamax.layer_norm(*arguments, epsilon=EPSILON, **options)


def equinox(params: Params, x: jax.Array) -> jax.Array:
    import equinox

    norm = equinox.nn.LayerNorm(x.shape[-1], EPSILON)
    weights = (params["scale"], params["bias"])
    norm = equinox.tree_at(lambda n: (n.weight, n.bias), norm, weights)
    for _ in range(x.ndim - 1):
        norm = jax.vmap(norm)
    return norm(x).astype(x.dtype)


@jax.custom_vjp
def plain(params: Params, x: jax.Array) -> jax.Array:
    """A custom_vjp as people write it: two passes, float32, mean and rstd saved."""
    return _plain_forward(params, x)[0]


def _plain_forward(params: Params, x: jax.Array) -> Any:
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
    rows = tuple(range(x.ndim - 1))
    dscale = jnp.sum(dy.astype(jnp.float32) * x_hat, rows)
    dbias = jnp.sum(dy.astype(jnp.float32), rows)
    return {"scale": dscale, "bias": dbias}, dx.astype(x.dtype)


plain.defvjp(_plain_forward, _plain_backward)


OURS = {
    "ours": ours(),
    "ours autodiff": ours(custom_vjp=False),
    **{implementation: ours(implementation) for implementation in KERNELS},
}
"""The package's choice, its equations differentiated by JAX, and each kernel by name."""

NORMS = {
    **OURS,
    "plain": other(plain),
    "flax": flaxs(),
    "flax two-pass": flaxs(use_fast_variance=False),
    "tokamax": other(tokamax, "tokamax"),
    "equinox": other(equinox, "equinox"),
    "torch": Peer(None, None, "torch"),
}
RMS_NORMS = {
    "ours": our_rms(),
    **{implementation: our_rms(implementation) for implementation in KERNELS},
    "flax": other(flax_rms, "flax.linen"),
    "tokamax": other(tokamax_rms, "tokamax"),
}
"""RMS norms, which take only `scale` from the parameters."""
JAX_NORMS = tuple(name for name, peer in NORMS.items() if peer.norm is not None)
LINEN_NORMS = tuple(name for name, peer in NORMS.items() if peer.linen is not None)


def add_argument(
    parser: argparse.ArgumentParser, default: Iterable[str], choices: Iterable[str]
) -> None:
    """`--norms`, of which `default` are measured if none is named."""
    parser.add_argument(
        "--norms", nargs="+", default=tuple(default), choices=tuple(choices)
    )
    add_allow_xla(parser)


class _AllowXla(argparse.Action):
    """Sets the environment variable, which the commands' own processes inherit."""

    def __call__(self, *arguments: Any) -> None:
        os.environ[ALLOW_XLA] = "1"


def add_allow_xla(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-xla", nargs=0, action=_AllowXla,
        help=f"on a CPU without the kernel, measure XLA as ours; like {ALLOW_XLA}=1",
    )  # fmt: skip


def available(names: Iterable[str], platform: str | None = None) -> dict[str, Peer]:
    """Those of `NORMS` among `names` that can run; prints why the others cannot.

    Prints which implementation "ours" is. Ends the program if that is XLA's on a CPU.

    Args:
      platform: "cpu", "cuda" or "tpu"; None for that of JAX's default device.
    """
    found = {}
    for name in names:
        if name not in NORMS:
            continue
        reason = unavailable(name, platform)
        if reason is None:
            found[name] = NORMS[name]
        else:
            print(f"{name} left out: {reason}")
    if "ours" in found:
        print(f"ours is {implementation(platform)}", flush=True)
    return found


def implementation(platform: str | None = None) -> str:
    """What "ours" runs, from `jax_layernorm.explain`; XLA on a CPU ends the program."""
    platform = platform or default_platform()
    params = jax.eval_shape(lambda: jln.init_params(128))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    choice = jln.explain(params, x)[platform]
    allowed = os.environ.get(ALLOW_XLA) == "1"
    if platform == "cpu" and choice.implementation != "native_cpu" and not allowed:
        sys.exit(
            f"ours would be {choice.implementation} on this CPU, not native_cpu,"
            f" because {choice.reasons['native_cpu']}; install the package into this"
            f" environment (`{sys.executable} -m pip install --editable .`, with a C++"
            f" compiler), or pass --allow-xla (or set {ALLOW_XLA}=1) to measure"
            f" {choice.implementation} as ours."
        )
    return str(choice.implementation)


def default_platform() -> str:
    """That of JAX's default device, as `jax_layernorm.explain` calls it."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    version = jax.devices()[0].client.platform_version
    return "rocm" if "rocm" in version.lower() else "cuda"


def unavailable(name: str, platform: str | None = None) -> str | None:
    """Why this norm cannot run, or None."""
    peer = NORMS[name]
    if peer.module is not None:
        return import_error(peer.module)
    params = jax.eval_shape(lambda: jln.init_params(128))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    try:
        jax.jit(peer.norm).trace(params, x).lower(
            lowering_platforms=None if platform is None else (platform,)
        )
    except NotImplementedError as error:
        return str(error)
    return None


def import_error(module: str) -> str | None:
    """Why `module` cannot be imported, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package too old for this jax fails in any way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
