"""Flax linen modules: Flax's norms, computed by `jax_layernorm`.

To switch, change the import and nothing else. The classes inherit from Flax's, so the
constructor arguments, the defaults, the parameter tree and the dtype rules stay the
same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from jax_layernorm import _arguments, _own_norms
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
    """Layer normalization: `flax.linen.LayerNorm` with a hand-written backward pass.

        y = (x - mean) * rstd * (scale_offset + scale) + bias
        rstd = 1 / sqrt(var + epsilon)

    It takes the arguments of `flax.linen.LayerNorm`, keeps the same parameters under
    the same names, and returns the same dtype.

    A few details differ. `use_fast_variance` and `force_float32_reductions` change no
    number, because statistics are always in float32 or wider, by a formula that is
    right even where the fast formula is not. `axis_index_groups` raises. Elements that
    `mask` leaves out are 0 in the output, while Flax normalizes them too. The
    parameters' axes are in the order of `feature_axes`, while Flax sorts them.

    Attributes:
      scale_offset: added to `scale` in float32.
      round_before_scale: round `x_hat` to the dtype of `x`, as `layer_norm` does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that
        (`jvp`, `jacfwd`, `linearize`).

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
    round_before_scale: bool = False
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
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


class RMSNorm(nn.RMSNorm):
    """RMS normalization: `flax.linen.RMSNorm` with a hand-written backward pass.

        y = x * rstd * (scale_offset + scale)
        rstd = 1 / sqrt(mean(x^2) + epsilon)

    The notes on `LayerNorm` apply here too.

    Attributes:
      scale_offset: added to `scale` in float32; 1.0 with `scale_init=zeros` gives the
        norm of Gemma.
      round_before_scale: round `x_hat` to the dtype of `x`, as Llama does.
      implementation: a name, or None for the best implementation that can run.
      custom_vjp: False lets JAX differentiate the equations; forward mode needs that.

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
    round_before_scale: bool = False
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
        """`y`, with the shape of `x`; with `residual`, `(y, residual + x)`."""
        return _call(self, x, mask, residual)


@contextlib.contextmanager
def replace(
    *,
    also: Mapping[type, Callable[..., Any]] | None = None,
    implementation: Implementation | None = None,
    custom_vjp: bool = True,
) -> Iterator[Report]:
    """Lets this package compute Flax's linen norms within a `with` block.

    Every `flax.linen.LayerNorm` and `flax.linen.RMSNorm` that any model calls in the
    block is computed as `jax_layernorm.linen` computes it. Modules, parameters (boxed
    parameters too), names, dtypes and checkpoints stay the same. Only speed, memory and
    accuracy change.

    Anything that would change behavior is left to Flax: calls with a mask, calls with
    `axis_index_groups`, and calls with dtypes that this package refuses (complex,
    float8). A subclass that overrides `__call__` stays as it is, except for a
    `super().__call__` in it.

    A function that was jitted and called outside the block is traced again inside it,
    and vice versa, because the block is part of the key of JAX's caches. Only the
    calling thread is affected. In nested blocks, the arguments of the innermost block
    apply, and the classes of all blocks.

    Norms inside `flax.nnx.bridge.to_linen` are replaced too, as `jax_layernorm.nnx`
    replaces them.

    Args:
      also: the model's own norm classes, each with a function `compute(norm, x, ...)`
        that returns what the class's `__call__` would, by way of this package's
        functions. It applies to these classes and to subclasses that keep `__call__`.
        `norm` is bound, so `compute` can call `norm.get_variable("params", "scale")` or
        `norm.param`. During `init` the class itself runs, because it makes the
        parameters. Define `compute` once and not in each block, because JAX traces the
        model again for each new function.
      implementation: a name as for `layer_norm`, or None for the best implementation
        that can run. A norm that the named implementation cannot run raises.
      custom_vjp: pass False for models that are differentiated in forward mode (`jvp`,
        `jacfwd`, `linearize`). JAX then differentiates the equations.

    Yields:
      A `Report`, which fills as calls are traced. Calls that an earlier block compiled
      are not traced again, so they are not reported again.

    Raises:
      TypeError: `custom_vjp` is not True or False, or `also` does not map module classes
        to functions.
      ValueError: `implementation` is unknown, or does not support `custom_vjp=False`.

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
    bases = (
        nn.Module,
        *((nnx.Module,) if (nnx := sys.modules.get("flax.nnx")) else ()),
    )
    checked = _own_norms.check_also(
        also, bases, "Pass subclasses of flax.linen.Module."
    )
    outer = _replacing.value.also if _open.reports else ()
    options = _Options(
        tuple({**dict(outer), **checked}.items()), implementation, custom_vjp
    )
    report = Report(_none=_NOTHING_CALLED)
    intercepted = (
        contextlib.nullcontext() if _open.reports else nn.intercept_methods(_intercept)
    )
    with intercepted, _replacing(options):
        _open.reports.append(report)
        try:
            yield report
        finally:
            _open.reports.pop()


