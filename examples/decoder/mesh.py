"""More than one device, and more than one process: where every array lives.

A mesh has two axes. Along `data`, the windows of a batch are split, and each parameter
is split by its width ("fully sharded data parallel", FSDP). A device gathers a layer's
parameters when it comes to that layer. Along `model`, the heads, the MLP and the
vocabulary are split (tensor parallelism). The residual stream is split only along
`data`, so a norm finds whole rows and communicates nothing. Its scale and bias, a few
thousand numbers, are on every device.

model.py names the axes of its arrays; `RULES` says where each name goes.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Result = TypeVar("Result")

RULES = (
    ("batch", "data"),
    ("width", "data"),
    ("heads", "model"),
    ("mlp", "model"),
    ("vocabulary", "model"),
)
HEARTBEAT_SECONDS = 20
"""A process that is silent for this long counts as dead, and the others end."""


class MeshShape(NamedTuple):
    """Devices along each axis."""

    data: int
    model: int

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """From text such as `data=4,model=2`; an axis that is left out is 1."""
        parts = text.split(",")
        sizes = dict(part.partition("=")[::2] for part in parts)
        try:
            shape = cls(
                **{"data": 1, "model": 1} | {k: int(v) for k, v in sizes.items()}
            )
        except (TypeError, ValueError):
            shape = cls(0, 0)
        if min(shape) < 1 or len(sizes) < len(parts):
            raise ValueError(
                "mesh must give the devices along data and model, each once; "
                f"got {text!r}. Try data=4,model=2."
            )
        return shape


@dataclass(frozen=True)
class Devices:
    """One device: arrays are where JAX puts them. `Mesh` has the same members."""

    @property
    def shape(self) -> MeshShape:
        return MeshShape(1, 1)

    def entered(self) -> AbstractContextManager[Any]:
        """The context in which everything is traced and run."""
        return ExitStack()

    def make_state(self, init: Callable[[], Any], axes: Any) -> Any:
        """What `init()` returns; `axes` are the names of its arrays' axes, as specs."""
        del axes
        return init()

    def keep(self, state: Any, axes: Any) -> Any:
        """`state`, where `make_state` puts it; called inside `jit`."""
        del axes
        return state

    def rows(self, count: int, read: Callable[[slice], np.ndarray]) -> Any:
        """An array of `count` rows; `read(rows)` returns some of them."""
        del count
        return read(slice(None))

    def gathered(self, tree: Any) -> Any:
        """The whole of each array, on one device."""
        return tree


@dataclass(frozen=True)
class Mesh(Devices):
    """Devices in a mesh, those of other processes included."""

    mesh: jax.sharding.Mesh

    @classmethod
    def of(cls, shape: MeshShape) -> "Mesh":
        devices = jax.devices()[: shape.data * shape.model]
        axis_types = (AxisType.Auto,) * 2
        return cls(
            jax.make_mesh(shape, shape._fields, axis_types=axis_types, devices=devices)
        )

    @property
    def shape(self) -> MeshShape:
        return MeshShape(**self.mesh.shape)

    def entered(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(nn.logical_axis_rules(RULES))
        return stack

    def make_state(self, init: Callable[[], Any], axes: Any) -> Any:
        return jax.jit(init, out_shardings=self.shardings(axes))()

    def keep(self, state: Any, axes: Any) -> Any:
        return jax.lax.with_sharding_constraint(state, self.shardings(axes))

    def rows(self, count: int, read: Callable[[slice], np.ndarray]) -> jax.Array:
        shape = (count, *read(slice(0, 1)).shape[1:])
        sharding = NamedSharding(self.mesh, P("data"))
        return jax.make_array_from_callback(
            shape, sharding, lambda index: read(index[0])
        )

    def gathered(self, tree: Any) -> Any:
        everywhere = NamedSharding(self.mesh, P())
        whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        return jax.tree.map(lambda array: array.addressable_data(0), whole)

    def shardings(self, axes: Any) -> Any:
        """The shardings of arrays whose axes have these names."""
        return nn.logical_to_mesh_sharding(axes, self.mesh, RULES)


# ---- processes


def start_processes(
    coordinator: str | None, processes: int, process_id: int, *, cluster: bool
) -> None:
    """Joins the other processes. Call it before any other use of JAX.

    Args:
      cluster: take the rest from the cluster, if JAX knows its kind: Slurm, Kubernetes,
        Open MPI, GKE and Cloud TPU (`jax.distributed.initialize`).
    """
    if cluster:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif processes > 1:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def is_first() -> bool:
    """Whether this is the process that prints, and writes the files of the run."""
    return jax.process_index() == 0


def in_first(
    function: Callable[[], Result], raised: type[Exception], default: Result
) -> Result:
    """Runs `function` in the first process; the others wait, and return `default`.

    If `function` raises an exception of the kind `raised`, all processes raise it.
    """
    message, result = "", default
    if is_first():
        try:
            result = function()
        except raised as error:
            if jax.process_count() == 1:
                raise
            message = str(error)
    if jax.process_count() > 1:
        encoded = np.zeros(4096, np.uint8)
        text = message.encode()[: len(encoded)]
        encoded[: len(text)] = np.frombuffer(text, np.uint8)
        told = multihost_utils.broadcast_one_to_all(encoded)
        message = bytes(told).rstrip(b"\0").decode(errors="replace")
        if message:
            raise raised(message)
    return result


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all processes have to call this."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def end_without_the_others() -> NoReturn:
    """Ends this process at once; the usual end waits for processes that are gone."""
    os._exit(1)
