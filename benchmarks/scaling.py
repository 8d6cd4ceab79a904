"""What a norm communicates: collectives of programs compiled for many devices.

"placements": a norm and its gradients, with x split along the batch, along the sequence
or along the features (then the parameters are split too), over mesh axes that are
automatic or explicit. "decoder": a training step of `examples/decoder` over meshes of 4
to 256 devices, with our norm, with Flax's and without a norm; the difference is what a
norm adds. Collectives are counted in the compiled program. The bytes of a collective are
those of its result on one device.

Without `--tpu` the programs are compiled for CPU devices, and the CPU of this machine acts
as all of them. With `--tpu` they are compiled for a TPU v5e, which needs libtpu but no TPU.

    python -m benchmarks.scaling placements
    python -m benchmarks.scaling decoder --devices 4 8 64 256 --tpu
"""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any

from benchmarks.support import compilers

compilers.keep_to_the_host()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "decoder"))

import mesh as decoder_mesh  # noqa: E402
import model as decoder  # noqa: E402
import training  # noqa: E402

from benchmarks.decoder_step import NoNorm  # noqa: E402
from benchmarks.support import collectives, peers, report  # noqa: E402

TPU_TOPOLOGY = {4: "v5e:2x2", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}
BATCH, LENGTH, FEATURES = 16, 512, 1024
PLACEMENTS = {
    "batch": P("data", None, None),
    "batch and sequence": P("data", "model", None),
    "features": P("data", None, "model"),
}
NORMS = {"ours": "layernorm", "flax": "flax", "none": "none"}


def devices_of(count: int, tpu: bool) -> list[Any]:
    if not tpu:
        return jax.devices("cpu")[:count]
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TPU_TOPOLOGY[count]
    )
    return list(topology.devices)


def mesh_of(devices: list[Any], model: int, kind: AxisType) -> jax.sharding.Mesh:
    grid = np.array(devices).reshape(-1, model)
    return jax.sharding.Mesh(grid, ("data", "model"), axis_types=(kind,) * 2)


def compiled(function: Any, arguments: Any, tpu: bool) -> str:
    traced = jax.jit(function).trace(*arguments)
    platforms = ("tpu",) if tpu else ("cpu",)
    return traced.lower(lowering_platforms=platforms).compile().as_text()


def placements(counts: list[int], tpu: bool) -> list[dict[str, Any]]:
    """With 2 devices along `model`; "bytes of x on a device" is x's part, to compare."""
    results = []
    for count in counts[:1]:
        devices = devices_of(count, tpu)
        for name, spec in PLACEMENTS.items():
            for norm in ("ours", "flax"):
                for kind in (AxisType.Auto, AxisType.Explicit):
                    mesh = mesh_of(devices, 2, kind)
                    if norm == "flax" and kind == AxisType.Explicit:
                        continue  # it is written for automatic axes
                    found = of_norm(peers.NORMS[norm].norm, mesh, spec, tpu)
                    shard = np.prod((BATCH, LENGTH, FEATURES)) * 2 // count
                    results.append(
                        {"x split along": name, "axes": kind.name.lower(), "norm": norm}
                        | {"devices": count, "collectives": collectives.text(found)}
                        | {"bytes": sum(c.bytes for c in found)}
                        | {"bytes of x on a device": int(shard)}
                    )
    return results


def of_norm(norm: Any, mesh: Any, spec: P, tpu: bool) -> list[collectives.Collective]:
    along_features = NamedSharding(mesh, P(spec[-1]))
    x = jax.ShapeDtypeStruct(
        (BATCH, LENGTH, FEATURES), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    params = {
        name: jax.ShapeDtypeStruct((FEATURES,), jnp.float32, sharding=along_features)
        for name in ("scale", "bias")
    }

    def run(params: Any, x: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(norm, params, x)
        dparams, dx = pullback(dy)
        place = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec)
        )
        if is_automatic(mesh):
            y, dx = place(y), place(dx)
        return y, dparams, dx

    with jax.set_mesh(mesh):
        return collectives.of_program(compiled(run, (params, x, x), tpu))


def is_automatic(mesh: jax.sharding.Mesh) -> bool:
    return set(mesh.axis_types) == {AxisType.Auto}


def decoder_steps(counts: list[int], tpu: bool) -> list[dict[str, Any]]:
    results = []
    for count in counts:
        for norm in NORMS:
            config = decoder.DecoderConfig(
                layers=2, width=1024, heads=8, context=512, norm=NORMS[norm],
                dtype="bfloat16",
            )  # fmt: skip
            settings = training.TrainingConfig(batch=2 * count)
            found = of_step(config, settings, devices_of(count, tpu), tpu)
            results.append(
                {"devices": count, "mesh": f"data={count // 4},model=4", "norm": norm}
                | {"collectives": collectives.text(found), "count": len(found)}
                | {"bytes": sum(c.bytes for c in found)}
            )
    return results


def of_step(
    config: Any, settings: Any, devices: list[Any], tpu: bool
) -> list[collectives.Collective]:
    place = decoder_mesh.Mesh(mesh_of(devices, 4, AxisType.Auto))
    shapes = jax.eval_shape(functools.partial(training.init_state, config, settings))
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        place.shardings(training.state_axes(config, settings)),
    )
    windows = jax.ShapeDtypeStruct(
        (settings.batch, config.context + 1), jnp.uint8,
        sharding=NamedSharding(place.mesh, P("data")),
    )  # fmt: skip
    step = training.make_train_step(config, settings, place)
    with place.entered():
        return collectives.of_program(compiled(step, (state, windows), tpu))


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("table", choices=("placements", "decoder"))
    parser.add_argument("--devices", nargs="+", type=report.positive, default=[8])
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e")
    options = parser.parse_args(arguments)
    model = {"placements": 2, "decoder": 4}[options.table]
    if any(count % model for count in options.devices):
        parser.error(f"--devices must be multiples of {model}; got {options.devices}")
    if options.tpu:
        reason = compilers.unavailable("tpu")
        if reason is not None:
            parser.exit(1, f"{reason}\n")
    elif jax.config.jax_num_cpu_devices < max(options.devices):
        jax.config.update("jax_num_cpu_devices", max(options.devices))
    decoder.NORMS["none"] = NoNorm
    where = report.environment()
    report.print_environment(where)
    tables = {"placements": placements, "decoder": decoder_steps}
    results = tables[options.table](options.devices, options.tpu)
    report.print_table(list(results[0]), [list(r.values()) for r in results])
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
