"""Flax linen modules: Flax's own norms, computed by `jax_layernorm`.

Swapping the import is the whole migration: constructor arguments, defaults, the
parameter tree and the dtype rules are Flax's, by inheritance.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from jax_layernorm import _arguments
from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import (
    Axes,
    Report,
    apply_norm,
    feature_shape,
    flax_axes,
    left_to_flax,
)


class LayerNorm(nn.LayerNorm):
    """Layer normalization, as `flax.linen.LayerNorm`; a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    Takes the arguments of `flax.linen.LayerNorm`, keeps the same parameters under the
    same names, and returns the same dtype. `use_fast_variance` and
    `force_float32_reductions` have no effect: statistics are always taken in float32 or
    wider, by a formula that is right where the fast one is not. `axis_index_groups` is
    refused. What `mask` leaves out is 0 in the output, where Flax normalizes it too.
    The parameters' axes are in the order of `feature_axes`, which Flax sorts.

    Attributes:
      scale_offset: added to `scale` in float32.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode (`jvp`,
        `jacfwd`, `linearize`).

    Raises:
      TypeError, ValueError, NotImplementedError: as `jax_layernorm.layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> norm = jln.linen.LayerNorm()
      >>> x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> print(norm.apply(variables, x).round(3))
      [[-1.069 -0.535  0.     1.604]]

    References:
      Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    scale_offset: float = 0.0
    implementation: Implementation | None = None
    custom_vjp: bool = True

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


class RMSNorm(nn.RMSNorm):
    """RMS normalization, as `flax.linen.RMSNorm`, with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    Everything said of `LayerNorm` holds.

    Attributes:
      scale_offset: added to `scale` in float32; 1.0, with `scale_init=zeros`, is the
        norm of Gemma.
      implementation: None for the best that can run, or a name.
      custom_vjp: False lets JAX differentiate the equations, for forward mode.

    Raises:
      TypeError, ValueError, NotImplementedError: as `jax_layernorm.layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> norm = jln.linen.RMSNorm()
      >>> x = jnp.array([[3.0, 4.0]])
      >>> print(norm.apply(norm.init(jax.random.key(0), x), x))
      [[0.849 1.131]]

    References:
      Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """

    scale_offset: float = 0.0
    implementation: Implementation | None = None
    custom_vjp: bool = True

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Array | tuple[Array, Array]:
        """`y`, of the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


@contextlib.contextmanager
def replace(
    *, implementation: Implementation | None = None, custom_vjp: bool = True
) -> Iterator[Report]:
    """Within the `with` block this package computes Flax's linen norms.

    Every `flax.linen.LayerNorm` and `flax.linen.RMSNorm` that is called in the block, by
    whatever model, is computed as `jax_layernorm.linen` computes it. Modules, parameters,
    names, dtypes and checkpoints stay as they are, boxed parameters too; nothing changes
    but speed, memory and accuracy. Calls that this could not be said of stay Flax's:
    those with a mask, with `axis_index_groups`, and those of dtypes that this package
    refuses (complex, float8). A subclass that overrides `__call__` stays as it is, except
    for the `super().__call__` in it.

    A function that was jitted, and called, outside is traced again inside, and the other
    way round: the block is part of the key of JAX's caches. Only the calling thread is
    affected. In nested blocks the innermost one's arguments hold.

    Args:
      implementation: None for the best that can run, or a name as for `layer_norm`; a
        norm that it cannot run raises.
      custom_vjp: False for models that are differentiated forward (`jvp`, `jacfwd`,
        `linearize`): JAX then differentiates the equations.

    Yields:
      A `Report`, filled as calls are traced. What an earlier block compiled is not traced
      again, and so not reported again.

    Raises:
      TypeError: `custom_vjp` is not True or False.
      ValueError: `implementation` is unknown, or cannot go with `custom_vjp=False`.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import jax_layernorm as jln
      >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> with jln.linen.replace() as report:
      ...     y = model.apply(variables, x)
      >>> print(report)
      replaced  layers_1: LayerNorm
    """
    custom_vjp = _arguments.check_flag("custom_vjp", custom_vjp)
    _arguments.check_implementation(implementation, custom_vjp=custom_vjp)
    report = Report()
    intercepted = (
        contextlib.nullcontext() if _open.reports else nn.intercept_methods(_intercept)
    )
    with intercepted, _replacing(_Options(implementation, custom_vjp)):
        _open.reports.append(report)
        try:
            yield report
        finally:
            _open.reports.pop()


