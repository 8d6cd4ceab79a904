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
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Problem(NamedTuple):
    """What is known about one use of a kernel op when it is lowered.

    Attributes:
      op: the name of the op.
      operands: the op's positional arguments, abstract (`.shape`, `.dtype`); None
        where left out.
      static: the op's keyword arguments.
      platform: one of `PLATFORMS`, or "" for any other.
      partitioned: XLA will split this op over several devices; a kernel, opaque
        to XLA, cannot be split.
      exported: the program is to be saved and run elsewhere, by another version.
    """

    op: str
    operands: tuple[Any, ...]
    static: dict[str, Any]
    platform: str
    partitioned: bool
    exported: bool


class Folded(NamedTuple):
    """A batched use of an op, written as one use on arrays of one rank more."""

    operands: tuple[Any, ...]
    static: dict[str, Any]
    finish: Callable[[Any], Any]
    """From what that use returns to results batched along their first axis."""


class Share(NamedTuple):
    """One device's share of an op, where a mesh with explicit axes splits it.

    The last three are of the flat operands and results.
    """

    mesh: Any
    operands: tuple[Any, ...]
    static: dict[str, Any]
    in_specs: Sequence[PartitionSpec]
    out_specs: Sequence[PartitionSpec]
    sums: Sequence[tuple[str, ...]]
    """Of each result, the axes over which the devices' shares of it are summed."""


class Select(Protocol):
    def __call__(self, problem: Problem) -> Callable[..., Any]:
        """The function to run for `problem`, with the signature of the reference."""
        ...


