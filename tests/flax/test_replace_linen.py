"""`jax_layernorm.linen.replace`: our norms compute those of an unchanged linen model."""

import contextlib
import threading
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import quick
from flax import nnx
from flax_cases import SHAPE, assert_equal, draw
from flax_models import (
    GPT,
    LAYERS,
    TOKENS,
    Twice,
    X,
    assert_close,
    count_ops,
    loss_and_logits_of_gpt,
    perturbed,
)

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMS = 2 * LAYERS + 1  # of a GPT


@pytest.mark.parametrize("scanned", [False, True])
def test_gpt_agrees_in_logits_loss_and_gradients_and_every_norm_is_ours(scanned):
    params = perturbed(jax.jit(GPT(scanned).init)(jax.random.key(0), TOKENS)["params"])
    step = jax.value_and_grad(
        partial(loss_and_logits_of_gpt, scanned=scanned), has_aux=True
    )
    want = quick.jit(step)(params)
    assert count_ops(step, params) == (0, 0)
    with jln.linen.replace() as report:
        got = quick.jit(step)(params)
        counted = count_ops(step, params)
    assert_close(got, want)
    recomputed = 2 * LAYERS if scanned else 0  # under nn.remat
    assert counted == (NORMS + recomputed, NORMS)
    assert len(report.replaced) == (3 if scanned else NORMS)
    assert not report.left


def test_init_gives_flaxs_parameters_bit_for_bit():
    jax.clear_caches()  # initializers that `quick_compilation` compiled have other bits

    def init(norm):
        return Twice(norm).init(jax.random.key(3), X)

    for norm in (
        nn.LayerNorm(scale_init=nn.initializers.normal(), param_dtype=jnp.bfloat16),
        nn.LayerNorm(bias_init=nn.initializers.uniform(), use_scale=False),
        nn.RMSNorm(scale_init=nn.with_partitioning(nn.initializers.normal(), ("x",))),
        nn.LayerNorm(feature_axes=(1, 0), reduction_axes=(-1, 0)),  # Flax sorts them
    ):
        want = init(norm)
        with jln.linen.replace() as report:
            got = init(norm)
            counted = count_ops(partial(init, norm))
        assert_equal(got, want)
        assert nn.get_partition_spec(got) == nn.get_partition_spec(want)
        assert counted == (2, 0) and list(report.replaced) == ["norm"]


def test_orbax_checkpoint_from_before_loads_inside_and_back(tmp_path):
    saved = perturbed(jax.jit(GPT().init)(jax.random.key(0), TOKENS))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "before", saved)
        checkpointer.wait_until_finished()
        with jln.linen.replace():
            like = jax.eval_shape(GPT().init, jax.random.key(1), TOKENS)
            loaded = checkpointer.restore(tmp_path / "before", like)
            inside = quick.jit(GPT().apply)(loaded, TOKENS)
            checkpointer.save(tmp_path / "inside", loaded)
            checkpointer.wait_until_finished()
        like = jax.eval_shape(GPT().init, jax.random.key(1), TOKENS)
        back = checkpointer.restore(tmp_path / "inside", like)
    assert_equal(back, saved)
    assert_close(inside, quick.jit(GPT().apply)(back, TOKENS))


@pytest.mark.parametrize(
    "boxed",
    [nn.with_partitioning, nn.with_logical_partitioning],
    ids=("Partitioned", "LogicallyPartitioned"),
)
def test_boxed_parameters_are_unboxed(boxed):
    norm = nn.LayerNorm(scale_init=boxed(nn.initializers.normal(), ("features",)))
    variables = norm.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["scale"], nn.meta.AxisMetadata)
    want = norm.apply(variables, X)
    with jln.linen.replace():
        got = norm.apply(variables, X)
        counted = count_ops(norm.apply, variables, X)
    assert_close(got, want)
    assert counted == (1, 0)


