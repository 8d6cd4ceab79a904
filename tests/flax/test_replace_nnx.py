"""`jax_layernorm.nnx.replace`: our norms compute those of an unchanged NNX model."""

import copy
import multiprocessing
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax_cases import FEATURES, SHAPE, assert_equal, draw
from flax_models import (
    LAYERS,
    TOKENS,
    Gemma,
    NormWithASize,
    X,
    assert_close,
    count_ops,
    loss_and_logits_of_gemma,
    perturbed,
)

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMS = 6 * LAYERS + 1  # of a Gemma


def norm(kind=nnx.LayerNorm, **options):
    """A norm whose parameters are not the initial ones."""
    made = kind(FEATURES, **options, rngs=nnx.Rngs(0))
    nnx.update(made, perturbed(nnx.state(made)))
    return made


class OnlyConstructs(nnx.LayerNorm):
    def __init__(self, rngs):
        super().__init__(FEATURES, epsilon=0.25, rngs=rngs)

    def name(self):
        return f"epsilon {self.epsilon}"


class Doubles(nnx.RMSNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Overrides(nnx.RMSNorm):
    def __call__(self, x):
        return nnx.RMSNorm.__call__(self, x)


class Everywhere(nnx.Module):
    """Norms in every place a module can hold one; `shared` is in two."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.shared = norm()
        self.shared.note = "the user's"
        self.again = self.shared
        self.list = nnx.List([norm(nnx.RMSNorm)])
        self.dict = nnx.Dict(key=norm(use_bias=False))
        self.tuple = nnx.data((norm(nnx.RMSNorm, use_scale=False),))
        self.sequential = nnx.Sequential(OnlyConstructs(rngs), jnp.sin, norm())
        self.doubles = Doubles(FEATURES, rngs=rngs)
        self.overrides = Overrides(FEATURES, rngs=rngs)
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x):
        x = self.dense(self.again(self.shared(x)))
        x = self.tuple[0](self.dict.key(self.list[0](x)))
        return self.overrides(self.doubles(self.sequential(x)))


REPLACED = {
    "again": "LayerNorm",
    "dict/key": "LayerNorm",
    "doubles": "Doubles",
    "list/0": "RMSNorm",
    "sequential/layers/0": "OnlyConstructs",
    "sequential/layers/2": "LayerNorm",
    "tuple/0": "RMSNorm",
}


@pytest.mark.parametrize("scanned", [False, True])
def test_gemma_agrees_in_logits_loss_and_gradients_and_every_norm_is_ours(scanned):
    model = Gemma(nnx.Rngs(0), scanned=scanned)
    nnx.update(model, perturbed(nnx.state(model)))
    step = nnx.jit(nnx.value_and_grad(loss_and_logits_of_gemma, has_aux=True))

    def gradients(state):
        def loss(state):
            return loss_and_logits_of_gemma(nnx.merge(nnx.graphdef(model), state))

        return jax.grad(loss, has_aux=True)(state)

    want = step(model)  # jitted before: nnx.jit sees that the model has changed
    assert count_ops(gradients, nnx.state(model)) == (0, 0)
    assert jln.nnx.replace(model) is model
    assert_close(step(model), want)
    recomputed = 6 * LAYERS if scanned else 0  # under nnx.remat
    assert count_ops(gradients, nnx.state(model)) == (NORMS + recomputed, NORMS)
    report = jln.nnx.report(model)
    assert len(report.replaced) == (7 if scanned else NORMS)
    assert not report.left


def test_norms_are_found_everywhere_and_stay_the_objects_they_are():
    model = Everywhere()
    shared, params, want = model.shared, nnx.state(model), model(X)
    before = jln.nnx.report(model)
    assert not before.replaced and before.left.keys() == {*REPLACED, "overrides"}
    assert jln.nnx.replace(model) is model
    assert model.shared is model.again is shared and shared.note == "the user's"
    assert isinstance(shared, jln.nnx.LayerNorm)
    assert isinstance(model.sequential.layers[0], OnlyConstructs)
    assert model.sequential.layers[0].name() == "epsilon 0.25"
    assert_close(model(X), want)
    assert count_ops(model, X) == (8, 0)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(params)
    assert_equal(nnx.state(model), params)
    report = jln.nnx.report(model)
    assert report.replaced == REPLACED
    reason = (
        "Overrides.__call__ does not call super().__call__; pass"
        " also={Overrides: compute} to replace()"
    )
    assert report.left == {"overrides": reason}
    assert str(report).splitlines()[-1] == f"left      overrides: {reason}"


@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.RMSNorm])
def test_a_bare_norm_becomes_its_replacement(kind):
    flaxs = norm(kind)
    want = flaxs(X)
    ours = jln.nnx.replace(flaxs)
    assert type(ours) is getattr(jln.nnx, kind.__name__)
    assert_close(ours(X), want)
    assert count_ops(ours, X) == (1, 0)
    assert jln.nnx.report(ours).replaced == {kind.__name__: kind.__name__}


def test_repeated_replacement_is_harmless_and_changes_custom_vjp():
    own = jln.nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm(), own)
    want = jln.nnx.replace(model)(X)
    assert_equal(jln.nnx.replace(model)(X), want)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(model.layers[0], (X,), (X,))
    jln.nnx.replace(model, custom_vjp=False)
    jax.jvp(model.layers[0], (X,), (X,))
    assert own.custom_vjp  # what the user built with this package stays as it is


def test_split_before_merges_after_and_the_other_way_round():
    model = Everywhere()
    before, state = nnx.split(model)
    want = model(X)
    after, replaced_state = nnx.split(jln.nnx.replace(model))
    assert_equal(nnx.merge(before, replaced_state)(X), want)
    assert_close(nnx.merge(after, state)(X), want)


TRANSFORMED = {
    "nnx.jit": lambda m: nnx.jit(lambda m, x: m(x))(m, X),
    "jax.jit of a pytree": lambda m: jax.jit(lambda m, x: m(x))(m, X),
    "nnx.grad": lambda m: nnx.grad(lambda m: jnp.vdot(m(X), draw(3, *SHAPE)))(m),
    "nnx.remat": lambda m: nnx.remat(lambda m, x: m(x))(m, X),
    "nnx.vmap": lambda m: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, X),
    "clone": lambda m: nnx.clone(m)(X),
    "deepcopy": lambda m: copy.deepcopy(m)(X),
    "capture": lambda m: nnx.capture(m, nnx.Intermediate)(X)[0],
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformations_agree_before_and_after(transformed):
    model = Everywhere()
    want = transformed(model)
    jln.nnx.replace(model)
    assert_close(transformed(model), want)


def test_outputs_of_methods_are_captured_as_before():
    model = nnx.Sequential(norm(), norm(nnx.RMSNorm))

    def capture():
        return nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(X)

    want = capture()
    jln.nnx.replace(model)
    assert_close(capture(), want)


def test_model_is_replaced_inside_the_jit_that_makes_it_or_takes_it_as_a_pytree():
    @nnx.jit
    def make():
        return jln.nnx.replace(Everywhere())

    assert isinstance(make().shared, jln.nnx.LayerNorm)
    model = Everywhere()
    apply = jax.jit(lambda model, x: jln.nnx.replace(model)(x))
    assert_close(apply(model, X), model(X))
    assert count_ops(apply, model, X) == (8, 0)
    assert type(model.shared) is nnx.LayerNorm
    with pytest.raises(Exception, match="different trace level"):
        jax.jit(lambda x: jln.nnx.replace(model)(x))(X)
    assert type(model.shared) is nnx.LayerNorm


def test_abstract_models_are_replaced():
    model = jln.nnx.replace(nnx.eval_shape(Everywhere))
    assert jln.nnx.report(model).replaced == REPLACED
    nnx.update(model, nnx.state(Everywhere()))
    assert_close(model(X), Everywhere()(X))


def test_replaced_norms_can_be_pickled():
    ours = jln.nnx.replace(norm())
    assert_equal(pickle.loads(pickle.dumps(ours))(X), ours(X))


def in_a_new_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "split": lambda model: nnx.merge(*pickle.loads(pickle.dumps(nnx.split(model)))),
    "multiprocessing": lambda model: in_a_new_process(copy.copy, model),
}


@pytest.mark.parametrize("way", WAYS)
def test_replaced_subclasses_can_be_pickled(way):
    """The class is one that `replace` made, under the name of the user's."""
    model = jln.nnx.replace(NormWithASize(nnx.Rngs(0)))
    copied = WAYS[way](model)
    assert isinstance(copied, NormWithASize)
    assert isinstance(copied, jln.nnx.LayerNorm)
    assert_equal(copied(X), model(X))
    if way != "cloudpickle":  # which brings the class along
        assert type(copied) is type(model)


def test_orbax_checkpoint_from_before_loads_after_and_back(tmp_path):
    def restored(checkpointer, path, model):
        like = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model)))
        state = nnx.state(model)
        nnx.replace_by_pure_dict(state, checkpointer.restore(path, like))
        nnx.update(model, state)
        return model

    model = Gemma(nnx.Rngs(0))
    nnx.update(model, perturbed(nnx.state(model)))
    with ocp.StandardCheckpointer() as checkpointer:

        def save(name):
            checkpointer.save(tmp_path / name, nnx.to_pure_dict(nnx.state(model)))
            checkpointer.wait_until_finished()

        save("before")
        want = model(TOKENS)
        jln.nnx.replace(model)
        save("after")
        ours = jln.nnx.replace(Gemma(nnx.Rngs(1)))
        assert_close(restored(checkpointer, tmp_path / "before", ours)(TOKENS), want)
        flaxs = Gemma(nnx.Rngs(1))
        assert_equal(restored(checkpointer, tmp_path / "after", flaxs)(TOKENS), want)


