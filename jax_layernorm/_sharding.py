"""Placement that is known while tracing: manual mesh axes, and explicit ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jax_layernorm._equations import NormSpec
from jax_layernorm._results import Normalized, Statistics


def equally_varying(operands: Sequence[Array | None]) -> list[Any]:
    """Operands made to vary over the same manual mesh axes.

    Inside `shard_map(check_vma=True)` a custom_vjp rule must return a cotangent that
    varies over just the axes its primal does. Casting a replicated parameter to the
    axes of `x` beforehand puts the sum over them where it belongs: into the
    transpose of the cast.
    """
    varying = [
        frozenset() if operand is None else jax.typeof(operand).manual_axis_type.varying
        for operand in operands
    ]
    everywhere = frozenset().union(*varying)
    return [
        operand
        if operand is None or axes == everywhere
        else lax.pcast(operand, tuple(sorted(everywhere - axes)), to="varying")
        for operand, axes in zip(operands, varying, strict=True)
    ]


def on_each_device(
    run: Callable[..., Normalized],
    spec: NormSpec,
    x: Array,
    *others: Array | None,
) -> Normalized:
    """`run(spec, x, *others)`; in a `shard_map` where explicit mesh axes split `x`.

    There each device runs a kernel on rows of its own, which the partitioner could not
    split. Where the axes split the rows themselves, `run` gets them as `axis_names`, and
    merges the statistics of the parts in one collective, where the partitioner would
    need one for each of three sums.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    parts = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]

    def explicit(axes: Iterable[int]) -> tuple[str, ...]:
        split_over = (name for axis in axes for name in _as_tuple(parts[axis]))
        return tuple(name for name in split_over if name in mesh.explicit_axes)

    splitting_x, splitting_rows = explicit(range(x.ndim)), explicit(sorted(spec.axes))
    if not splitting_x:
        return run(spec, x, *others)

    def spec_of(operand: Array) -> P:
        own = zip(parts[x.ndim - operand.ndim :], operand.shape, strict=True)
        return P(*(None if n == 1 else part for part, n in own))

    operands = (x, *others)
    in_specs = jax.tree.map(spec_of, operands)
    operands = jax.tree.map(
        lambda operand, own: reshard(operand, NamedSharding(mesh, own)),
        operands,
        in_specs,
    )
    whole: Any = P(*parts)  # specs, in the places of the arrays they are of
    a_row: Any = P(
        *(None if i - x.ndim in spec.axes else p for i, p in enumerate(parts))
    )
    out_specs = Normalized(
        y=whole,
        total=None if others[0] is None else whole,
        statistics=Statistics(a_row, a_row) if spec.return_statistics else None,
    )
    spec = dataclasses.replace(spec, axis_names=(*spec.axis_names, *splitting_rows))
    # Statistics merged over a row's devices are the same on all, which `check_vma` would
    # not see. Without it, parameters' gradients are summed over every axis named here.
    return jax.shard_map(
        functools.partial(run, spec),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(splitting_x if splitting_rows else mesh.explicit_axes),
        check_vma=not splitting_rows,
    )(*operands)


def _as_tuple(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)
