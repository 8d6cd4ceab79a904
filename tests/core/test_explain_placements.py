"""`explain` agrees with what the call runs, wherever the arrays are placed."""

import contextlib
import functools
import re

import implementations
import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_layernorm as jln

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS, FEATURES = 16, 256
LAYOUTS = {  # of x and of the parameters
    "batch": (P("data", None), P(None)),
    "features": (P(None, "model"), P("model")),
    "both": (P("data", "model"), P("model")),
}
KINDS = {  # of the axes "data" and "model"
    "automatic": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "explicit rows": (EXPLICIT, AUTO),
    "explicit features": (AUTO, EXPLICIT),
}
PLACEMENTS = [
    *((kind, layout) for kind in (*KINDS, "shard_map") for layout in LAYOUTS),
    ("one device", None),
    ("custom_vjp=False", None),
    ("vmap", None),
    ("vmap over parameters", None),
    ("vmap with axis_name", None),
]
NAMES = (None, *implementations.NAMES[:1], "pallas_tpu")


def struct(shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)


def placed(kind, layout, name):
    """The mesh, the norm with the transformation around it, and its arguments."""
    norm = functools.partial(jln.layer_norm, implementation=name)
    params, x = {"scale": struct((FEATURES,))}, struct((ROWS, FEATURES))
    mesh = jax.make_mesh((2, 2), ("data", "model"), KINDS.get(kind, (AUTO, AUTO)))
    if kind == "custom_vjp=False":
        return mesh, functools.partial(norm, custom_vjp=False), params, x
    if kind == "vmap":
        return mesh, jax.vmap(norm, (None, 0)), params, struct((3, ROWS, FEATURES))
    if kind == "vmap over parameters":
        return mesh, jax.vmap(norm, (0, None)), {"scale": struct((3, FEATURES))}, x
    if kind == "vmap with axis_name":
        norm = functools.partial(norm, axis_name="i")
        mapped = jax.vmap(norm, (None, 1), 1, axis_name="i")
        return mesh, mapped, {}, struct((ROWS, 2, FEATURES // 2))
    if kind == "one device":
        return mesh, norm, params, x
    of_x, of_params = LAYOUTS[layout]
    if kind == "shard_map":
        if layout != "batch":
            norm = functools.partial(norm, axis_name="model")
        specs = {"in_specs": (of_params, of_x), "out_specs": of_x}
        return mesh, jax.shard_map(norm, mesh=mesh, **specs), params, x
    params = {"scale": struct((FEATURES,), NamedSharding(mesh, of_params))}
    return mesh, norm, params, struct(x.shape, NamedSharding(mesh, of_x))


def what_runs(traced, platform):
    """The implementations in the lowered program; None if the call is refused."""
    try:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    except NotImplementedError:
        return None
    found = {
        "native_cpu": re.findall(r"@jax_layernorm_(\w+ward)\b", text),
        "pallas_tpu": re.findall(r'kernel_name = "layer_norm_(\w+)"', text),
    }
    ran = {name for name, passes in found.items() if passes}
    by_kernels = {each for passes in found.values() for each in passes}
    return ran | ({"xla"} if by_kernels != {"forward", "backward"} else set())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "layout"), PLACEMENTS)
def test_explain_and_the_call_agree(kind, layout, name):
    mesh, norm, params, x = placed(kind, layout, name)

    def both_passes(params, x):
        y, pullback = jax.vjp(norm, params, x)
        return y, pullback(y)

    with contextlib.nullcontext() if layout is None else jax.set_mesh(mesh):
        try:
            traced = jax.jit(both_passes).trace(params, x)
        except (NotImplementedError, ValueError) as refusal:
            with pytest.raises(type(refusal), match=re.escape(str(refusal))):
                jln.explain(params, x, function=norm)
            return
        for platform, choice in jln.explain(params, x, function=norm).items():
            named = choice.implementation
            explained = None if named is None else {*named.split(" and ")}
            assert explained == what_runs(traced, platform), platform
            others = {"native_cpu", "pallas_tpu", "xla"} - (explained or set())
            assert choice.reasons.keys() >= others


def test_there_are_at_least_40_placements():
    assert len(PLACEMENTS) * len(NAMES) >= 40
