"""`jax_layernorm.nnx` has Flax's NNX norms; `test_modules` tests what linen shares."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax_cases import (
    APIS,
    EXTRA,
    FEATURES,
    ROWS,
    SHAPE,
    as_functions,
    assert_agree,
    assert_equal,
    draw,
    draw_params,
    for_both,
)

import jax_layernorm as jln


class Block(nnx.Module):
    def __init__(self, norms, rngs):
        self.first = norms.LayerNorm(FEATURES, rngs=rngs)
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.last = norms.RMSNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return self.last(x + nnx.gelu(self.dense(self.first(x))))


def blocks():
    return (Block(norms, nnx.Rngs(0)) for norms in APIS["nnx"])


@for_both
def test_constructor_is_flaxs_and_four_arguments(name):
    ours, flaxs = (
        {
            parameter.name: (parameter.kind, parameter.default)
            for parameter in inspect.signature(
                getattr(norms, name).__init__
            ).parameters.values()
        }
        for norms in APIS["nnx"]
    )
    extra = {key: ours.pop(key)[1] for key in EXTRA}
    assert list(ours.items()) == list(flaxs.items())
    assert extra == EXTRA


@for_both
def test_module_is_a_flax_module_with_the_same_attributes(name):
    given = {"epsilon": 1e-3, "dtype": jnp.bfloat16, "use_scale": False}
    ours, flaxs = (
        vars(getattr(norms, name)(FEATURES, **given, rngs=nnx.Rngs(0)))
        for norms in APIS["nnx"]
    )
    assert issubclass(getattr(jln.nnx, name), getattr(nnx, name))
    assert set(ours) - set(flaxs) == set(EXTRA)
    for key in set(flaxs) - {"scale", "bias"}:
        if not key.startswith("_"):
            assert ours[key] == flaxs[key]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"param_dtype": jnp.bfloat16},
        {"scale_init": nnx.initializers.normal(0.1), "param_dtype": jnp.float16},
        {"scale_metadata": {"note": "kept"}},
        {"scale_init": nnx.with_partitioning(nnx.initializers.ones, ("embed",))},
    ],
    ids=("default", "no scale", "bfloat16", "random", "metadata", "partitioned"),
)
@for_both
def test_construction_gives_the_state_of_flax(name, options):
    variants = [options]
    if name == "LayerNorm":
        bias = {"bias_init": nnx.initializers.uniform(), "bias_metadata": {"note": 1}}
        variants += [options | {"use_bias": False}, options | bias]
    with nnx.use_eager_sharding(False):
        for variant in variants:
            ours, flaxs = (
                nnx.state(getattr(norms, name)(FEATURES, **variant, rngs=nnx.Rngs(7)))
                for norms in APIS["nnx"]
            )
            assert_equal(nnx.to_pure_dict(ours), nnx.to_pure_dict(flaxs))
            for key in flaxs:
                assert type(ours[key]) is type(flaxs[key])
                assert ours[key].get_metadata() == flaxs[key].get_metadata()


@pytest.mark.parametrize("ours_saves", [True, False])
def test_orbax_checkpoint_of_one_loads_in_the_other(ours_saves, tmp_path):
    x = draw(0, *SHAPE)
    saver, loader = blocks() if ours_saves else reversed([*blocks()])
    state = jax.tree.map(
        lambda a: a + draw(4, a.size).reshape(a.shape), nnx.state(saver)
    )
    nnx.update(saver, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(loader)))
        loaded = checkpointer.restore(tmp_path / "checkpoint", like)
    target = nnx.state(loader)
    nnx.replace_by_pure_dict(target, loaded)
    nnx.update(loader, target)
    assert_equal(nnx.to_pure_dict(nnx.state(loader)), nnx.to_pure_dict(state))
    assert_agree(loader(x), saver(x))


@for_both
def test_statistics_are_of_x_as_given_where_flax_rounds_it(name):
    x, params = draw(0, *SHAPE) + 300 * (name == "LayerNorm"), draw_params(name)
    ours, flaxs = (
        norm(params, x) for norm in as_functions("nnx", name, dtype=jnp.bfloat16)
    )
    want = oracle.norm(x, **params, center=name == "LayerNorm").y
    oracle.assert_close(ours, want)
    errors = [np.abs(np.asarray(y, np.float64) - want).mean() for y in (ours, flaxs)]
    assert errors[1] > 1.2 * errors[0]


@for_both
def test_promote_dtype_is_called_as_flax_calls_it(name):
    received = []

    def promote(arrays, *, dtype):
        received.append(([a.dtype for a in arrays], dtype))
        return tuple(a.astype(jnp.float16) for a in arrays)

    x, params = draw(0, *SHAPE), draw_params(name)
    ours, flaxs = as_functions("nnx", name, promote_dtype=promote)
    y, want = ours(params, x), flaxs(params, x)
    assert received[0] == received[1]
    assert y.dtype == jnp.float16
    assert_agree(y, want, jnp.float16)


@for_both
def test_wrong_number_of_features_is_an_error_with_both_shapes(name):
    norm = getattr(jln.nnx, name)(FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(5,\).*got \(48,\)"):
        norm(draw(0, ROWS, 5))


@for_both
def test_several_feature_axes_are_read_in_the_order_of_x_as_flax_does(name):
    params = {key: draw(i, 24) for i, key in enumerate(draw_params(name))}
    for features in ((2, 1), (-1, 1), (1, 2), (3, 1, 2), (2, 3, 1)):
        shape = (4, 6) if len(features) == 2 else (2, 4, 3)
        x = draw(0, 3, *shape)
        results = []
        for norms in APIS["nnx"]:
            axes = {
                "reduction_axes": tuple(range(1, x.ndim)),
                "feature_axes": features,
            }
            norm = getattr(norms, name)(24, **axes, rngs=nnx.Rngs(0))
            nnx.update(norm, nnx.State({k: nnx.Param(p) for k, p in params.items()}))
            results.append(norm(x))
        assert_agree(*results)


TRANSFORMED = {
    "jit": lambda block, x: nnx.jit(lambda block, x: block(x))(block, x),
    "remat": lambda block, x: nnx.remat(lambda block, x: block(x))(block, x),
    "grad": lambda block, x: nnx.to_pure_dict(
        nnx.grad(lambda block, x: jnp.vdot(block(x), draw(3, *SHAPE)))(block, x)
    ),
    "split and merge": lambda block, x: jax.jit(
        lambda state, x: nnx.merge(nnx.graphdef(block), state)(x)
    )(nnx.state(block), x),
    "clone": lambda block, x: nnx.clone(block)(x),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformations_agree_with_flax(transformed):
    ours, flaxs = (transformed(block, draw(0, *SHAPE)) for block in blocks())
    assert_agree(ours, flaxs)


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_stacked_blocks_agree_with_flax(how):
    def run(norms):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(norms, rngs)

        def body(x, block):
            return block(x)

        x, block = draw(0, *SHAPE), stack(nnx.Rngs(0))
        if how == "vmap":
            return nnx.vmap(body, in_axes=(None, 0))(x, block)
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, block)

    assert_agree(*map(run, APIS["nnx"]))
