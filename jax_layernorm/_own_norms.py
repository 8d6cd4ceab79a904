"""A model's own norm classes: what `linen.replace` and `nnx.replace` share."""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax_layernorm import _functions
from jax_layernorm._arguments import Implementation

Compute = Callable[..., Any]
"""`compute(norm, x, ...)` returns what the class's `__call__` would."""
Also = Mapping[type, Compute]

ITS_OWN_CLASS = (
    "its own class; pass also={{{name}: compute}} to replace(), where compute(norm, x)"
    " calls rms_norm or layer_norm"
)
_NORM = re.compile(
    "(^n|N|_n)orm(alization|s)?([^a-z]|$)|NORM|norm$|(^|[a-z_])(LN|RMS)$"
)
_OTHER_NORM = re.compile("(batch|group|instance|weight|spectral)_?norm", re.IGNORECASE)
_SCALES = ("scale", "weight", "gamma")


def check_also(also: Also | None, bases: tuple[type, ...], fix: str) -> dict[type, Any]:
    """`also` as a dict. Raises TypeError with `fix` if a class has none of `bases`."""
    if also is None:
        return {}
    if not isinstance(also, Mapping):
        raise TypeError(
            "also must be a mapping from norm classes to functions; got"
            f" {type(also).__name__}. Write also={{MyNorm: compute}}."
        )
    for kind, compute in also.items():
        if not isinstance(kind, type):
            raise TypeError(
                f"also must map norm classes to functions; got the key {kind!r} of type"
                f" {type(kind).__name__}. Pass the class and not its name or an instance."
            )
        if not issubclass(kind, bases):
            raise TypeError(
                "also must name module classes that this replace() can see; got"
                f" {kind.__module__}.{kind.__qualname__}. {fix}"
            )
        if not any("__call__" in c.__dict__ for c in kind.__mro__):
            raise TypeError(
                "also must name classes with a __call__ method; got"
                f" {kind.__module__}.{kind.__qualname__}, which has none."
            )
        if not callable(compute):
            raise TypeError(
                f"also must map {kind.__qualname__} to a function compute(norm, x, ...);"
                f" got {compute!r}. Write, for example, lambda norm, x:"
                " rms_norm({'scale': norm.scale[...]}, x)."
            )
        try:
            hash(compute)
        except TypeError as error:
            raise TypeError(
                f"also must map {kind.__qualname__} to a hashable function, because it"
                f" becomes part of the keys of JAX's caches; got {compute!r} ({error})."
                " Use a plain function."
            ) from None
    return dict(also)


@contextlib.contextmanager
def computing(
    implementation: Implementation | None, custom_vjp: bool
) -> Iterator[None]:
    """Passes the arguments of `replace` to the functions that a `compute` calls."""
    if implementation is None and custom_vjp:
        yield
        return
    with _functions.overriding(_functions.Overrides(implementation, custom_vjp)):
        yield


def looks_like_a_norm(
    kind: type, params: Mapping[str, Any], *, has_modules: bool
) -> bool:
    """Whether a class that is not Flax's is probably a norm that `also` could name.

    That is so by its name, or if its parameters are a vector called scale, weight or
    gamma, and perhaps other vectors, and it has no submodules.
    """
    if kind.__module__.partition(".")[0] == "flax" or _OTHER_NORM.search(kind.__name__):
        return False
    if _NORM.search(kind.__name__):
        return True
    vectors = all(getattr(param, "ndim", None) == 1 for param in params.values())
    return not has_modules and vectors and any(name in params for name in _SCALES)


def calls_super(kind: type, base: type) -> bool:
    """Whether each `__call__` that `kind` has above that of `base` calls `super()`'s.

    False too if the call would not end in that of `base`, but in that of a class between
    `base` and the class that `base` has it from.
    """
    place = kind.__mro__.index(base)
    with_call = [c for c in kind.__mro__ if "__call__" in c.__dict__]
    own = [c.__dict__["__call__"] for c in with_call if c in kind.__mro__[:place]]
    calls = next(c for c in base.__mro__ if "__call__" in c.__dict__)
    return with_call[len(own)] is calls and all(
        _names(inspect.unwrap(call)) >= {"super", "__call__"} for call in own
    )


def _names(function: Any) -> set[str]:
    """The names that the code of a function uses, with the functions inside it."""
    found: set[str] = set()
    codes = [getattr(function, "__code__", None)]
    for code in codes:
        if isinstance(code, types.CodeType):
            found |= {*code.co_names, *code.co_freevars}
            codes += code.co_consts
    return found
