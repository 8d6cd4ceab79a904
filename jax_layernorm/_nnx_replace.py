"""`nnx.replace` and `nnx.report`: the norms of a model get other classes."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from jax_layernorm import _arguments, _own_norms
from jax_layernorm._arguments import Implementation
from jax_layernorm._flax import Report
from jax_layernorm._nnx_norms import LayerNorm, RMSNorm

Model = TypeVar("Model")
_OPTIONS = ("scale_offset", "round_before_scale", "implementation", "custom_vjp")
"""The attributes of our norms that Flax's do not have."""


def replace(
    model: Model,
    *,
    also: Mapping[type, Callable[..., Any]] | None = None,
    implementation: Implementation | None = None,
    custom_vjp: bool = True,
) -> Model:
    """Replaces every `flax.nnx` norm in `model` with a norm of this package, in place.

    Each `flax.nnx.LayerNorm` and `flax.nnx.RMSNorm` stays the same object, wherever it
    is shared, and keeps its parameters, attributes, names and checkpoints. Only its
    class changes, to `jax_layernorm.nnx.LayerNorm` or `RMSNorm`. Only speed, memory and
    accuracy change with it. A subclass whose `__call__` calls `super().__call__` keeps
    its code and gets our norm there.

    Anything that would change behavior is left to Flax: norms with `axis_index_groups`,
    subclasses whose `__call__` does not call that of Flax, calls with a mask, and calls
    with dtypes that this package refuses (complex, float8). `report(model)` says which
    norms are replaced.

    This replaces the norms that `nnx.iter_graph` reaches. If a jitted function closes
    over the model instead of taking it as an argument, the function keeps what it
    traced before.

    Args:
      model: a `flax.nnx` module or a pytree of modules; it may be abstract, from
        `nnx.eval_shape`. Call this outside NNX's transformations, or inside the
        transformation that makes the model, because `nnx.jit` does not carry a change
        of class back out.
      also: the model's own norm classes, each with a function `compute(norm, x, ...)`
        that returns what the class's `__call__` would, by way of this package's
        functions. It applies to these classes, and to subclasses whose `__call__` is
        theirs or calls it by `super()`. If a subclass overrides a method that `__call__`
        uses, list the subclass too. A norm then gets a subclass of its class that has
        the same name and calls `compute`. A pickle of it holds the model's class, so
        replace again after loading.
      implementation: a name as for `layer_norm`, or None for the best implementation
        that can run. A norm that the named implementation cannot run raises when it is
        called.
      custom_vjp: pass False for models that are differentiated in forward mode (`jvp`,
        `jacfwd`, `linearize`). JAX then differentiates the equations.

    A second call changes `implementation` and `custom_vjp` in the norms that the first
    call replaced.

    Returns:
      `model`.

    Raises:
      TypeError: `model` holds no module, `custom_vjp` is not True or False, or `also`
        does not map module classes, which can have subclasses, to functions.
      ValueError: `implementation` is unknown, or does not support `custom_vjp=False`.

    Example:
      >>> from flax import nnx
      >>> import jax_layernorm as jln
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs))
      >>> model = jln.nnx.replace(model)
      >>> print(jln.nnx.report(model))
      replaced  layers/1: LayerNorm
    """
    custom_vjp = _arguments.check_flag("custom_vjp", custom_vjp)
    _arguments.check_implementation(implementation, custom_vjp=custom_vjp)
    fix = "Pass subclasses of flax.nnx.Module; for linen there is linen.replace."
    also = _own_norms.check_also(also, (nnx.Module,), fix)
    with contextlib.ExitStack() as undo:
        _replace(_modules(model), also, implementation, custom_vjp, undo)
        undo.pop_all()  # nothing was refused
    return model


@contextlib.contextmanager
def replaced(
    model: Any,
    also: Mapping[type, Callable[..., Any]],
    implementation: Implementation | None,
    *,
    custom_vjp: bool,
) -> Iterator[list[Found]]:
    """The norms of a model that are replaced within a block. Not public."""
    with contextlib.ExitStack() as undo:
        modules = _all_modules(model)
        _replace(modules, also, implementation, custom_vjp, undo)
        yield norms_of(model) if modules else []