def counted_by_trace(model):
    """`jax.jit` of a model, and how often it was traced."""
    traced = []

    @jax.jit
    def apply(variables, x):
        traced.append(None)
        return model.apply(variables, x)

    return apply, traced


def test_jitted_outside_is_traced_again_inside_and_the_other_way_round():
    model = nn.LayerNorm()
    x = 1e4 + X  # where Flax's norm is off by more than 1
    variables = model.init(jax.random.key(0), X)
    apply, traced = counted_by_trace(model)
    flaxs = apply(variables, x)
    with jln.linen.replace() as first:
        ours = apply(variables, x)
    assert jnp.abs(ours - flaxs).max() > 0.1
    assert_equal(apply(variables, x), flaxs)
    with jln.linen.replace() as second:
        assert_equal(apply(variables, x), ours)
    assert len(traced) == 2  # each is compiled once
    assert first.replaced and not second.replaced

    apply, traced = counted_by_trace(model)
    with jln.linen.replace():
        assert_equal(apply(variables, x), ours)
    assert_equal(apply(variables, x), flaxs)
    assert len(traced) == 2


def test_only_the_calling_thread_is_affected():
    norm = nn.LayerNorm()
    variables = norm.init(jax.random.key(0), X)
    apply, traced = counted_by_trace(norm)
    x, results = 1e4 + X, {}

    def in_thread():
        results["thread"] = apply(variables, x)

    results["before"] = apply(variables, x)
    with jln.linen.replace() as report:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert not report.replaced
        results["inside"] = apply(variables, x)
    assert_equal(results["thread"], results["before"])
    assert jnp.abs(results["inside"] - results["before"]).max() > 0.1
    assert len(traced) == 2


def test_nested_and_repeated_blocks_are_harmless():
    model = Twice(nn.RMSNorm())
    variables = model.init(jax.random.key(0), X)

    def count(x):
        return count_ops(model.apply, variables, x)[0]

    with jln.linen.replace() as outer:
        with jln.linen.replace(custom_vjp=False) as inner:
            assert count(X) == 0  # JAX differentiates the equations
            jax.jvp(partial(model.apply, variables), (X,), (X,))
        assert count(X) == 2
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(partial(model.apply, variables), (X,), (X,))
    assert count(X) == 0
    with jln.linen.replace() as again:
        assert count(X) == 2
    assert outer.replaced == inner.replaced == again.replaced == {"norm": "RMSNorm"}
    assert str(again) == "replaced  norm: RMSNorm"


def test_an_error_inside_ends_the_block():
    with pytest.raises(ZeroDivisionError), jln.linen.replace():
        raise ZeroDivisionError
    assert count_ops(nn.LayerNorm(use_bias=False, use_scale=False).apply, {}, X)[0] == 0


def test_works_as_a_decorator():
    norm = nn.LayerNorm()
    variables = norm.init(jax.random.key(0), X)
    assert count_ops(jln.linen.replace()(norm.apply), variables, X) == (1, 0)


def test_the_implementation_may_be_named():
    norm = nn.LayerNorm()
    variables = norm.init(jax.random.key(0), X)
    want = norm.apply(variables, X)
    with jln.linen.replace(implementation="xla"):
        assert_close(norm.apply(variables, X), want)
    with jln.linen.replace(implementation="pallas_tpu"):
        with pytest.raises(NotImplementedError, match="it supports TPUs only"):
            norm.apply(variables, X)
        with jln.linen.replace():  # the innermost block's arguments hold
            assert_close(norm.apply(variables, X), want)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        jln.linen.replace(implementation="fast").__enter__()


def test_custom_vjp_is_a_flag():
    with pytest.raises(TypeError, match="custom_vjp must be True or False; got 1"):
        jln.linen.replace(custom_vjp=1).__enter__()