class _Open(threading.local):
    """The reports of the blocks that this thread is in."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.computing: list[nn.Module] = []  # own norms, in the calls of `compute`
        self.reported = 0  # how many calls

    def replaced(self, path: str, kind: str) -> None:
        self.reported += 1
        for report in self.reports:
            report.replaced[path] = kind
            report.left.pop(path, None)

    def left(self, path: str, reason: str) -> None:
        self.reported += 1
        for report in self.reports:
            report.left[path] = reason

    def saw_a_module(self) -> None:
        for report in self.reports:
            report._none = "no norms"


class _Options(NamedTuple):
    """The arguments of a block."""

    also: tuple[tuple[type, _own_norms.Compute], ...]
    implementation: Implementation | None
    custom_vjp: bool


_open = _Open()
_replacing = jax.make_user_context(None)  # the options of the innermost block
_FLAXS_CALLS = {inspect.unwrap(kind.__call__) for kind in (nn.LayerNorm, nn.RMSNorm)}
_NOTHING_CALLED = (
    "no norms, because no linen module was traced in the block; for a flax.nnx model there"
    " is jax_layernorm.nnx.replace(model)"
)


def _intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    _open.saw_a_module()
    module, options = context.module, _replacing.value
    path = "/".join(module.path) or type(module).__name__
    function = _own_norms.function_of(context.orig_method.func)
    compute = _compute_of(module, function, dict(options.also))
    if compute is not None:
        if any(module is other for other in _open.computing):
            return next_fun(*args, **kwargs)  # `compute` calls the class itself
        _open.replaced(path, type(module).__name__)
        if module.is_initializing():
            return next_fun(*args, **kwargs)
        call = functools.partial(_compute_own, compute, module, options)
    elif function in _FLAXS_CALLS:
        call = _flaxs_call(context, path, options)
    elif _is_bridge(module) and context.method_name == "__call__":
        call = functools.partial(_compute_bridged, context, path, options)
    else:
        reported = _open.reported
        out = next_fun(*args, **kwargs)
        inside = _open.reported > reported
        is_call = context.method_name == "__call__"
        if is_call and not inside and _looks_like_a_norm(module, options):
            name = type(module).__qualname__
            _open.left(path, _own_norms.ITS_OWN_CLASS.format(name=name))
        return out
    # Interceptors that the user entered inside the block must still run. `next_fun`
    # runs them too, but would end in the module's own code. Flax has no public list of
    # them.
    inner = itertools.takewhile(
        lambda entered: entered is not _intercept,
        nn.module._global_interceptor_stack,
    )
    for interceptor in inner:
        call = _intercepted(interceptor, call, context)
    return call(*args, **kwargs)


def _compute_of(
    module: nn.Module, function: Any, also: Mapping[type, _own_norms.Compute]
) -> _own_norms.Compute | None:
    """What computes a call of `function`, which a class of `also` has as `__call__`.

    The class of a module is not enough, because `nn.remat` and `nn.jit` change it.
    """
    same = [
        kind
        for kind in (*type(module).__mro__, *also)
        if kind in also and _own_norms.function_of(kind.__call__) is function
    ]
    return also[same[0]] if same else None


def _compute_own(
    compute: _own_norms.Compute,
    module: nn.Module,
    options: _Options,
    *args: Any,
    **kwargs: Any,
) -> Any:
    _open.computing.append(module)
    try:
        with _own_norms.computing(options.implementation, options.custom_vjp):
            return compute(module, *args, **kwargs)
    finally:
        _open.computing.pop()


def _flaxs_call(context: Any, path: str, options: _Options) -> Callable[..., Any]:
    module = context.module

    def __call__(x: Any, *, mask: Any = None) -> Any:  # the signature of Flax's norms
        reason = left_to_flax(module, x, mask, _param_dtypes(module))
        if reason is not None:
            _open.left(path, reason)
            return context.orig_method(x, mask=mask)
        _open.replaced(path, type(module).__name__)
        return _compute(
            module,
            x,
            reduction_axes=flax_axes(module.reduction_axes, x.ndim),
            feature_axes=flax_axes(module.feature_axes, x.ndim),
            implementation=options.implementation,
            custom_vjp=options.custom_vjp,
        )

    return __call__


def _is_bridge(module: nn.Module) -> bool:
    nnx = sys.modules.get("flax.nnx")  # nobody has a bridge before it is imported
    return nnx is not None and isinstance(module, nnx.bridge.ToLinen)


def _compute_bridged(
    context: Any,
    path: str,
    options: _Options,
    *args: Any,
    nnx_method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a bridge, whose NNX module exists only during the call."""
    from jax_layernorm import nnx

    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        call = nnx_method or "__call__"
        if callable(call) and getattr(type(module), call.__name__, None) is call:
            call = call.__name__  # the method of the class that `module` will have
        nnx.replace(
            module,
            also={k: c for k, c in options.also if issubclass(k, nnx.nnx.Module)},
            implementation=options.implementation,
            custom_vjp=options.custom_vjp,
        )
        for found in nnx.norms_of(module):
            inner = "/".join((path, *map(str, found.path)))
            if found.left is None:
                _open.replaced(inner, type(found.norm).__name__)
            else:
                _open.left(inner, found.left)
        function = getattr(type(module), call) if isinstance(call, str) else call
        return function(module, *args, **kwargs)

    return context.orig_method(*args, nnx_method=method, **kwargs)