def _replace(
    modules: list[tuple[tuple[Any, ...], Any]],
    also: Mapping[type, Callable[..., Any]],
    implementation: Implementation | None,
    custom_vjp: bool,
    undo: contextlib.ExitStack,
) -> None:
    """Replaces norms; `undo` gets what makes them as they were."""
    flaxs, classes = [], []
    for path, module in modules:
        kind, own = _before(module)
        own = _own_norm(kind, also) or own
        if own is not None:
            try:
                made = _computed(kind, *own, implementation, custom_vjp)
            except (
                Exception
            ) as refusal:  # what `__init_subclass__` raises is the user's
                name = "/".join(map(str, path))
                raise TypeError(
                    "also must name classes of which subclasses can be made, because a"
                    f" replaced norm gets one; got {kind.__qualname__} at {name!r}:"
                    f" {_text(refusal)}. Call our functions in the class itself."
                ) from refusal
            classes.append((module, made))
        elif isinstance(module, nnx.LayerNorm | nnx.RMSNorm):
            flaxs.append(module)
    for module, made in classes:
        undo.callback(object.__setattr__, module, "__class__", type(module))
        object.__setattr__(module, "__class__", made)
    for module in flaxs:
        undo.callback(_restore, module, type(module), dict(vars(module)))
        _replace_flaxs(module, implementation, custom_vjp)


def _restore(norm: Any, kind: type, options: Mapping[str, Any]) -> None:
    """Gives a norm its class again, and what it had of the attributes of ours."""
    object.__setattr__(norm, "__class__", kind)
    for name in (*_OPTIONS, "_replaced"):
        if name in options:
            setattr(norm, name, options[name])
        elif name in vars(norm):
            delattr(norm, name)


def _replace_flaxs(
    norm: Any, implementation: Implementation | None, custom_vjp: bool
) -> None:
    if not isinstance(norm, LayerNorm | RMSNorm) and _left(norm) is None:
        norm.scale_offset = 0.0
        norm.round_before_scale = False
        norm._replaced = True
        object.__setattr__(norm, "__class__", _replaced_class(type(norm)))
    if vars(norm).get("_replaced"):
        norm.implementation = implementation
        norm.custom_vjp = custom_vjp


def report(model: Any) -> Report:
    """Reports which norms this package computes, which it leaves as they are, and why.

    Args:
      model: a `flax.nnx` module or a pytree of modules, before or after `replace`.

    Returns:
      A `Report`. It does not list calls of a replaced norm that are left to Flax, such
      as calls with a mask.

    Raises:
      TypeError: `model` holds no module.

    Example:
      >>> from flax import nnx
      >>> import jax_layernorm as jln
      >>> norm = nnx.RMSNorm(4, rngs=nnx.Rngs(0))
      >>> print(jln.nnx.report(norm))
      left      RMSNorm: replace() would replace it
    """
    found = Report()
    for path, norm, left in norms_of(model):
        name = "/".join(map(str, path)) or type(norm).__name__
        if left is None:
            found.replaced[name] = type(norm).__name__
        else:
            found.left[name] = left
    return found


class Found(NamedTuple):
    """A norm in a model. `left` is None if this package computes it."""

    path: tuple[Any, ...]
    norm: nnx.Module
    left: str | None


def norms_of(model: Any) -> list[Found]:
    """Finds the norms of a model, and what looks like a norm. Not public."""
    found, only_look_like_one = [], set()
    for path, module in _modules(model):
        if _before(module).own is not None or isinstance(module, LayerNorm | RMSNorm):
            found.append(Found(path, module, None))
        elif isinstance(module, nnx.LayerNorm | nnx.RMSNorm):
            left = _left(module) or "replace() would replace it"
            found.append(Found(path, module, left))
        elif isinstance(module, nnx.bridge.ToNNX):
            left = "a linen model; call it within `with jax_layernorm.linen.replace():`"
            found.append(Found(path, module, left))
        elif _looks_like_a_norm(module):
            left = _own_norms.ITS_OWN_CLASS.format(name=type(module).__qualname__)
            found.append(Found(path, module, left))
            only_look_like_one.add(path)
    # A class that looks like a norm may only hold one.
    holders = {f.path[:n] for f in found for n in range(len(f.path))}
    return [f for f in found if f.path not in only_look_like_one & holders]


def _all_modules(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [
        (path, node)
        for path, node in nnx.iter_graph(model, graph=True)
        if isinstance(node, nnx.Module)
    ]


def _modules(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    modules = _all_modules(model)
    if not modules:
        raise TypeError(
            "model must be a flax.nnx module or a pytree that holds one; got"
            f" {type(model).__module__}.{type(model).__qualname__}. Merge a graphdef and"
            " its state first, with nnx.merge; for linen there is"
            " jax_layernorm.linen.replace."
        )
    return modules


def _looks_like_a_norm(module: nnx.Module) -> bool:
    inside = [node for _, node in nnx.iter_graph(module, graph=True)]
    params = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param)
    }
    has_modules = sum(isinstance(node, nnx.Module) for node in inside) > 1
    return _own_norms.looks_like_a_norm(type(module), params, has_modules=has_modules)


