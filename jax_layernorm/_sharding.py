"""Placement that types show: over manual mesh axes, and over explicit ones."""

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
from jax_layernorm._kernel_op import Share
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


def over_split_rows(
    run: Callable[..., Normalized],
    spec: NormSpec,
    x: Array,
    *others: Array | None,
) -> Normalized:
    """`run(spec, x, *others)`; on each device where explicit mesh axes split the rows.

    There `run` gets those axes as `axis_names`, and merges the statistics of the parts
    in one collective, where the partitioner would need one for each of three sums.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    parts = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]

    def explicit(axes: Iterable[int]) -> tuple[str, ...]:
        split_over = _names(parts[axis] for axis in axes)
        return tuple(name for name in split_over if name in mesh.explicit_axes)

    names = explicit(sorted(spec.axes))
    if not names:
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
    # The statistics are the same on all devices of a row, which check_vma would not see.
    return jax.shard_map(
        functools.partial(
            run, dataclasses.replace(spec, axis_names=(*spec.axis_names, *names))
        ),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(explicit(range(x.ndim))),
        check_vma=False,
    )(*operands)


def share_of_each_device(
    operands: Any, results: Sequence[Any], static: dict[str, Any]
) -> Share | None:
    """One device's share of an op under explicit mesh axes that split only the rows.

    A result that lacks an axis over which `x` is split is a sum over that axis: the
    parameters' gradients.
    """
    x = operands[0]
    mesh = x.sharding.mesh
    parts = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]

    def along_x(shape: Sequence[int]) -> P:
        own = zip(parts[x.ndim - len(shape) :], shape, strict=True)
        return P(*(None if n == 1 else part for part, n in own))

    def local_shape(shape: Sequence[int]) -> tuple[int, ...]:
        return NamedSharding(mesh, along_x(shape)).shard_shape(tuple(shape))

    leaves = jax.tree.leaves(operands)
    if (
        set(mesh.explicit_axes) != set(mesh.axis_names)
        or any(parts[axis] is not None for axis in static["spec"].axes)
        or any(a.sharding.spec != along_x(a.shape) for a in (*leaves, *results))
    ):
        return None
    shapes = {
        key: local_shape(static[key])
        for key in ("scale_shape", "bias_shape")
        if static.get(key) is not None
    }
    out_specs = [along_x(a.shape) for a in results]
    return Share(
        mesh=mesh,
        operands=jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(local_shape(a.shape), a.dtype), operands
        ),
        static=static | shapes,
        in_specs=tuple(along_x(a.shape) for a in leaves),
        out_specs=out_specs,
        sums=[
            tuple(name for name in _names(parts) if name not in _names(spec))
            for spec in out_specs
        ],
    )


def _names(spec: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes that a spec names."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return tuple(name for part in parts for name in part if name is not None)
