"""Placement that types show, over manual mesh axes and over explicit mesh axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jax_layernorm._equations import NormSpec
from jax_layernorm._kernel_op import Problem
from jax_layernorm._results import Normalized, Statistics


def equally_varying(operands: Sequence[Array | None]) -> list[Any]:
    """Operands made to vary over the same manual mesh axes.

    Inside `shard_map(check_vma=True)` a custom_vjp rule must return a cotangent that
    varies over exactly the axes of its primal. So a replicated parameter is first cast
    to the axes of `x`; then the transpose of the cast sums its gradient over these
    axes.
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


class Placement(NamedTuple):
    """How a mesh splits the axes of `x`."""

    mesh: Any
    axes: tuple[Any, ...]
    """For each axis of `x` the mesh axes that split it: a name, several, or None."""
    shape: tuple[Any, ...]
    """That of `x`."""

    def along(self, shape: Sequence[Any]) -> P:
        """The spec of an array of `shape` that broadcasts against `x`."""
        first = len(self.axes) - len(shape)
        aligned = zip(self.axes[first:], self.shape[first:], shape, strict=True)
        return P(*(names if n == of_x else None for names, of_x, n in aligned))

    def explicit(self, axes: Iterable[int]) -> tuple[str, ...]:
        """The explicit mesh axes that split these axes of `x`."""
        names = _names(self.axes[axis] for axis in axes)
        return tuple(name for name in names if name in self.mesh.explicit_axes)


def placement_of(x: Any) -> Placement:
    """The placement in the type of `x`, an array or an abstract one."""
    sharding = jax.typeof(x).sharding if isinstance(x, Array) else x.sharding
    missing = x.ndim - len(sharding.spec)
    return Placement(sharding.mesh, (*sharding.spec, *[None] * missing), (*x.shape,))


def placed_alike(
    operands: Sequence[Any],
) -> tuple[list[Any], Callable[[Normalized], Normalized]]:
    """Operands sharded over explicit mesh axes like `x`, and what places the results.

    A custom_vjp rule must return a cotangent that is sharded like its primal. So `x`
    and `residual` are both placed like their sum, and the others in the way they
    broadcast against it. The returned function places `y` as JAX places `x * scale +
    bias`. The transposes of these changes place the gradients.

    Raises:
      ShardingTypeError: JAX would not add arrays with these placements.
    """
    given = [operand for operand in operands if operand is not None]
    if not any(placement_of(operand).mesh.explicit_axes for operand in given):
        return [*operands], lambda out: out
    x, residual, *others = operands
    y_sharding = _sharding_of_sum(given)
    x_sharding = _sharding_of_sum([x] if residual is None else [x, residual])
    placement = Placement(x_sharding.mesh, (*x_sharding.spec,), (*x.shape,))

    def place_results(out: Normalized) -> Normalized:
        return out._replace(y=_placed(out.y, y_sharding.mesh, y_sharding.spec))

    return [
        None
        if operand is None
        else _placed(operand, y_sharding.mesh, placement.along(operand.shape))
        for operand in (x, residual, *others)
    ], place_results