def kernel_op(
    name: str,
    reference: Callable[..., Any],
    select: Select,
    *,
    refused: Callable[[Problem], str | None] = lambda problem: None,
    fold: Callable[..., Folded | None] = lambda operands, dims, static: None,
    share: Callable[..., Share | None] = lambda operands, results, static: None,
) -> Callable[..., Any]:
    """Makes `op(*operands, **static)`, which computes `reference(*operands, **static)`.

    Args:
      name: of the primitive, as it shows in a jaxpr.
      reference: operands are pytrees of arrays, static arguments hashable; returns a
        pytree of arrays. It must not depend on JAX's global settings.
      select: called at lowering; what it raises reaches the user.
      refused: called when the op is, with what is known by then of the problem; a message
        where it can run nowhere, which is raised. A batched use for which there is one is
        not folded.
      fold: called under `jax.vmap` with the operands, the position of the mapped axis in
        each (None: not mapped) and the static arguments; None where the batched op is
        not one use of the op, and the reference is to be batched instead.
      share: called at lowering for a program on a mesh with explicit axes, with abstract
        operands, the results as a list and the static arguments; None where the devices
        cannot each compute a share of their own, and XLA is to partition the op.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def flat(function: Callable[..., Any], treedef: Any, static: Any) -> Any:
        def on_leaves(*leaves: Any) -> list[Any]:
            operands = jax.tree.unflatten(treedef, leaves)
            return jax.tree.leaves(function(*operands, **dict(static)))

        return on_leaves

    @functools.lru_cache(maxsize=4096)
    def traced(
        avals: tuple[Any, ...], treedef: Any, static: Any, context: Hashable
    ) -> tuple[list[Any], Any]:
        operands = jax.tree.unflatten(treedef, avals)
        jaxpr, shapes = jax.make_jaxpr(
            functools.partial(reference, **dict(static)), return_shape=True
        )(*operands)
        return list(jaxpr.out_avals), jax.tree.structure(shapes)

    def outputs(avals: Any, treedef: Any, static: Any) -> tuple[list[Any], Any]:
        mesh = jax.sharding.get_abstract_mesh()  # shardings of outputs depend on it
        return traced(tuple(avals), treedef, static, mesh)

    def refusal(operands: tuple[Any, ...], static: dict[str, Any]) -> str | None:
        return refused(Problem(name, operands, static, "", False, False))

    def op(*operands: Any, **static: Hashable) -> Any:
        message = refusal(operands, static)
        if message is not None:
            raise NotImplementedError(message)
        leaves, treedef = jax.tree.flatten(operands)
        items = tuple(sorted(static.items()))
        _, out_tree = outputs(map(jax.typeof, leaves), treedef, items)
        results = primitive.bind(*leaves, treedef=treedef, static=items)
        return jax.tree.unflatten(out_tree, results)

    @functools.lru_cache(maxsize=4096)
    def compiled(treedef: Any, static: Any) -> Callable[..., Any]:
        return jax.jit(
            functools.partial(primitive.bind, treedef=treedef, static=static)
        )

    def evaluate(*leaves: Any, treedef: Any, static: Any) -> Any:
        with jax.disable_jit(False):  # a primitive is compiled even then
            return compiled(treedef, static)(*leaves)

    def abstract_eval(*avals: Any, treedef: Any, static: Any) -> list[Any]:
        return outputs(avals, treedef, static)[0]

    def jvp(primals: Any, tangents: Any, *, treedef: Any, static: Any) -> Any:
        results = primitive.bind(*primals, treedef=treedef, static=static)
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
        if not moving:
            return results, [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]

        def along(*values: Any) -> list[Any]:
            leaves = list(primals)
            for i, value in zip(moving, values, strict=True):
                leaves[i] = value
            return flat(reference, treedef, static)(*leaves)

        _, out_tangents = jax.jvp(
            along, [primals[i] for i in moving], [tangents[i] for i in moving]
        )
        return results, out_tangents

    def batch(args: Any, dims: Any, *, treedef: Any, static: Any) -> Any:
        operands, positions = (jax.tree.unflatten(treedef, a) for a in (args, dims))
        folded = fold(operands, positions, dict(static))
        if folded is None or refusal(folded.operands, folded.static) is not None:
            run = flat(reference, treedef, static)
            results = jax.vmap(run, in_axes=tuple(dims))(*args)
        else:
            results = jax.tree.leaves(
                folded.finish(op(*folded.operands, **folded.static))
            )
        return results, [0] * len(results)

    def lower(platform: str, ctx: Any, *args: Any, treedef: Any, static: Any) -> Any:
        problem = Problem(
            op=name,
            operands=jax.tree.unflatten(treedef, ctx.avals_in),
            static=dict(static),
            platform=platform,
            partitioned=_is_partitioned(ctx.module_context.axis_context),
            exported=ctx.module_context.lowering_parameters.for_export,
        )
        own = None
        if _is_explicit(ctx.module_context.axis_context, ctx.avals_in):
            own = share(problem.operands, ctx.avals_out, problem.static)
        if own is None:
            function = flat(select(problem), treedef, static)
        else:
            problem = problem._replace(
                operands=own.operands, static=own.static, partitioned=False
            )
            run = flat(select(problem), treedef, tuple(own.static.items()))
            function = jax.shard_map(
                lambda *leaves: _summed(run(*leaves), own.sums),
                mesh=own.mesh,
                in_specs=own.in_specs,
                out_specs=own.out_specs,
                check_vma=False,
            )
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, functools.partial(lower, ""))
    for platform in PLATFORMS:
        mlir.register_lowering(
            primitive, functools.partial(lower, platform), platform=platform
        )
    return op


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA's partitioner will split what is lowered in this context."""
    if isinstance(axis_context, mlir.SPMDAxisContext):  # inside shard_map
        return set(axis_context.manual_axes) != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) != 1


def _is_explicit(axis_context: Any, avals: Sequence[Any]) -> bool:
    """Whether it will, and the types say how."""
    inside = isinstance(axis_context, mlir.SPMDAxisContext)
    explicit = any(aval.sharding.mesh.explicit_axes for aval in avals)
    return explicit and not inside and _is_partitioned(axis_context)


def _summed(results: list[Any], sums: Sequence[tuple[str, ...]]) -> list[Any]:
    """Each result, summed over its axes; all that have the same ones at once."""
    together: dict[tuple[str, ...], list[int]] = {}
    for i, axes in enumerate(sums):
        if axes:
            together.setdefault(axes, []).append(i)
    for axes, places in together.items():
        whole = lax.psum([results[i] for i in places], axes)
        for i, result in zip(places, whole, strict=True):
            results[i] = result
    return results