def test_vmapped_and_shared_modules_agree():
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    many = nn.vmap(Twice, **axes)(nn.LayerNorm())
    variables = perturbed(many.init(jax.random.key(0), jnp.stack([X, X])))
    x = draw(5, 2, *SHAPE)

    def loss(variables, x):
        return jnp.vdot(many.apply(variables, x), draw(6, 2, *SHAPE))

    step = jax.grad(loss, (0, 1))
    want = step(variables, x)
    with jln.linen.replace():
        assert_close(step(variables, x), want)
        assert count_ops(step, variables, x) == (2, 2)


@pytest.mark.parametrize("inside", [True, False])
def test_the_users_interceptors_see_the_same_calls(inside):
    model = Twice(nn.LayerNorm())
    variables = model.init(jax.random.key(0), X)

    def run(*blocks):
        calls = []

        def interceptor(next_fun, args, kwargs, context):
            calls.append((type(context.module).__name__, context.method_name))
            y = next_fun(*args, **kwargs)
            return y + 1 if context.module.name == "norm" else y

        users = partial(nn.intercept_methods, interceptor)
        blocks = [*blocks, users] if inside else [users, *blocks]
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block())
            counted = count_ops(model.apply, variables, X)
            return calls, counted, model.apply(variables, X)

    calls, counted, want = run()
    got_calls, got_counted, got = run(jln.linen.replace)
    assert got_calls == calls and calls.count(("LayerNorm", "__call__")) == 4
    assert (counted, got_counted) == ((0, 0), (2, 0))
    assert_close(got, want)


def test_intermediates_and_tables_are_flaxs():
    model = Twice(nn.LayerNorm())
    variables = model.init(jax.random.key(0), X)
    want = model.apply(variables, X, capture_intermediates=True)
    table = model.tabulate(jax.random.key(0), X)
    with jln.linen.replace():
        got = model.apply(variables, X, capture_intermediates=True)
        assert model.tabulate(jax.random.key(0), X) == table
    assert_close(got, want)


class Bridged(nn.Module):
    """As MaxText does it: NNX norms in a linen model."""

    @nn.compact
    def __call__(self, x):
        x = nnx.bridge.to_linen(nnx.LayerNorm, x.shape[-1], name="norm")(x)
        layers = nnx.bridge.to_linen(nnx.RMSNorm, x.shape[-1], epsilon=1e-3)
        return layers(x, nnx_method=nnx.RMSNorm.__call__)


def test_nnx_norms_in_a_bridge_are_replaced():
    model = Bridged()
    variables = model.init(jax.random.key(0), X)
    want = model.apply(variables, X)
    with jln.linen.replace() as report:
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: (a == b).all(), model.init(jax.random.key(0), X), variables
            )
        )
        assert_close(model.apply(variables, X), want)
        assert count_ops(model.apply, variables, X) == (2, 0)
    assert report.replaced == {"norm": "LayerNorm", "ToLinen_0": "RMSNorm"}
    assert not report.left and count_ops(model.apply, variables, X) == (0, 0)


def test_a_linen_model_in_a_bridge_is_replaced_in_the_block():
    model = nnx.bridge.ToNNX(nn.LayerNorm(), rngs=nnx.Rngs(0)).lazy_init(X)
    want = model(X)
    report = jln.nnx.report(jln.nnx.replace(model))
    assert not report.replaced and "linen.replace()" in report.left["ToNNX"]
    with jln.linen.replace() as report:
        assert_close(model(X), want)
    assert report.replaced == {"LayerNorm": "LayerNorm"}


def test_an_empty_report_names_the_other_function_if_no_linen_module_was_called():
    with jln.linen.replace() as report:
        nnx.LayerNorm(X.shape[-1], rngs=nnx.Rngs(0))(X)
    assert "jax_layernorm.nnx.replace(model)" in str(report)
    with jln.linen.replace() as report:
        nn.Dense(2).init(jax.random.key(0), X)
    assert str(report) == "no norms recognized"