def _looks_like_a_norm(module: nn.Module, options: _Options) -> bool:
    kind = type(module)
    if isinstance(module, LayerNorm | RMSNorm):
        return False
    for base in (nn.LayerNorm, nn.RMSNorm, *dict(options.also)):
        # The calls of `super()`, or inside `nn.remat` and `nn.jit`, are seen by themselves.
        if isinstance(module, base) and _own_norms.calls_super(kind, base):
            return False
    params = nn.meta.unbox(module.variables.get("params", {}))
    has_modules = any(isinstance(param, Mapping) for param in params.values())
    return _own_norms.looks_like_a_norm(kind, params, has_modules=has_modules)


def _intercepted(
    interceptor: Callable[..., Any],
    call: Callable[..., Any],
    context: Any,
) -> Callable[..., Any]:
    return lambda *args, **kwargs: interceptor(call, args, kwargs, context)


def _param_dtypes(module: nn.LayerNorm | nn.RMSNorm) -> Iterator[Any]:
    """The dtypes of the parameters that exist, and of those about to be created."""
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
        round_before_scale=module.round_before_scale,
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
    round_before_scale: bool = False,
    implementation: Implementation | None = None,
    custom_vjp: bool,
) -> Array | tuple[Array, Array]:
    """Computes the norm of `module`, Flax's or ours, with the module's parameters."""
    x = jnp.asarray(x)
    shape = list(feature_shape(x, feature_axes))  # initializers get a list from Flax
    params: dict[str, Array | None] = {}
    for name in _param_names(module):
        init = getattr(module, f"{name}_init")
        param = module.param(name, init, shape, module.param_dtype)
        if not module.force_float32_reductions:  # this affects the dtype of y
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
        round_before_scale=round_before_scale,
        custom_vjp=custom_vjp,
        implementation=implementation,
    )
