"""`jax_layernorm.linen` has Flax's linen norms; `test_modules` tests what NNX shares."""

import dataclasses
import inspect
import typing
from typing import Any

import flax
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax_cases import (
    EXTRA,
    FEATURES,
    ROWS,
    SHAPE,
    as_function,
    assert_agree,
    assert_equal,
    draw,
    draw_params,
    for_both,
    forward_and_gradients,
)

import jax_layernorm as jln


class Block(nn.Module):
    """Two norms that Flax names and one named by hand, inside a parent."""

    norms: Any

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(FEATURES)(self.norms.LayerNorm()(x))
        h = self.norms.LayerNorm(epsilon=1e-5)(h)
        return self.norms.RMSNorm(name="last")(x + nn.gelu(h))


class Repeated(nn.Module):
    """`Block` under one of linen's transformations."""

    norms: Any
    how: str

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.how == "vmap":
            return nn.vmap(Block, **axes)(self.norms)(x)
        if self.how == "remat":
            return nn.remat(Block)(self.norms)(x)
        if self.how == "remat_scan":
            return nn.remat_scan(Block, lengths=(2, 1))(self.norms)(x)
        scan = nn.scan(lambda block, x, _: (block(x), None), **axes, length=3)
        return scan(Block(self.norms), x, None)[0]


@for_both
def test_constructor_is_flaxs_and_four_fields(name):
    ours, flaxs = getattr(jln.linen, name), getattr(nn, name)
    got = dict(inspect.signature(ours).parameters)
    extra = {key: got.pop(key).default for key in EXTRA}
    assert list(got.values()) == list(inspect.signature(flaxs).parameters.values())
    assert extra == EXTRA
    order = [field.name for field in dataclasses.fields(ours)]
    assert order[-6:] == [*EXTRA, "parent", "name"]
    assert type(None) in typing.get_args(typing.get_type_hints(ours)["implementation"])


@for_both
def test_module_is_a_flax_module_with_the_same_attributes(name):
    given = {"epsilon": 1e-3, "dtype": jnp.bfloat16, "use_scale": False, "name": "n"}
    ours, flaxs = getattr(jln.linen, name)(**given), getattr(nn, name)(**given)
    assert isinstance(ours, getattr(nn, name))
    for field in dataclasses.fields(flaxs):
        assert getattr(ours, field.name) == getattr(flaxs, field.name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"param_dtype": jnp.bfloat16},
        {"scale_init": nn.initializers.normal(0.1), "param_dtype": jnp.float16},
        {"scale_init": nn.with_partitioning(nn.initializers.ones, ("embed",))},
    ],
    ids=("default", "no scale", "bfloat16", "random", "partitioned"),
)
@for_both
def test_init_gives_the_tree_of_flax(name, options):
    norms = [getattr(module, name)(**options) for module in (jln.linen, nn)]
    if name == "LayerNorm":
        norms += [norm.clone(use_bias=False) for norm in norms]
        norms += [norm.clone(bias_init=nn.initializers.uniform()) for norm in norms[:2]]
    for ours, flaxs in zip(norms[::2], norms[1::2], strict=True):
        got, want = (n.init(jax.random.key(7), draw(0, *SHAPE)) for n in (ours, flaxs))
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert nn.get_partition_spec(got) == nn.get_partition_spec(want)
        assert_equal(got, want)
        y, y_flax = ours.apply(got, draw(0, *SHAPE)), flaxs.apply(want, draw(0, *SHAPE))
        assert_agree(y, y_flax)


def test_automatic_names_are_flaxs_inside_a_parent():
    ours, flaxs = (
        Block(norms).init(jax.random.key(0), draw(0, *SHAPE))
        for norms in (jln.linen, nn)
    )
    assert set(ours["params"]) == {"LayerNorm_0", "Dense_0", "LayerNorm_1", "last"}
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    assert_equal(ours, flaxs)


@pytest.mark.parametrize(("saver", "loader"), [(nn, jln.linen), (jln.linen, nn)])
def test_orbax_checkpoint_of_one_loads_in_the_other(saver, loader, tmp_path):
    x = draw(0, *SHAPE)
    saved = Block(saver).init(jax.random.key(0), x)
    saved = jax.tree.map(lambda a: a + draw(4, a.size).reshape(a.shape), saved)
    like = jax.eval_shape(Block(loader).init, jax.random.key(1), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "checkpoint", like)
    assert_equal(loaded, saved)
    assert_agree(Block(loader).apply(loaded, x), Block(saver).apply(saved, x))


@pytest.mark.parametrize("how", ["scan", "remat", "remat_scan", "vmap"])
def test_lifted_transformations_agree_with_flax(how):
    x = draw(0, 3, *SHAPE) if how == "vmap" else draw(0, *SHAPE)
    ours, flaxs = (Repeated(norms, how) for norms in (jln.linen, nn))
    params, want = (m.init(jax.random.key(0), x)["params"] for m in (ours, flaxs))
    assert_equal(params, want)
    got, want = (
        jax.jit(
            lambda p, x, m=m: forward_and_gradients(
                lambda p, x: m.apply({"params": p}, x), p, x
            )[0]
        )(params, x)
        for m in (ours, flaxs)
    )
    assert_agree(got, want)


@for_both
def test_wrong_parameter_shape_is_an_error_with_both_shapes(name):
    norm = as_function(jln.linen, name)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"\(5,\).*\(48,\)"):
        norm(draw_params(name), draw(0, ROWS, 5))


@for_both
def test_result_dtype_is_flaxs_where_param_dtype_is_not_that_of_the_parameters(name):
    x, params = draw(0, *SHAPE, dtype=jnp.bfloat16), draw_params(name)
    options = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    ours, flaxs = (
        as_function(norms, name, **options)(params, x) for norms in (jln.linen, nn)
    )
    assert ours.dtype == flaxs.dtype == jnp.bfloat16


@for_both
def test_dtype_may_be_a_name(name, x64):
    x, params = draw(0, *SHAPE), draw_params(name)
    for dtype in ("float64", "bfloat16"):
        y = as_function(jln.linen, name, dtype=dtype)(params, x)
        assert_equal(y, as_function(jln.linen, name, dtype=jnp.dtype(dtype))(params, x))
