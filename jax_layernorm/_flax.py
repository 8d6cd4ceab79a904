"""Flax's rules on top of the functions: what linen's and NNX's norms share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_layernorm import _arguments, _functions

Axes = int | Sequence[int]


@dataclasses.dataclass
class Report:
    """Which of a model's norms this package computes, and which it leaves as they are.

    Attributes:
      replaced: the norms that this package computes, as path: name of the class.
      left: the norms, or calls of norms, that stay as they are, as path: reason. Modules
        of other classes are listed if they look like a norm: by their names, or by a
        vector called scale, weight or gamma and no submodules. Others are not found.
    """

    replaced: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    _none: str = dataclasses.field(
        default="no norms recognized", repr=False, compare=False
    )

    def __str__(self) -> str:
        """One line for each norm."""
        lines = [f"replaced  {path}: {kind}" for path, kind in self.replaced.items()]
        lines += [f"left      {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines) or self._none


def apply_norm(
    params: dict[str, Array | None],
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    *,
    center: bool,
    dtype: DTypeLike | None,
    reduction_axes: Axes,
    feature_axes: Axes,
    axis_index_groups: Any,
    **options: Any,
) -> Any:
    """`y`, or `(y, residual + x)`, in the dtype that Flax gives `y`.

    That is `dtype`, or the promoted dtype of `x` and the parameters. If it is float64,
    the statistics are float64 too, as in Flax: a narrower `x` is widened first.
    """
    if axis_index_groups is not None:
        raise NotImplementedError(
            "axis_index_groups must be None; got"
            f" {axis_index_groups!r}. Use a mesh with one axis for each group, and name"
            " the axis within the group in axis_name."
        )
    x = jnp.asarray(x)
    axis, params = _aligned(params, x, reduction_axes, feature_axes)
    if mask is not None:
        mask = _as_mask(mask, x)
    # An integer x gives float32 here.
    dtype = jnp.dtype(canonicalize_dtype(x, *params.values(), dtype=dtype))
    x = _as_floating(x)
    if options.get("round_before_scale") and dtype == jnp.float64 != x.dtype:
        raise ValueError(
            "round_before_scale needs x in float64 if the result is float64, because x is"
            f" widened first; got x in {x.dtype}. Convert x, or pass dtype="
            f"{x.dtype.name!r}."
        )
    options |= {"axis": axis, "dtype": dtype, "mask": mask}
    norm = _functions.layer_norm if center else _functions.rms_norm
    if residual is None:
        return norm(params, _as_wide_as(dtype, x), **options)
    if dtype == jnp.float64:
        residual_out = _arguments.check_residual(residual, x) + x
        return norm(params, _as_wide_as(dtype, residual_out), **options), residual_out
    add_norm = _functions.add_layer_norm if center else _functions.add_rms_norm
    return add_norm(params, x, residual, **options)


def why_left_to_flax(
    norm: Any, x: Any, mask: Any, param_dtypes: Iterable[DTypeLike]
) -> str | None:
    """Why a call of Flax's `norm` is left to Flax; None if this package computes it.

    A replaced norm must behave like Flax's: it must accept every call that Flax
    accepts, and it must mask as Flax does. So Flax gets calls with a mask and every
    call that our functions would refuse.
    """
    if mask is not None:
        return "called with a mask; Flax's norms normalize what it leaves out too"
    if norm.axis_index_groups is not None:
        return "axis_index_groups is given"
    if not isinstance(x, (jax.Array, np.ndarray)):
        return f"x is no array but {type(x).__name__}"
    for dtype in param_dtypes:
        if dtype not in _arguments.DTYPES:
            return f"a parameter has dtype {jnp.dtype(dtype)}"
    try:
        x = _arguments.check_x(_as_floating(x))
        _arguments.check_axis(flax_axes(norm.reduction_axes, x.ndim), x.ndim)
        _arguments.check_axis(flax_axes(norm.feature_axes, x.ndim), x.ndim)
        _arguments.check_dtype(norm.dtype, x)
        _arguments.check_epsilon(norm.epsilon)
        _arguments.check_axis_name(norm.axis_name)
    except (TypeError, ValueError) as refusal:
        return str(refusal)
    return None


def flax_axes(axes: Axes, ndim: int) -> tuple[int, ...]:
    """Axes as Flax reads them: each once, in the order of `x`."""
    named = _as_tuple(axes)
    return tuple(sorted({a + ndim if -ndim <= a < 0 else a for a in named}))


def feature_shape(x: Array, feature_axes: Axes) -> tuple[int, ...]:
    """The shape of the parameters, after a check that `x` and the axes fit."""
    x = _arguments.check_x(_as_floating(x))
    axes = _arguments.check_axis(_as_tuple(feature_axes), x.ndim)
    return tuple(x.shape[axis] for axis in axes)


def _aligned(
    params: dict[str, Array | None],
    x: Array,
    reduction_axes: Axes,
    feature_axes: Axes,
) -> tuple[tuple[int, ...], dict[str, Array | None]]:
    """The normalized axes, and the parameters as the functions need them.

    A parameter's axes are those of `feature_axes`, in that order. If it is flat, as NNX
    stores it, its axes are in the order of `x`.
    """
    ndim = _arguments.check_x(_as_floating(x)).ndim
    axis = _arguments.check_axis(_as_tuple(reduction_axes), ndim)
    features = _arguments.check_axis(_as_tuple(feature_axes), ndim)
    shape = tuple(x.shape[axis] for axis in features)
    order = sorted(features)

    def over_features(param: Array) -> Array:
        if param.shape == shape:
            return param
        if param.size != math.prod(shape):
            raise ValueError(
                f"parameters must have shape {shape}, the shape of x {x.shape} along"
                f" feature_axes {feature_axes}; got {param.shape}. Are feature_axes"
                " right? If the parameters of several norms are stacked, use nnx.vmap."
            )
        param = param.reshape([x.shape[axis] for axis in order])
        return jnp.transpose(param, [order.index(axis) for axis in features])

    def over_all_axes(param: Array) -> Array:
        param = over_features(param)
        param = jnp.transpose(param, [features.index(axis) for axis in order])
        others = [i for i in range(ndim) if i - ndim not in features]
        param = jnp.expand_dims(param, others)
        return jnp.broadcast_to(param, x.shape) if len(axis) == ndim else param

    if set(features) == set(axis):
        return features, _map(over_features, params)
    return tuple(sorted(axis)), _map(over_all_axes, params)


def _map(
    change: Callable[[Array], Array], params: dict[str, Array | None]
) -> dict[str, Array | None]:
    return {key: None if p is None else change(p) for key, p in params.items()}


def _as_tuple(axes: Axes) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, Iterable) else (axes,)


def _as_mask(mask: ArrayLike, x: Array) -> Array:
    """A mask of numbers as booleans, as in Flax; TypeError if it may be a residual."""
    mask = jnp.asarray(mask)
    if mask.shape == x.shape and not (mask.dtype == bool or _is_integer(mask)):
        raise TypeError(
            "mask must hold booleans or integers if it has the shape of x; got"
            f" {mask.dtype}. Write residual=... for an array to add, and mask != 0 for a"
            " mask of floats."
        )
    return mask.astype(bool)


def _is_integer(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _as_floating(x: Any) -> Any:
    """An integer or boolean `x` as float32, as Flax does."""
    if _is_integer(x) or x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    return x


def _as_wide_as(dtype: DTypeLike, x: Array) -> Array:
    return x.astype(dtype) if dtype == jnp.float64 else x