def _sharding_of_sum(arrays: Sequence[Array]) -> NamedSharding:
    def add(*arrays: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return functools.reduce(jnp.add, arrays)

    return jax.make_jaxpr(add)(*arrays).out_avals[0].sharding


def _placed(array: Array, mesh: Any, spec: P) -> Array:
    if placement_of(array).axes == tuple(spec):
        return array
    return reshard(array, NamedSharding(mesh, spec))


def features_are_split(spec: NormSpec, x: Array) -> bool:
    """Whether explicit mesh axes split the normalized axes, and `on_split_features` runs.

    Inside a `shard_map` over other axes it does not, because a `shard_map` in it could not
    tell JAX over which of them its gradients vary. The partitioner takes over there.
    """
    inside = jax.typeof(x).manual_axis_type.varying
    return bool(placement_of(x).explicit(spec.axes)) and not inside


def on_split_features(
    norm: Callable[..., Normalized],
    spec: NormSpec,
    x: Array,
    *others: Array | None,
) -> Normalized:
    """`norm(spec, x, *others)` on each device of the explicit axes that split `x`.

    The operands must come from `placed_alike`.

    On each device, `norm` gets the axes that split the features as `axis_names`, and
    merges the shards' statistics in one collective. The partitioner would need a
    collective for each of three sums.
    """
    placement = placement_of(x)
    names = placement.explicit(sorted(spec.axes))
    operands = (x, *others)
    in_specs = jax.tree.map(lambda a: placement.along(a.shape), operands)
    whole: Any = P(*placement.axes)  # specs, in place of their arrays
    row: Any = P(
        *(
            None if i - x.ndim in spec.axes else names
            for i, names in enumerate(placement.axes)
        )
    )
    out_specs = Normalized(
        y=whole,
        residual_out=None if others[0] is None else whole,
        statistics=Statistics(row, row) if spec.return_statistics else None,
    )
    # All devices of a row have the same statistics, but check_vma cannot see that.
    return jax.shard_map(
        functools.partial(
            norm, dataclasses.replace(spec, axis_names=(*spec.axis_names, *names))
        ),
        mesh=placement.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(placement.explicit(range(x.ndim))),
        check_vma=False,
    )(*operands)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's part of an op whose rows are sharded over explicit mesh axes.

    Attributes:
      problem: the part, with the shapes that one device sees.
      in_specs, out_specs: the specs of the op's flat operands and results.
      sums: for each result, the mesh axes over which its shards are summed.
    """

    problem: Problem
    mesh: Any
    in_specs: tuple[P, ...]
    out_specs: list[P]
    sums: list[tuple[str, ...]]

    def on_every_device(self, function: Callable[..., list[Any]]) -> Callable[..., Any]:
        """Turns a function of one device's flat operands into one of whole arrays."""
        return jax.shard_map(
            lambda *leaves: self._summed(function(*leaves)),
            mesh=self.mesh,
            in_specs=self.in_specs,
            out_specs=self.out_specs,
            check_vma=False,
        )

    def _summed(self, results: list[Any]) -> list[Any]:
        """Sums each result over its axes, with all results of the same axes at once."""
        together: dict[tuple[str, ...], list[int]] = {}
        for i, axes in enumerate(self.sums):
            if axes:
                together.setdefault(axes, []).append(i)
        for axes, places in together.items():
            whole = lax.psum([results[i] for i in places], axes)
            for i, result in zip(places, whole, strict=True):
                results[i] = result
        return results


def shard_of(problem: Problem, results: Sequence[Any]) -> Shard | None:
    """One device's shard of an op under explicit mesh axes that split only the rows.

    If `x` is sharded over a mesh axis and a result is not, the result is a sum over
    that axis. The parameters' gradients are such results.
    """
    placement = placement_of(problem.operands[0])
    mesh, static = placement.mesh, problem.static
    leaves = jax.tree.leaves(problem.operands)
    if (
        not mesh.explicit_axes
        or set(mesh.explicit_axes) != set(mesh.axis_names)
        or any(placement.axes[axis] is not None for axis in static["spec"].axes)
        or any(a.sharding.spec != placement.along(a.shape) for a in (*leaves, *results))
    ):
        return None

    def local_shape(shape: Sequence[int]) -> tuple[int, ...]:
        return NamedSharding(mesh, placement.along(shape)).shard_shape(tuple(shape))

    shapes = {
        key: local_shape(static[key])
        for key in ("scale_shape", "bias_shape")
        if static.get(key) is not None
    }
    out_specs = [placement.along(a.shape) for a in results]
    split = _names(placement.axes)
    return Shard(
        problem=problem._replace(
            operands=jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(local_shape(a.shape), a.dtype),
                problem.operands,
            ),
            static=static | shapes,
            partitioned=False,
        ),
        mesh=mesh,
        in_specs=tuple(placement.along(a.shape) for a in leaves),
        out_specs=out_specs,
        sums=[
            tuple(name for name in split if name not in _names(spec))
            for spec in out_specs
        ],
    )


def _names(axes: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes that a spec, or a part of one, names."""
    several = (names if isinstance(names, tuple) else (names,) for names in axes)
    return tuple(name for names in several for name in names if name is not None)