@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.RMSNorm])
def test_calls_with_a_mask_stay_flaxs(kind):
    mask = np.random.default_rng(1).random(SHAPE) > 0.3
    model = norm(kind)
    want = model(X, mask=mask)
    jln.nnx.replace(model)
    assert_equal(model(X, mask=mask), want)
    assert count_ops(lambda x: model(x, mask=mask), X) == (0, 0)
    assert count_ops(lambda x: model(x, mask=None), X) == (1, 0)


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({}, X * (1 + 1j)),
        ({"dtype": jnp.complex64}, X),
        ({"param_dtype": jnp.complex64}, X),
        ({"epsilon": jnp.float32(1e-5)}, X),
        ({"reduction_axes": ()}, X),
    ],
    ids=("complex x", "complex y", "complex scale", "epsilon", "no axes"),
)
def test_what_our_functions_refuse_stays_flaxs(options, x):
    model = nnx.LayerNorm(FEATURES, **options, rngs=nnx.Rngs(0))
    want = model(x)
    assert_equal(jln.nnx.replace(model)(x), want)
    assert count_ops(model, x) == (0, 0)


def test_norms_with_axis_index_groups_stay_flaxs():
    model = norm(axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
    assert type(jln.nnx.replace(model)) is nnx.LayerNorm
    assert jln.nnx.report(model).left == {"LayerNorm": "axis_index_groups is given"}


@pytest.mark.parametrize(
    ("axes", "features"), [((2, 1), 24), ((-1, 2), 6)], ids=("unsorted", "repeated")
)
def test_axes_are_read_as_flax_reads_them(axes, features):
    x = draw(0, 3, 4, 6)
    model = nnx.LayerNorm(
        features, reduction_axes=axes, feature_axes=axes, rngs=nnx.Rngs(0)
    )
    nnx.update(model, perturbed(nnx.state(model)))
    want = model(x)
    assert_close(jln.nnx.replace(model)(x), want)
    assert count_ops(model, x) == (1, 0)


class HasItsOwnOffset(nnx.RMSNorm):
    scale_offset = 1.0

    def __call__(self, x):
        return super().__call__(x) + self.scale_offset


def test_a_subclass_that_uses_a_name_of_ours_is_left():
    model = HasItsOwnOffset(FEATURES, rngs=nnx.Rngs(0))
    want = model(X)
    assert_equal(jln.nnx.replace(model)(X), want)
    assert "'scale_offset' of its own" in str(jln.nnx.report(model))
    also = {HasItsOwnOffset: lambda norm, x: jln.rms_norm({}, x) + norm.scale_offset}
    assert_close(jln.nnx.replace(model, also=also)(X), want)


@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.RMSNorm])
def test_stacked_parameters_are_refused_as_by_flax(kind):
    """They would broadcast against as many rows of `x`."""
    stacked = nnx.vmap(lambda key: kind(8, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    x = draw(0, 3, 8)
    with pytest.raises(TypeError, match="cannot reshape"):
        stacked(x)
    with pytest.raises(ValueError, match=r"got \(3, 8\).*use nnx.vmap"):
        jln.nnx.replace(stacked)(x)
    y = nnx.vmap(lambda norm, row: norm(row))(stacked, x)
    assert_close(y, kind(8, rngs=nnx.Rngs(0))(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_dtypes_are_flaxs(dtype):
    model = norm(dtype=None)
    x = (8 * X).astype(dtype)
    want = model(x)
    assert_close(jln.nnx.replace(model)(x), want)


def test_what_holds_no_module_is_a_type_error():
    for wrong in (linen.LayerNorm(), nnx.LayerNorm, nnx.split(norm()), {}, 3):
        for function in (jln.nnx.replace, jln.nnx.report):
            with pytest.raises(TypeError, match=r"model must be a flax\.nnx module or"):
                function(wrong)


def test_the_implementation_may_be_named_and_changed():
    model = nnx.Sequential(norm(), jln.nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0)))
    want = model(X)
    assert_close(jln.nnx.replace(model, implementation="xla")(X), want)
    assert model.layers[0].implementation == "xla"
    assert model.layers[1].implementation is None  # what the user built stays as it is
    jln.nnx.replace(model, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="it supports TPUs only"):
        model(X)
    assert_close(jln.nnx.replace(model)(X), want)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        jln.nnx.replace(model, implementation="fast")


def test_custom_vjp_is_a_flag():
    with pytest.raises(TypeError, match="custom_vjp must be True or False; got 1"):
        jln.nnx.replace(norm(), custom_vjp=1)


class HoldsANorm(nnx.Module):
    """Looks like a norm by its name, and holds one of Flax's."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return 2 * self.norm(x)


def test_a_module_that_only_holds_a_norm_is_not_reported_unless_it_is_replaced():
    model = HoldsANorm(nnx.Rngs(0))
    want = model(X)
    assert list(jln.nnx.report(jln.nnx.replace(model)).replaced) == ["norm"]
    assert not jln.nnx.report(model).left

    def compute(module, x):
        return 2 * jln.layer_norm({}, x)

    jln.nnx.replace(model, also={HoldsANorm: compute})
    assert jln.nnx.report(model).replaced.keys() == {"HoldsANorm", "norm"}
    assert_close(model(X), want)