class _Open(threading.local):
    """The reports of the blocks that this thread is in."""

    def __init__(self) -> None:
        self.reports: list[Report] = []


class _Options(NamedTuple):
    """The arguments of a block."""

    implementation: Implementation | None
    custom_vjp: bool


_open = _Open()
_replacing = jax.make_user_context(None)  # the options of the innermost block
_FLAXS_CALLS = {inspect.unwrap(kind.__call__) for kind in (nn.LayerNorm, nn.RMSNorm)}


def _intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    if context.orig_method.func not in _FLAXS_CALLS:
        return next_fun(*args, **kwargs)
    module = context.module

    def __call__(x: Any, *, mask: Any = None) -> Any:  # the signature of Flax's norms
        reason = left_to_flax(module, x, mask, _param_dtypes(module))
        path = "/".join(module.path) or type(module).__name__
        for report in _open.reports:
            if reason is None:
                report.replaced[path] = type(module).__name__
            else:
                report.left[path] = reason
        if reason is not None:
            return context.orig_method(x, mask=mask)
        return _compute(
            module,
            x,
            reduction_axes=flax_axes(module.reduction_axes, x.ndim),
            feature_axes=flax_axes(module.feature_axes, x.ndim),
            **_replacing.value._asdict(),
        )

    call = __call__
    # The user's own interceptors, where they were entered inside the block, are still to
    # run, and `next_fun` would end in Flax's norm. Flax has no public list of them.
    inner = itertools.takewhile(
        lambda entered: entered is not _intercept,
        nn.module._global_interceptor_stack,
    )
    for interceptor in inner:
        call = _intercepted(interceptor, call, context)
    return call(*args, **kwargs)


def _intercepted(
    interceptor: Callable[..., Any],
    call: Callable[..., Any],
    context: Any,
) -> Callable[..., Any]:
    return lambda *args, **kwargs: interceptor(call, args, kwargs, context)


def _param_dtypes(module: nn.LayerNorm | nn.RMSNorm) -> Iterator[Any]:
    """Of the parameters there are, and of those that are about to be created."""
    for name in _param_names(module):
        if module.has_variable("params", name):
            boxed = module.get_variable("params", name)
            yield from (jnp.result_type(a) for a in jax.tree.leaves(boxed))
        else:
            yield module.param_dtype


def _param_names(module: nn.LayerNorm | nn.RMSNorm) -> Iterator[str]:
    if module.use_scale:
        yield "scale"
    if isinstance(module, nn.LayerNorm) and module.use_bias:
        yield "bias"


def _call(
    module: LayerNorm | RMSNorm,
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
) -> Array | tuple[Array, Array]:
    return _compute(
        module,
        x,
        mask,
        residual,
        reduction_axes=module.reduction_axes,
        feature_axes=module.feature_axes,
        scale_offset=module.scale_offset,
        implementation=module.implementation,
        custom_vjp=module.custom_vjp,
    )


def _compute(
    module: nn.LayerNorm | nn.RMSNorm,
    x: ArrayLike,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    *,
    reduction_axes: Axes,
    feature_axes: Axes,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
    custom_vjp: bool,
) -> Array | tuple[Array, Array]:
    """The norm that `module` describes, with its parameters: Flax's module or ours."""
    x = jnp.asarray(x)
    shape = list(feature_shape(x, feature_axes))  # initializers get a list from Flax
    params: dict[str, Array | None] = {}
    for name in _param_names(module):
        init = getattr(module, f"{name}_init")
        param = module.param(name, init, shape, module.param_dtype)
        if not module.force_float32_reductions:  # which has an effect on the dtype of y
            param = param.astype(module.param_dtype)
        params[name] = param
    return apply_norm(
        params,
        x,
        mask,
        residual,
        center=isinstance(module, nn.LayerNorm),
        dtype=module.dtype,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        epsilon=module.epsilon,
        scale_offset=scale_offset,
        custom_vjp=custom_vjp,
        implementation=implementation,
    )
