"""A kernel op: a JAX primitive that *is* its reference function.

Abstract evaluation, differentiation, batching and the meaning of the op are all
those of a plain `jax.numpy` function, so the op is right under every
transformation by construction. A kernel enters in one place only, when the op
is lowered for a platform, where `select` picks the function to run.

Two simpler ways do not work. `lax.platform_dependent` traces every branch on
every platform, which breaks export for several platforms at once and second
derivatives of kernels. Asking `jax.default_backend()` while tracing is wrong
for ahead-of-time compilation and for export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

# With the package and not when an op is first used: `jax.extend` loads Pallas, which since
# JAX 0.12 adds to the keys of JAX's caches, so that all functions would be traced again.
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Problem(NamedTuple):
    """What is known about one use of a kernel op when it is lowered.

    Attributes:
      op: the name of the op.
      operands: the op's positional arguments, abstract (`.shape`, `.dtype`); None
        if left out.
      static: the op's keyword arguments.
      platform: one of `PLATFORMS`, or "" for any other.
      partitioned: XLA will split this op over several devices; a kernel, opaque
        to XLA, cannot be split.
      exported: the program will be saved and run elsewhere, by another version.
    """

    op: str
    operands: tuple[Any, ...]
    static: dict[str, Any]
    platform: str
    partitioned: bool
    exported: bool


class Batched(NamedTuple):
    """A batched use of an op, written as one use on arrays with one more axis."""

    operands: tuple[Any, ...]
    static: dict[str, Any]
    finish: Callable[[Any], Any]
    """Turns what that use returns into results batched along their first axis."""


class Pruned(NamedTuple):
    """A use of an op that computes fewer of its results.

    Attributes:
      static: the keyword arguments of that use.
      unneeded: the positions of the operands that it does not need.
      results: which of the flat results it computes.
    """

    static: dict[str, Any]
    unneeded: tuple[int, ...]
    results: Sequence[bool]


class KernelOp:
    """`op(*operands, **static)` computes `reference(*operands, **static)`.

    Args:
      name: the primitive's name, as a jaxpr shows it.
      reference: takes pytrees of arrays as operands and hashable static arguments, and
        returns a pytree of arrays. It must not depend on JAX's global settings.
      select: `select(problem)` returns the function to run, with the signature of the
        reference. Called at lowering; what it raises reaches the user.
      check: `check(problem)` raises if no platform could run the problem. Called when
        the op is called, before the platform, the partitioning and the export are
        known.
      batch: `batch(operands, dims, static)` returns a `Batched`, or None if the
        reference is to be batched instead. Called under `jax.vmap`; `dims` are the
        positions of the mapped axis in each operand, None if it is not mapped.
      batched_reference: `batched_reference(problem)` is called if the reference is
        batched.
      prune: `prune(static, used)` returns a `Pruned`; `used` says which of the flat
        results a program uses, at least one. Called when the program is lowered.
      shard: `shard(problem, results)` returns a `_sharding.Shard`, one device's part of
        the op, or None if XLA is to partition it. Called at lowering for a program that
        XLA would partition; `results` are the op's results, abstract and flat.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        select: Callable[[Problem], Callable[..., Any]],
        *,
        check: Callable[[Problem], None],
        batch: Callable[..., Batched | None],
        batched_reference: Callable[[Problem], None],
        prune: Callable[[dict[str, Any], Sequence[bool]], Pruned],
        shard: Callable[..., Any],
    ):
        self.name = name
        self.reference = reference
        self._select, self._check, self._shard = select, check, shard
        self._pruned = prune
        self._batched, self._batched_reference = batch, batched_reference
        self._traced = functools.lru_cache(maxsize=4096)(self._trace)
        self._compiled = functools.lru_cache(maxsize=4096)(self._compile)
        self._primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(self._evaluate)
        primitive.def_abstract_eval(self._abstract_eval)
        ad.primitive_jvps[primitive] = self._jvp
        batching.primitive_batchers[primitive] = self._batch
        partial_eval.dce_rules[primitive] = self._prune
        mlir.register_lowering(primitive, functools.partial(self._lower, ""))
        for platform in PLATFORMS:
            lower = functools.partial(self._lower, platform)
            mlir.register_lowering(primitive, lower, platform=platform)

    def __call__(self, *operands: Any, **static: Hashable) -> Any:
        self._check(self._unplaced(operands, static))
        leaves, treedef = jax.tree.flatten(operands)
        items = tuple(sorted(static.items()))
        _, out_tree = self._outputs(map(jax.typeof, leaves), treedef, items)
        results = self._primitive.bind(*leaves, treedef=treedef, static=items)
        return jax.tree.unflatten(out_tree, results)

    def _unplaced(self, operands: tuple[Any, ...], static: dict[str, Any]) -> Problem:
        return Problem(self.name, operands, static, "", False, False)

    def _trace(
        self, avals: tuple[Any, ...], treedef: Any, static: Any, context: Hashable
    ) -> tuple[list[Any], Any]:
        del context  # part of the cache's key: the outputs' types depend on it
        operands = jax.tree.unflatten(treedef, avals)
        jaxpr, shapes = jax.make_jaxpr(
            functools.partial(self.reference, **dict(static)), return_shape=True
        )(*operands)
        return list(jaxpr.out_avals), jax.tree.structure(shapes)

    def _outputs(self, avals: Any, treedef: Any, static: Any) -> tuple[list[Any], Any]:
        mesh, x64 = jax.sharding.get_abstract_mesh(), jax.config.read("jax_enable_x64")
        return self._traced(tuple(avals), treedef, static, (mesh, x64))

    def _compile(self, treedef: Any, static: Any) -> Callable[..., Any]:
        def bind(*leaves: Any) -> Any:
            return self._primitive.bind(*leaves, treedef=treedef, static=static)

        bind.__name__ = bind.__qualname__ = self.name
        # As JAX marks its own primitives: so `jax_debug_nans` names this op, and does not
        # look for the NaN by calling it again without jit, which would compile it again.
        bind._apply_primitive = True  # type: ignore[attr-defined]
        return jax.jit(bind)

    def _evaluate(self, *leaves: Any, treedef: Any, static: Any) -> Any:
        with jax.disable_jit(False):  # a primitive is compiled even then
            return self._compiled(treedef, static)(*leaves)

    def _abstract_eval(self, *avals: Any, treedef: Any, static: Any) -> list[Any]:
        return self._outputs(avals, treedef, static)[0]

    def _jvp(self, primals: Any, tangents: Any, *, treedef: Any, static: Any) -> Any:
        results = self._primitive.bind(*primals, treedef=treedef, static=static)
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def along(*values: Any) -> list[Any]:
            leaves = list(primals)
            for i, value in zip(moving, values, strict=True):
                leaves[i] = value
            return _on_leaves(self.reference, treedef, static)(*leaves)

        _, out_tangents = jax.jvp(
            along, [primals[i] for i in moving], [tangents[i] for i in moving]
        )
        return results, out_tangents

    def _batch(self, args: Any, dims: Any, *, treedef: Any, static: Any) -> Any:
        operands, positions = (jax.tree.unflatten(treedef, a) for a in (args, dims))
        batched = self._batched(operands, positions, dict(static))
        if batched is not None and self._can_run(batched.operands, batched.static):
            out = batched.finish(self(*batched.operands, **batched.static))
            results = jax.tree.leaves(out)
        else:
            self._batched_reference(self._unplaced(operands, dict(static)))
            function = _on_leaves(self.reference, treedef, static)
            results = jax.vmap(function, in_axes=tuple(dims))(*args)
        return results, [0] * len(results)

    def _can_run(self, operands: tuple[Any, ...], static: dict[str, Any]) -> bool:
        """Whether the implementation that was asked for, if any, can run this."""
        try:
            self._check(self._unplaced(operands, static))
        except NotImplementedError:
            return False
        return True

    def _prune(self, used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
        equation = rest[-1]  # since JAX 0.12, it follows the operands in use
        if not any(used):
            return [False] * len(equation.invars), None
        static = dict(equation.params["static"])
        pruned = self._pruned(static, used)
        treedef = equation.params["treedef"]
        needed = list(jax.tree.unflatten(treedef, [True] * treedef.num_leaves))
        operands = list(jax.tree.unflatten(treedef, equation.invars))
        for position in pruned.unneeded:
            needed[position] = jax.tree.map(lambda _: False, needed[position])
            operands[position] = None
        invars, treedef = jax.tree.flatten(tuple(operands))
        items = tuple(sorted(pruned.static.items()))
        outvars = zip(equation.outvars, pruned.results, strict=True)
        return jax.tree.leaves(needed), equation.replace(
            invars=invars,
            outvars=[var for var, computed in outvars if computed],
            params={"treedef": treedef, "static": items},
        )

    def _lower(
        self, platform: str, ctx: Any, *args: Any, treedef: Any, static: Any
    ) -> Any:
        context = ctx.module_context
        problem = Problem(
            op=self.name,
            operands=jax.tree.unflatten(treedef, ctx.avals_in),
            static=dict(static),
            platform=platform,
            partitioned=_is_partitioned(context.axis_context),
            exported=context.lowering_parameters.for_export,
        )
        shard = None
        if problem.partitioned and not _is_manual(context.axis_context):
            shard = self._shard(problem, ctx.avals_out)
        if shard is None:
            function = _on_leaves(self._select(problem), treedef, static)
        else:
            selected = self._select(shard.problem)
            local = _on_leaves(selected, treedef, shard.problem.static.items())
            function = shard.on_every_device(local)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


def _on_leaves(function: Callable[..., Any], treedef: Any, static: Any) -> Any:
    """`function` of flat operands, with flat results."""

    def on_leaves(*leaves: Any) -> list[Any]:
        operands = jax.tree.unflatten(treedef, leaves)
        return jax.tree.leaves(function(*operands, **dict(static)))

    return on_leaves


def _is_manual(axis_context: Any) -> bool:
    """Whether what is lowered in this context is inside `shard_map`."""
    return isinstance(axis_context, mlir.SPMDAxisContext)


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA's partitioner will split what is lowered in this context."""
    if _is_manual(axis_context):
        return set(axis_context.manual_axes) != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) != 1
