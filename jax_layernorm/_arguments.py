"""Checks the public functions' arguments; what passes cannot give a wrong number.

Every message states the rule, what was received, and the fix.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_layernorm._kernels import KERNELS

Implementation = Literal["xla", "native_cpu", "pallas_tpu", "cuda"]
"""The names of the implementations."""

DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_DTYPE_NAMES = "bfloat16, float16, float32 or float64"


class CheckedParams(NamedTuple):
    scale: Array | None
    bias: Array | None


def check_array(name: str, value: Any) -> Array:
    """`value` as a JAX array; TypeError unless it is an array of a supported dtype."""
    if not isinstance(value, jax.Array):
        value = _as_array(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be an array of dtype {_DTYPE_NAMES}; got dtype"
            f" {value.dtype}. Convert it first, as with {name}.astype(jnp.float32)."
        )
    if lacks_x64(value.dtype):
        raise ValueError(
            f"{name} needs 64-bit types, which are off; got dtype float64, from where they"
            f" were on. Turn them on, or convert it first, as with {name}.astype("
            "jnp.float32)."
        )
    return value


def lacks_x64(dtype: Any) -> bool:
    """Whether `dtype`, a NumPy dtype, is float64 and 64-bit types are off."""
    return dtype == DTYPES[-1] and not jax.config.read("jax_enable_x64")


def _as_array(name: str, value: Any) -> Any:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a JAX or NumPy array; got a NumPy masked array, whose mask"
            " would be lost. Pass its data, and its mask as `mask`."
        )
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise TypeError(
            f"{name} must have this machine's byte order; got dtype"
            f" {value.dtype.str!r}. Convert it first, with"
            f" {name}.astype({name}.dtype.newbyteorder('='))."
        )
    if isinstance(value, np.ndarray):
        return jnp.asarray(value) if value.dtype in DTYPES else value
    if hasattr(value, "__jax_array__"):  # a flax.nnx Variable, say
        return value.__jax_array__()
    kind = type(value)
    received = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    fix = f"Convert it first, with jnp.asarray({name})."
    if kind.__module__.partition(".")[0] == "torch":
        fix = f"Convert it first, with jnp.asarray({name}.detach().numpy())."
    elif hasattr(value, "unbox"):  # Flax's boxes of sharding metadata
        fix = "Unbox all of them first, with flax.linen.meta.unbox(params)."
    elif isinstance(value, Mapping):
        fix = "Did you swap it with params, which come first?"
    raise TypeError(f"{name} must be a JAX or NumPy array; got {received}. {fix}")


def check_x(x: Any) -> Array:
    x = check_array("x", x)
    if x.ndim == 0:
        raise ValueError(
            "x must have at least one axis to normalize over; got a scalar, shape ()."
            " Give it one, for example with x[None]."
        )
    return x


def check_residual(residual: Any, x: Array) -> Array:
    residual = check_array("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {x.shape}; got {residual.shape}."
            " Broadcast it first, with jnp.broadcast_to(residual, x.shape)."
        )
    return residual


def check_axis(axis: Any, ndim: int) -> tuple[int, ...]:
    """The normalized axes as negative integers, in the order given."""
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = []
    for a in given:
        try:
            a = operator.index(a) if not isinstance(a, (bool, jax.Array)) else None
        except TypeError:
            a = None
        if a is None:
            raise TypeError(
                f"axis must be an integer or a tuple of integers; got {axis!r}."
                " Write axis=-1 for the last axis."
            )
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis must lie between {-ndim} and {ndim - 1} for x of rank {ndim};"
                f" got {axis!r}. Did x lose an axis on the way?"
            )
        axes.append(a - ndim if a >= 0 else a)
    if not axes:
        raise ValueError(
            "axis must name at least one axis; got (). Write axis=-1 for the last axis."
        )
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"axis must name each axis once; got {axis!r} for x of rank {ndim}."
            " Remove the repeated one (a negative axis counts from the end)."
        )
    return tuple(axes)


def check_params(params: Any, x: Array, axes: tuple[int, ...]) -> CheckedParams:
    if not isinstance(params, Mapping):
        fix = "Pass {'scale': ..., 'bias': ...}, or {} for none."
        if hasattr(params, "iter_children"):  # a flax.nnx module
            fix = "Pass flax.nnx.state(module)."
        raise TypeError(
            "params must be a mapping with optional 'scale' and 'bias'; got"
            f" {type(params).__name__}. {fix}"
        )
    unknown = [key for key in params if key not in ("scale", "bias")]
    if unknown:
        fix = "Remove or rename the others."
        if "params" in unknown:
            fix = "Pass variables['params'] rather than the variables."
        elif "weight" in unknown or "gamma" in unknown:
            fix = "Other libraries' weight or gamma is called scale here, beta bias."
        raise ValueError(
            f"params may hold 'scale' and 'bias' and nothing else; got {unknown}. {fix}"
        )
    return CheckedParams(
        _check_param("scale", params.get("scale"), x, axes),
        _check_param("bias", params.get("bias"), x, axes),
    )


def _check_param(key: str, value: Any, x: Array, axes: tuple[int, ...]) -> Array | None:
    """The parameter, broadcastable against `x`, with its axes in the order of `x`."""
    if value is None:
        return None
    name = f"params[{key!r}]"
    value = check_array(name, value)
    expected = tuple(x.shape[axis] for axis in axes)
    if value.shape == expected:
        return _in_the_order_of_x(value, axes)
    rank = x.ndim
    if value.ndim == rank != len(axes) and _broadcasts(value.shape, x.shape):
        return value
    broadcast = "" if rank == len(axes) else f", or rank {rank} and broadcast against x"
    fix = "Did you normalize the wrong axis?"
    if list(axes) == sorted(axes) and _broadcasts(value.shape, expected):
        shared = "one number for all" if value.size == 1 else "the same for several"
        fix = f"If it is {shared} features, pass jnp.broadcast_to({name}, {expected})."
    raise ValueError(
        f"{name} must have shape {expected}, the shape of x {x.shape} along axis"
        f" {axes if len(axes) > 1 else axes[0]}{broadcast}; got {value.shape}. {fix}"
    )


def _in_the_order_of_x(value: Array, axes: tuple[int, ...]) -> Array:
    ascending = sorted(axes)
    every = range(ascending[0], 0)
    if list(axes) == list(every):
        return value
    value = jnp.transpose(value, [axes.index(axis) for axis in ascending])
    between = [axis for axis in every if axis not in axes]
    return jax.lax.expand_dims(value, [axis - every[0] for axis in between])


def _broadcasts(shape: tuple[Any, ...], onto: tuple[Any, ...]) -> bool:
    """Whether an array of `shape` broadcasts to the shape `onto`, and not beyond it."""
    trailing = onto[len(onto) - len(shape) :]
    return len(shape) <= len(onto) and all(
        n in (1, m) for n, m in zip(shape, trailing, strict=True)
    )


def check_mask(mask: Any, x: Array) -> Array | None:
    if mask is None:
        return None
    if not isinstance(mask, jax.Array):
        mask = _as_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be an array of booleans, True where x takes part; got dtype"
            f" {mask.dtype}. Convert it first, as with mask != 0."
        )
    if not _broadcasts(mask.shape, x.shape):
        fix = (
            "Give it an axis of length 1 where it does not vary, as with mask[:, None]."
        )
        if mask.ndim > x.ndim:
            fix = "It has more axes than x."
        elif mask.shape == x.shape[: mask.ndim]:
            new = ", None" * (x.ndim - mask.ndim)
            fix = f"If it has the first axes of x, pass mask[...{new}]."
        raise ValueError(
            f"mask must broadcast against x of shape {x.shape}; got shape {mask.shape}."
            f" {fix}"
        )
    return mask


def check_axis_name(axis_name: Any) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name must be a string or a tuple of strings; got {axis_name!r}. Use"
            " the name given to jax.vmap or to an axis of the mesh."
        )
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"axis_name must name at least one axis, and each once; got {axis_name!r}."
            " Leave it out where the normalized axes are not split."
        )
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name must name axes that are mapped around the call; got {name!r},"
                " which is not. Call inside jax.vmap(..., axis_name=...) or"
                " jax.shard_map, or leave it out."
            ) from None
    return names


def check_dtype(dtype: DTypeLike | None, x: Array) -> jnp.dtype:
    """The dtype of `y`."""
    return x.dtype if dtype is None else _check_dtype(dtype, "None for that of x")


def check_param_dtype(dtype: DTypeLike) -> jnp.dtype:
    return _check_dtype(dtype, "left out for float32")


def _check_dtype(dtype: Any, otherwise: str) -> jnp.dtype:
    try:
        checked = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None or checked not in DTYPES:
        raise TypeError(
            f"dtype must be {_DTYPE_NAMES}, or {otherwise}; got {dtype!r}. Cast the"
            " result with .astype for any other."
        )
    if lacks_x64(checked):
        raise ValueError(
            "dtype=float64 needs 64-bit types, which are off; got dtype=float64."
            " Turn them on with jax.config.update('jax_enable_x64', True)."
        )
    return checked


def check_epsilon(epsilon: Any) -> float:
    value = _check_static_number("epsilon", epsilon, "1e-6")
    if not 0 <= value <= _FLOAT32_MAX:
        raise ValueError(
            "epsilon must be zero or positive, and finite in float32; got"
            f" {epsilon!r}. The default is 1e-6, torch's is 1e-5."
        )
    return value


def check_scale_offset(
    scale_offset: Any, scale: Array | None, *, rounds: bool
) -> float:
    """`rounds`: whether it is rounded to the dtype of `scale` before it is added."""
    value = _check_static_number("scale_offset", scale_offset, "1.0")
    dtype = jnp.dtype(jnp.float32) if scale is None or not rounds else scale.dtype
    if not abs(value) <= min(_FLOAT32_MAX, float(jnp.finfo(dtype).max)):
        raise ValueError(
            f"scale_offset must be finite in {dtype}; got {scale_offset!r}. Use 1.0 for"
            " a scale stored around zero, 0.0 for one stored around one."
        )
    return value


def _check_static_number(name: str, value: Any, example: str) -> float:
    if isinstance(value, jax.core.Tracer):
        received = "a traced value"
    elif (
        isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    ) or (
        isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "fiu"
    ):
        try:
            return float(value)
        except OverflowError:  # an integer beyond float64
            return math.inf  # the callers refuse it
    else:
        received = f"{value!r} of type {type(value).__name__}"
    raise TypeError(
        f"{name} must be a Python number, known when the function is traced; got"
        f" {received}. Pass a constant such as {example}; under jit, mark the argument"
        " that carries it as static."
    )


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{name} must be True or False; got {value!r}. It is static: it decides"
            " what is traced."
        )
    return bool(value)


def check_implementation(name: Any, *, custom_vjp: bool) -> str | None:
    if name is None:
        return None
    known = ", ".join(map(repr, KERNELS))
    if not isinstance(name, str) or name not in KERNELS:
        raise ValueError(
            f"implementation must be None or one of {known}; got {name!r}. None takes the"
            " best that can run."
        )
    if not custom_vjp and name != "xla":
        raise ValueError(
            "custom_vjp=False differentiates the equations themselves, which only"
            f" implementation=None or 'xla' runs; got implementation={name!r}. Drop one"
            " of the two arguments."
        )
    return name


def check_features(features: Any) -> tuple[int, ...]:
    given = features if isinstance(features, tuple) else (features,)
    try:
        if any(isinstance(n, bool) for n in given):
            raise TypeError
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(
            f"features must be an integer or a tuple of integers; got {features!r}."
            " Pass x.shape[-1] for a norm over the last axis."
        ) from None
    if not shape or min(shape) < 0 or not math.prod(shape) < 2**63:
        raise ValueError(
            "features must name at least one length, none negative; got"
            f" {features!r}. Pass x.shape[-1] for a norm over the last axis."
        )
    return shape