def _left(norm: nnx.LayerNorm | nnx.RMSNorm) -> str | None:
    """Why `replace` must not touch the norm; None if it may."""
    kind = type(norm)
    if not _own_norms.calls_super(kind, _flaxs(kind)):
        return (
            f"{kind.__qualname__}.__call__ does not call super().__call__; pass"
            f" also={{{kind.__name__}: compute}} to replace()"
        )
    if norm.axis_index_groups is not None:
        return "axis_index_groups is given"
    used = [name for name in _OPTIONS if hasattr(norm, name)]
    if used:
        return (
            f"{kind.__qualname__} has an attribute {used[0]!r} of its own, a name that a"
            f" replaced norm needs; pass also={{{kind.__name__}: compute}} to replace()"
        )
    try:
        _replaced_class(kind)
    except Exception as refusal:  # what `__init_subclass__` raises is the user's
        return f"no subclass of {kind.__qualname__} can be made: {_text(refusal)}"
    return None


def _text(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {refusal}"


class _Own(NamedTuple):
    """A model's own norm class, and what returns what its `__call__` would."""

    base: type
    compute: _own_norms.Compute


class _Before(NamedTuple):
    """The class that a module had before `replace`, and what computes it now, if any."""

    kind: type
    own: _Own | None = None


def _before(module: nnx.Module) -> _Before:
    kind = type(module)
    if "_before_replace" in vars(kind):
        return vars(kind)["_before_replace"]
    if isinstance(module, LayerNorm | RMSNorm) and vars(module).get("_replaced"):
        return _Before(
            _flaxs(kind) if kind in (LayerNorm, RMSNorm) else kind.__bases__[0]
        )
    return _Before(kind)


def _own_norm(kind: type, also: Mapping[type, _own_norms.Compute]) -> _Own | None:
    for base in kind.__mro__:
        if base in also and _own_norms.calls_super(kind, base):
            return _Own(base, also[base])
    return None


@functools.cache
def _computed(
    kind: Any,
    base: Any,
    compute: _own_norms.Compute,
    implementation: Implementation | None,
    custom_vjp: bool,
) -> type:
    """The class of a replaced norm of class `kind`, whose `__call__` is that of `base`.

    Or calls it by `super()`: the class that calls `compute` stands before `base`.
    """

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _own_norms.computing(implementation, custom_vjp):
            return compute(self, *args, **kwargs)

    metaclass = _pickled_by(copy.copy, type(kind))  # as the model's class itself
    before = {"_before_replace": _Before(kind, _Own(base, compute))}
    made = _subclass(metaclass, (base,), before | {"__call__": __call__})
    return made if kind is base else _subclass(metaclass, (kind, made), before)


def _subclass(metaclass: type, bases: tuple[Any, ...], members: dict[str, Any]) -> type:
    """A class that has the name of its first base."""
    kind = bases[0]
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    # Flax's `__init_subclass__` takes this, but a class may have one that does not.
    options = {} if kind._pytree__is_pytree else {"pytree": False}
    return metaclass(kind.__name__, bases, names | members, **options)


@functools.cache
def _pickled_by(function: Callable[[type], type], metaclass: type) -> type:
    """A metaclass whose classes pickle as `function` of their first base.

    Pickle would look up such a class by name, and find that base.
    """
    made = type("Replaced", (metaclass,), {})
    copyreg.pickle(made, lambda kind: (function, (kind.__bases__[0],)))
    return made


def _flaxs(kind: type) -> type:
    return nnx.LayerNorm if issubclass(kind, nnx.LayerNorm) else nnx.RMSNorm


@functools.cache
def _replaced_class(kind: type) -> type:
    """The class of a replaced norm: ours, or a subclass of both `kind` and ours.

    Pickles of replaced norms name it, in `jax_layernorm.nnx`.
    """
    ours = LayerNorm if issubclass(kind, nnx.LayerNorm) else RMSNorm
    if kind is _flaxs(kind):
        return ours
    return _subclass(_pickled_by(_replaced_class, type(kind)), (kind, ours), {})


_replaced_class.__module__ = "jax_layernorm.nnx"
