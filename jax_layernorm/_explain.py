"""`explain`: which implementation runs where, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_layernorm import _equations, _functions, _kernels
from jax_layernorm._kernel_op import PLATFORMS


class Choice(NamedTuple):
    """What runs on one platform.

    Attributes:
      implementation: the name of the implementation that runs, forward and backward.
        "xla and cuda", say, if parts of the program differ, for example the two passes.
        None if the named implementation cannot run; the call then raises.
      reasons: for each of the other implementations, why it does not run. If several
        run, also where each of them does not, and why.
    """

    implementation: str | None
    reasons: dict[str, str]


class Explanation(dict[str, Choice]):
    """A `Choice` for each platform; prints as a table."""

    def __str__(self) -> str:
        lines = []
        for platform, choice in self.items():
            lines.append(f"{platform:<5} {choice.implementation or 'none: it raises'}")
            for reason in dict.fromkeys(choice.reasons.values()):
                names = [name for name, why in choice.reasons.items() if why == reason]
                lines.append(f"      not {', '.join(names)}: {reason}")
        return "\n".join(lines)


def explain(
    params: Any,
    x: Any,
    residual: Any = None,
    *,
    function: Callable[..., Any] | None = None,
    **options: Any,
) -> Explanation:
    """Says which implementation would run on each platform, and why others would not.

    It traces the norm and its backward pass, lowers them for each platform, and reports
    the choices that were made on the way. It computes nothing.

    Args:
      params: as for `layer_norm`; arrays, or `jax.ShapeDtypeStruct`s.
      x: as for `layer_norm`. For a sharded array, the answer is for its sharding.
      residual: as for `add_layer_norm`.
      function: one of the four functions, or any function of `params`, `x` and, if
        given, `residual` that calls them, for example in `jax.vmap` or `jax.shard_map`.
        If JAX cannot differentiate it in reverse mode, as a `jax.lax.while_loop`, it
        must pass its arguments to `jax.lax.stop_gradient` first; the answer is then for
        the forward pass. The default is `layer_norm`, or `add_layer_norm` with a
        residual.
      **options: keyword arguments of `function`.

    Returns:
      A dict from "cpu", "cuda", "rocm" and "tpu" to a `Choice(implementation, reasons)`;
      it prints as a table.

    Raises:
      TypeError, ValueError, NotImplementedError: as when `function` is called.
      ValueError: `function` calls no norm.

    Example:
      >>> import jax
      >>> import jax_layernorm as jln
      >>> x = jax.ShapeDtypeStruct((8192, 4096), "bfloat16")
      >>> jln.explain({}, x)["tpu"].implementation
      'xla'
    """
    if function is None:
        added = residual is not None
        function = _functions.add_layer_norm if added else _functions.layer_norm
    norm = functools.partial(function, **options)

    def both_passes(*arguments: Any) -> Any:
        out, pullback = jax.vjp(norm, *arguments)
        return out, pullback(out)

    arguments = (params, x) if residual is None else (params, x, residual)
    with _kernels.record_decisions() as while_traced:
        traced = jax.jit(both_passes).trace(*arguments)
    text = str(traced.jaxpr)
    has_ops = _equations.FORWARD in text or _equations.BACKWARD in text
    choices = {}
    for platform in PLATFORMS:
        while_lowered = _decided_at_lowering(traced, platform) if has_ops else []
        choices[platform] = _choice(while_traced + while_lowered)
    return Explanation(choices)


def _decided_at_lowering(traced: Any, platform: str) -> list[_kernels.Decision]:
    with _kernels.record_decisions() as decisions:
        try:
            traced.lower(lowering_platforms=(platform,))
        except NotImplementedError:
            # If the choice of implementation did not cause the error, pass it on.
            if not decisions or decisions[-1].chosen is not None:
                raise
    return decisions


def _choice(decisions: list[_kernels.Decision]) -> Choice:
    if not decisions:
        raise ValueError(
            "function must call one of the norms of jax_layernorm; got one that calls"
            " none. Pass one of them, or a function that calls one."
        )
    chosen = dict.fromkeys(decision.chosen for decision in decisions)
    reasons: dict[str, str] = {}
    for decision in decisions:
        for name, reason in decision.reasons.items():
            part = decision.op if name in chosen else None  # it runs elsewhere
            reasons[name] = f"in {part}, {reason}" if part else reason
    if None in chosen:
        return Choice(None, reasons)
    return Choice(" and ".join(map(str, chosen)), reasons)
