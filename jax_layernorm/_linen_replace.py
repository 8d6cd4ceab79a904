"""`linen.replace`: a block in which calls of norms are intercepted and computed here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jax_layernorm import _arguments, _linen_norms, _own_norms
from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import Report, flax_axes, why_left_to_flax


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
        functions. It applies to these classes and to subclasses that keep `__call__`. If
        a subclass overrides a method that `__call__` uses, list the subclass too.
        `norm` is bound, so `compute` can use `norm.variables["params"]["scale"]`, which
        raises if there is none (`get_variable` would return None, which stands for no
        scale). The class itself runs where it makes the parameters, as during `init`.
        Define `compute` once and not in each block, because JAX traces the model again
        for each new function.
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
    nnx = sys.modules.get("flax.nnx")
    bases = (nn.Module,) if nnx is None else (nn.Module, nnx.Module)
    fix = "Pass subclasses of flax.linen.Module, or for a bridge of flax.nnx.Module."
    classes = _own_norms.check_also(also, bases, fix)
    if _open.blocks:
        classes = _open.blocks[-1].options.also | classes
    options = _Options(classes, implementation, custom_vjp)
    block = _Block(Report(_none=_NOTHING_CALLED), options, contextlib.ExitStack())
    if not _open.blocks:
        block.contexts.enter_context(nn.intercept_methods(_intercept))
    key = (*classes.items(), implementation, custom_vjp)
    block.contexts.enter_context(_in_the_keys_of_caches(key))
    _open.blocks.append(block)
    try:
        yield block.report
    finally:
        _close(block)


class _Options(NamedTuple):
    """The arguments of a block, with the classes of the blocks around it."""

    also: dict[type, _own_norms.Compute]
    implementation: Implementation | None
    custom_vjp: bool


@dataclasses.dataclass(eq=False)
class _Block:
    report: Report
    options: _Options
    contexts: contextlib.ExitStack
    in_order: bool = True
    """False once a block was closed before one that was opened later."""


class _Open(threading.local):
    """The blocks that this thread is in, and the calls inside."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self.computing: list[nn.Module] = []  # own norms, in the calls of `compute`
        self.reported = 0  # how many calls

    def replaced(self, path: str, kind: str) -> None:
        self.reported += 1
        for block in self.blocks:
            block.report.replaced[path] = kind

    def left(self, path: str, reason: str) -> None:
        self.reported += 1
        for block in self.blocks:
            block.report.left[path] = reason

    def saw_a_module(self) -> None:
        for block in self.blocks:
            block.report._none = "no norms recognized"


_open = _Open()
_in_the_keys_of_caches = jax.make_user_context(None)
_FLAXS_CALLS = {inspect.unwrap(kind.__call__) for kind in (nn.LayerNorm, nn.RMSNorm)}
_NOTHING_CALLED = (
    "no norms, because no linen module was traced in the block (a function that an earlier"
    " block compiled is not traced again); for a flax.nnx model there is"
    " jax_layernorm.nnx.replace(model)"
)


def _close(block: _Block) -> None:
    if block not in _open.blocks:
        raise RuntimeError(
            "a block of replace() must be closed in the thread that opened it; got another"
            " one. The block is still open in the first."
        )
    in_order = block.in_order and _open.blocks[-1] is block
    _open.blocks.remove(block)
    block.contexts.close()
    if in_order:
        return
    for other in _open.blocks:
        other.in_order = False
    # The context of this block has set the value that was there when it was opened.
    _in_the_keys_of_caches(object() if _open.blocks else None).__enter__()
    raise RuntimeError(
        "blocks of replace() must be closed in the reverse order of their opening, in one"
        " thread; got another order, and the blocks that are still open do nothing more."
        " Do not leave a generator or an asynchronous task waiting inside a block."
    )


def _intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    module = context.module
    if module.scope is None:  # it is not bound, so it computes nothing
        return next_fun(*args, **kwargs)
    if not (_open.blocks and _open.blocks[-1].in_order):
        return next_fun(*args, **kwargs)
    _open.saw_a_module()
    options = _open.blocks[-1].options
    path = "/".join(module.scope.path) or type(module).__name__
    function = inspect.unwrap(context.orig_method.func)
    compute = _compute_of(module, function, options.also)
    if compute is not None:
        if any(module is other for other in _open.computing):
            return next_fun(*args, **kwargs)  # `compute` calls the class itself
        _open.replaced(path, type(module).__name__)
        if module.is_initializing() or _makes_parameters(module):
            return next_fun(*args, **kwargs)
        call = functools.partial(_compute_own, compute, module, options)
    elif function in _FLAXS_CALLS:
        call = _flaxs_call(context, path, options)
    elif _is_a_bridges_call(function):
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
        for kind in type(module).__mro__
        if kind in also and inspect.unwrap(kind.__call__) is function
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
        reason = why_left_to_flax(module, x, mask, _linen_norms.param_dtypes(module))
        if reason is not None:
            _open.left(path, reason)
            return context.orig_method(x, mask=mask)
        _open.replaced(path, type(module).__name__)
        return _linen_norms.compute(
            module,
            x,
            reduction_axes=flax_axes(module.reduction_axes, x.ndim),
            feature_axes=flax_axes(module.feature_axes, x.ndim),
            implementation=options.implementation,
            custom_vjp=options.custom_vjp,
        )

    return __call__


def _makes_parameters(module: nn.Module) -> bool:
    """Whether a call makes the parameters outside `init`, as `mutable="params"` lets it."""
    return module.is_mutable_collection("params") and not _params_of(module)


def _params_of(module: nn.Module) -> Mapping[str, Any]:
    scope: Any = module.scope  # a field of the module may be called `variables`
    return scope.variables().get("params", {})


def _is_a_bridges_call(function: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # nobody has a bridge before it is imported
    return nnx is not None and function is inspect.unwrap(nnx.bridge.ToLinen.__call__)


def _compute_bridged(
    context: Any,
    path: str,
    options: _Options,
    *args: Any,
    nnx_method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a bridge, whose NNX module exists only during the call."""
    from flax import nnx

    from jax_layernorm import _nnx_replace

    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        call = nnx_method or "__call__"
        name = getattr(call, "__name__", "")
        if name and getattr(type(module), name, None) is call:
            call = name  # the method of the class that `module` will have
        with _nnx_replace.replaced(
            module,
            {k: c for k, c in options.also.items() if issubclass(k, nnx.Module)},
            options.implementation,
            custom_vjp=options.custom_vjp,
        ) as norms:
            for found in norms:
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
    if isinstance(module, _linen_norms.LayerNorm | _linen_norms.RMSNorm):
        return False
    for base in (nn.LayerNorm, nn.RMSNorm, *options.also):
        # The calls of `super()`, or inside `nn.remat` and `nn.jit`, are seen by themselves.
        if isinstance(module, base) and _own_norms.calls_super(kind, base):
            return False
    params = nn.meta.unbox(_params_of(module))
    has_modules = any(isinstance(param, Mapping) for param in params.values())
    return _own_norms.looks_like_a_norm(kind, params, has_modules=has_modules)


def _intercepted(
    interceptor: Callable[..., Any],
    call: Callable[..., Any],
    context: Any,
) -> Callable[..., Any]:
    return lambda *args, **kwargs: interceptor(call, args, kwargs, context)
