"""`replace(also=)`: our functions compute norms that are a model's own classes."""

import contextlib
import copy
import functools
import pickle
import re
import threading
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quick
from flax import nnx
from flax_cases import FEATURES, SHAPE, assert_equal, draw
from flax_models import assert_close, count_ops
from own_norm_models import (
    CONDITION,
    LAYERS,
    LINEN,
    MODELS,
    NNX,
    WIDTH,
    LinenLlamaNorm,
    LlamaNorm,
    X,
    compute_linen_llama,
    compute_llama,
)

import jax_layernorm as jln

LLAMA = {"nnx": NNX["llama-nnx"], "linen": LINEN["llama-linen"]}
DTYPES = (  # of the parameters and of x
    (jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
)
MANY = draw(5, 2, 64, WIDTH)
for_both = pytest.mark.parametrize("api", LLAMA)


def for_each(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def drawn(abstract):
    """Parameters of these shapes: gains near 1, matrices and biases near 0."""
    leaves, structure = jax.tree.flatten(abstract)

    def draw_leaf(seed, a):
        gain = a.size <= LAYERS * WIDTH
        values = gain + np.random.default_rng(seed).normal(scale=0.2, size=a.shape)
        return jnp.asarray(values, a.dtype)

    return jax.tree.unflatten(structure, map(draw_leaf, range(len(leaves)), leaves))


@functools.cache
def prepared(case, dtype, scanned):
    if case.linen:
        model = case.make(dtype, scanned=scanned)
        key = jax.random.key(0)
        return model, drawn(jax.eval_shape(model.init, key, *case.inputs)["params"])
    model = nnx.eval_shape(lambda: case.make(dtype, scanned=scanned))
    return nnx.graphdef(model), drawn(nnx.state(model))


def prepare(case, dtype=jnp.float32, *, scanned=False):
    """A model that no test has changed, its parameters and its inputs."""
    model, params = prepared(case, dtype, scanned)
    inputs = [a.astype(dtype) for a in case.inputs]
    return model if case.linen else nnx.merge(model, params), params, inputs


def as_function(model):
    """The model as a function of its parameters and inputs."""
    if isinstance(model, nn.Module):
        return lambda params, *inputs: model.apply({"params": params}, *inputs)
    structure = nnx.graphdef(model)
    return lambda params, *inputs: nnx.merge(structure, params)(*inputs)


@contextlib.contextmanager
def replaced(model, also, **options):
    """For linen, a block. For NNX, a change in place, which outlasts the block."""
    if isinstance(model, nn.Module):
        with jln.linen.replace(also=also, **options) as report:
            yield report
    else:
        assert jln.nnx.replace(model, also=also, **options) is model
        yield jln.nnx.report(model)


def forward_and_gradients(model):
    def step(params, *inputs):
        y, vjp = jax.vjp(as_function(model), params, *inputs)
        return y, vjp(draw(9, *y.shape, dtype=y.dtype))

    return step


def prepare_norm(case, dtype=jnp.float32):
    """A norm and its parameters."""
    if case.linen:
        norm = case.norm(dtype)
        abstract = jax.eval_shape(norm.init, jax.random.key(0), *case.inputs)
        return norm, drawn(abstract["params"])
    norm = nnx.eval_shape(lambda: case.norm(dtype, rngs=nnx.Rngs(0)))
    nnx.update(norm, drawn(nnx.state(norm)))
    return norm, nnx.state(norm)


def prepare_llama(api, kind):
    """A norm of the class `kind`, which takes the arguments of `LlamaNorm`."""
    return prepare_norm(LLAMA[api]._replace(norm=kind))


def zeros(norm, x):
    """A function for `also` whose result shows that it ran."""
    return jnp.zeros_like(x)


def assert_same_bits(got, want, share=0.999):
    """At least this share of the elements is equal; float32 to a few units.

    Not all need be, because we may sum the squares in another order. Then the last bit
    of rstd may change, and with it an element that is about to be rounded to bfloat16.
    """
    assert got.dtype == want.dtype and got.shape == want.shape
    few_units = 8 * np.finfo(np.float32).eps * float(np.abs(want).max())
    difference = np.abs(np.float32(got) - np.float32(want))
    limit = few_units if want.dtype == jnp.float32 else 0
    assert np.mean(difference <= limit) >= share


@for_each(MODELS)
@pytest.mark.parametrize(("dtype", "x_dtype"), DTYPES)
def test_each_function_is_the_norm_of_its_model(case, dtype, x_dtype):
    """Called directly. The other tests rely on it."""
    norm, params = prepare_norm(case, dtype)
    x, *condition = (a.astype(x_dtype) for a in (MANY, *case.inputs[1:]))
    want = as_function(norm)(params, x, *condition)
    if case.linen:
        got = norm.apply({"params": params}, x, *condition, method=case.compute)
    else:
        got = case.compute(norm, x, *condition)
    if case.conditioned:
        (want, gate), (got, our_gate) = want, got
        assert_equal(our_gate, gate)
    exact = jnp.bfloat16 in (dtype, x_dtype)
    (assert_same_bits if exact else assert_close)(got, want)


@for_each(MODELS)
def test_every_norm_is_ours_forward_and_backward(case):
    model, params, inputs = prepare(case)
    with replaced(model, None) as report:
        assert count_ops(as_function(model), params, *inputs) == (0, 0)
    assert not report.replaced and len(report.left) == case.norms
    for reason in report.left.values():
        assert f"pass also={{{case.norm.__name__}: compute}}" in reason
    with replaced(model, case.also) as report:
        step = forward_and_gradients(model)
        assert count_ops(step, params, *inputs) == (case.norms, case.norms)
    assert [*report.replaced.values()] == [case.norm.__name__] * case.norms
    assert not report.left


@for_each(MODELS)
def test_outputs_and_gradients_agree_under_jit_scan_and_remat(case):
    model, params, inputs = prepare(case, scanned=True)
    want = quick.jit(forward_and_gradients(model))(params, *inputs)
    with replaced(model, case.also) as report:
        step = forward_and_gradients(model)
        got = quick.jit(step)(params, *inputs)
        counted = count_ops(step, params, *inputs)
    assert_close(got, want)
    recomputed = case.norms - 1
    assert counted == (case.norms + recomputed, case.norms)
    assert len(report.replaced) == (case.norms - 1) // LAYERS + 1
    assert not report.left


@for_each({name: case for name, case in MODELS.items() if case.rounds_before_scale})
def test_outputs_agree_in_bfloat16_bit_for_bit(case):
    """All bits are equal unless the last bit of some rstd changes.

    That may change the rest of its sequence, which is one of 16. Without
    `round_before_scale` only 0.2 of the elements are equal.
    """
    model, params, _ = prepare(case, jnp.bfloat16, scanned=True)
    x = draw(6, 16, 6, WIDTH, dtype=jnp.bfloat16)

    # By default XLA leaves roundings out, for example of the sum that a norm reads.
    rounded = {"xla_allow_excess_precision": False}

    def run():
        lowered = quick.jit(as_function(model)).lower(params, x)
        return lowered.compile(compiler_options=rounded)(params, x)

    want = run()
    with replaced(model, case.also):
        assert_same_bits(run(), want, share=0.9)


@for_each(MODELS)
def test_mapped_models_agree_and_run_ours(case):
    model, params, inputs = prepare(case)
    norm, params_of_norm = prepare_norm(case)
    many = [jnp.stack([a, a / 2]) for a in inputs]

    def mapped(function, params):
        return jax.vmap(partial(function, params))

    want = quick.jit(mapped(as_function(norm), params_of_norm))(*many)
    with replaced(model, case.also), replaced(norm, case.also):
        got = quick.jit(mapped(as_function(norm), params_of_norm))(*many)
        counted = count_ops(mapped(as_function(model), params), *many)
    assert_close(got, want)
    assert counted == (case.norms, 0)


@for_each(MODELS)
def test_forward_mode_works_through_compute(case):
    norm, params = prepare_norm(case)
    tangents = tuple(draw(8, *a.shape) for a in case.inputs)

    def run():
        function = partial(as_function(norm), params)
        return quick.jit(lambda *a: jax.jvp(function, a, tangents))(*case.inputs)

    want = run()
    with replaced(norm, case.also), pytest.raises(TypeError, match="forward-mode"):
        run()
    with replaced(norm, case.also, custom_vjp=False):
        assert_close(run(), want)
        # JAX differentiates the equations.
        assert count_ops(as_function(norm), params, *case.inputs) == (0, 0)


@for_each(MODELS)
def test_the_implementation_may_be_named(case):
    norm, params = prepare_norm(case)

    def lowered(implementation):
        with replaced(norm, case.also, implementation=implementation):
            apply = jax.jit(as_function(norm))
            return apply.lower(params, *case.inputs).as_text(debug_info=True)

    assert "layer_norm_forward" in lowered("xla")
    with pytest.raises(NotImplementedError, match="'pallas_tpu' cannot run"):
        lowered("pallas_tpu")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        lowered("fast")


@for_both
def test_a_function_that_names_an_implementation_keeps_it(api):
    norm, params = prepare_llama(api, LLAMA[api].norm)

    def named(norm, x):
        return jln.rms_norm({}, x, implementation="xla")

    with replaced(norm, {LLAMA[api].norm: named}, implementation="pallas_tpu"):
        # pallas_tpu would be refused on this platform.
        jax.jit(as_function(norm)).lower(params, X)


# Parameters, checkpoints and copies.


@for_each(NNX)
def test_the_state_stays_as_it_is(case):
    model, params, inputs = prepare(case)
    paths = [path for path, _ in nnx.iter_graph(model)]
    norms = [node for _, node in nnx.iter_graph(model) if type(node) is case.norm]
    specs = nnx.get_partition_spec(nnx.state(model))
    structure = nnx.graphdef(model)
    jln.nnx.replace(model, also=case.also)
    assert [path for path, _ in nnx.iter_graph(model)] == paths
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(params)
    assert_equal(nnx.state(model), params)
    assert nnx.get_partition_spec(nnx.state(model)) == specs
    ours = [node for _, node in nnx.iter_graph(model) if isinstance(node, case.norm)]
    assert len(ours) == case.norms
    assert all(a is b for a, b in zip(ours, norms, strict=True))
    assert {type(norm).__qualname__ for norm in ours} == {case.norm.__qualname__}
    # Split before, merged after, and the other way round.
    for graph, state, count in (
        (structure, nnx.state(model), 0),
        (nnx.graphdef(model), params, case.norms),
    ):
        assert count_ops(nnx.merge(graph, state), *inputs) == (count, 0)


@for_each(LINEN)
def test_init_makes_the_same_parameters_inside(case):
    model, params, inputs = prepare(case)

    def traced():
        init = partial(model.init, jax.random.key(3))
        program, made = jax.make_jaxpr(init, return_shape=True)(*inputs)
        assert count_ops(init, *inputs) == (0, 0)  # `init` runs the class itself
        return re.sub("0x[0-9a-f]*", "", str(program)), made["params"]

    program, made = traced()
    with jln.linen.replace(also=case.also):
        program_inside, made_inside = traced()
    assert program_inside == program
    assert jax.tree.structure(made_inside) == jax.tree.structure(params)
    assert jax.tree.leaves(made_inside) == jax.tree.leaves(made)
    assert nn.get_partition_spec(made_inside) == nn.get_partition_spec(params)


def test_checkpoints_from_before_load_after_and_back(tmp_path):
    def model_and_state(case):
        model, params, _ = prepare(case)
        return model, params if case.linen else nnx.to_pure_dict(params)

    before = {name: model_and_state(case) for name, case in MODELS.items()}
    saved = {name: state for name, (_, state) in before.items()}
    with ocp.StandardCheckpointer() as checkpointer, contextlib.ExitStack() as blocks:
        checkpointer.save(tmp_path / "before", saved)
        checkpointer.wait_until_finished()
        inside = {}
        for name, case in MODELS.items():
            model = before[name][0]
            blocks.enter_context(replaced(model, case.also))
            if case.linen:
                like = jax.eval_shape(model.init, jax.random.key(0), *case.inputs)
                inside[name] = like["params"]
            else:
                inside[name] = nnx.to_pure_dict(nnx.state(model))
        loaded = checkpointer.restore(tmp_path / "before", inside)
        assert jax.tree.structure(loaded) == jax.tree.structure(saved)
        assert_equal(loaded, saved)
        checkpointer.save(tmp_path / "inside", loaded)
        checkpointer.wait_until_finished()
        blocks.close()
        assert_equal(checkpointer.restore(tmp_path / "inside", saved), saved)


@for_each(NNX)
def test_a_pickle_holds_the_models_class(case):
    model, _, inputs = prepare(case)
    jln.nnx.replace(model, also=case.also)
    loaded = pickle.loads(pickle.dumps(model))
    assert_equal(nnx.state(loaded), nnx.state(model))
    assert not jln.nnx.report(loaded).replaced
    assert count_ops(loaded, *inputs) == (0, 0)
    jln.nnx.replace(loaded, also=case.also)
    assert count_ops(loaded, *inputs) == (case.norms, 0)


COPIES = {
    "deepcopy": copy.deepcopy,
    "clone": nnx.clone,
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@for_each(NNX)
def test_copies_are_ours(case, copied):
    model, _, inputs = prepare(case)
    jln.nnx.replace(model, also=case.also)
    made = copied(model)
    assert made is not model
    assert_equal(nnx.state(made), nnx.state(model))
    assert jln.nnx.report(made) == jln.nnx.report(model)
    assert count_ops(made, *inputs) == (case.norms, 0)


# Transformations of NNX and of linen.

TRANSFORMED = {
    "nnx.jit": lambda m, *a: nnx.jit(lambda m, *a: m(*a))(m, *a),
    "jax.jit of a pytree": lambda m, *a: jax.jit(lambda m, *a: m(*a))(m, *a),
    "nnx.grad": lambda m, *a: nnx.grad(lambda m: jnp.vdot(m(*a), X))(m),
    "nnx.remat": lambda m, *a: nnx.remat(lambda m, *a: m(*a))(m, *a),
    "nnx.vmap": lambda m, *a: nnx.vmap(
        lambda m, *a: m(*a), in_axes=(None, *(0 for _ in a))
    )(m, *(a[:, None] for a in a)),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
@for_each({name: NNX[name] for name in ("llama-nnx", "adaptive-nnx")})
def test_transformations_of_nnx_agree_and_run_ours(case, transformed):
    """One norm is enough, because whole models are scanned and rematerialized above."""
    norm, _ = prepare_norm(case)

    def call(norm, *inputs):
        y = norm(*inputs)
        return y[0] * y[1] if case.conditioned else y

    class Holder(nnx.Module):
        def __init__(self):
            self.norm = norm

        def __call__(self, *inputs):
            return call(self.norm, *inputs)

    model = Holder()

    def run():
        structure = nnx.graphdef(model)

        def apply(params, *inputs):
            return transformed(nnx.merge(structure, params), *inputs)

        arguments = nnx.state(model), *case.inputs
        return quick.jit(apply)(*arguments), count_ops(apply, *arguments)

    want, _ = run()
    jln.nnx.replace(model, also=case.also)
    got, counted = run()
    assert_close(got, want)
    assert counted[0] == 1


WRAPPERS = {"nn.remat": nn.remat, "nn.jit": nn.jit}


@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=WRAPPERS)
@for_each(LINEN)
def test_wrapped_classes_of_linen_are_known_by_their_call(case, wrapped):
    norm = wrapped(case.norm)(jnp.float32)
    params = drawn(jax.eval_shape(norm.init, jax.random.key(0), *case.inputs))
    want = quick.jit(norm.apply)(params, *case.inputs)
    with jln.linen.replace(also=case.also) as report:
        assert_close(quick.jit(norm.apply)(params, *case.inputs), want)
        assert count_ops(norm.apply, params, *case.inputs) == (1, 0)
    assert len(report.replaced) == 1 and not report.left


def test_jitted_outside_is_traced_again_inside():
    norm, params = prepare_llama("linen", LinenLlamaNorm)
    apply = jax.jit(as_function(norm))
    want = apply(params, X)
    with jln.linen.replace(also={LinenLlamaNorm: zeros}):
        assert_equal(apply(params, X), jnp.zeros_like(X))
    assert_equal(apply(params, X), want)


def test_a_jitted_nnx_function_sees_the_replacement():
    norm, _ = prepare_llama("nnx", LlamaNorm)
    apply = nnx.jit(lambda norm, x: norm(x))
    assert jnp.abs(apply(norm, X)).max() > 0
    jln.nnx.replace(norm, also={LlamaNorm: zeros})
    assert_equal(apply(norm, X), jnp.zeros_like(X))


# Blocks, subclasses and wrong arguments, with one norm.


def test_only_the_calling_thread_is_affected():
    norm, params = prepare_llama("linen", LinenLlamaNorm)
    apply = as_function(norm)
    results = {}

    def in_thread():
        results["thread"] = apply(params, X)

    want = apply(params, X)
    with jln.linen.replace(also={LinenLlamaNorm: zeros}):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        results["inside"] = apply(params, X)
    assert_equal(results["thread"], want)
    assert_equal(results["inside"], jnp.zeros_like(X))


def test_nested_blocks_know_the_classes_of_all_and_the_innermost_function():
    norm, params = prepare_llama("linen", LinenLlamaNorm)
    apply = as_function(norm)
    also = {LinenLlamaNorm: compute_linen_llama}
    with jln.linen.replace(also=also) as outer:
        with jln.linen.replace(custom_vjp=False) as inner:
            assert count_ops(apply, params, X) == (0, 0)
            jax.jvp(partial(apply, params), (X,), (X,))
        with jln.linen.replace(also={LinenLlamaNorm: zeros}):
            assert_equal(apply(params, X), jnp.zeros_like(X))
        assert count_ops(apply, params, X) == (1, 0)
    assert count_ops(apply, params, X) == (0, 0)
    assert outer.replaced == inner.replaced == {"LinenLlamaNorm": "LinenLlamaNorm"}
    assert not outer.left and not inner.left


def test_a_second_replace_changes_the_function_and_the_options():
    norm, _ = prepare_llama("nnx", LlamaNorm)
    want = norm(X)
    jln.nnx.replace(norm, also={LlamaNorm: zeros})
    assert_equal(norm(X), jnp.zeros_like(X))
    jln.nnx.replace(norm, also={LlamaNorm: compute_llama})
    assert_close(norm(X), want)
    assert count_ops(norm, X) == (1, 0)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(norm, (X,), (X,))
    jln.nnx.replace(norm, custom_vjp=False)  # `also` need not be repeated
    jax.jvp(norm, (X,), (X,))
    assert count_ops(norm, X) == (0, 0)
    jln.nnx.replace(norm)
    assert count_ops(norm, X) == (1, 0)
    assert jln.nnx.report(norm).replaced == {"LlamaNorm": "LlamaNorm"}


class Keeps(LlamaNorm):
    def describe(self):
        return f"eps {self.eps}"


class Overrides(LlamaNorm):
    def __call__(self, x):
        return 2 * x * self.weight[...]


class CallsSuper(LlamaNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class LinenKeeps(LinenLlamaNorm):
    def describe(self):
        return f"eps {self.eps}"


class LinenOverrides(LinenLlamaNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * x * self.param("weight", nn.initializers.ones, x.shape[-1:])


class LinenCallsSuper(LinenLlamaNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("api", "kind", "ours"),
    [
        ("nnx", Keeps, 1),
        ("nnx", Overrides, 0),
        ("nnx", CallsSuper, 1),
        ("linen", LinenKeeps, 1),
        ("linen", LinenOverrides, 0),
        ("linen", LinenCallsSuper, 1),
    ],
)
def test_subclasses_keep_what_they_override(api, kind, ours):
    base, compute = LLAMA[api].norm, LLAMA[api].compute
    norm, params = prepare_llama(api, kind)
    want = as_function(norm)(params, X)
    with replaced(norm, {base: compute}) as report:
        assert_close(as_function(norm)(params, X), want)
        counted = count_ops(as_function(norm), params, X)
    assert counted == (ours, 0)
    assert len(report.replaced) == ours and len(report.left) == 1 - ours
    assert isinstance(norm, kind)
    if kind is Keeps:
        assert norm.describe() == "eps 1e-05"
    if not ours:
        assert "also" in report.left[kind.__name__]


@for_both
def test_a_subclass_may_have_its_own_function(api):
    base, compute = LLAMA[api].norm, LLAMA[api].compute
    kind = Overrides if api == "nnx" else LinenOverrides
    norm, params = prepare_llama(api, kind)
    with replaced(norm, {base: compute, kind: zeros}):
        assert_equal(as_function(norm)(params, X), jnp.zeros_like(X))


@for_both
def test_what_also_must_be(api):
    base, compute = LLAMA[api].norm, LLAMA[api].compute
    other = nn.Dense if api == "nnx" else int
    norm, _ = prepare_llama(api, base)
    instance = "with a name"
    for also, message in (
        ([base], "also must be a mapping .*; got list. Write also="),
        (base, "also must be a mapping .*; got .*. Write also="),
        ({instance: compute}, "also must map .* got the key 'with a name' .*Pass the"),
        ({norm: compute} if api == "linen" else {3: compute}, "also must map .* got"),
        ({base: 3}, f"also must map {base.__name__} to a function .* got 3. Write"),
        ({base: None}, "also must map .* to a function .* got None. Write"),
        ({other: compute}, f"also must name .*; got .*{other.__name__}. Pass"),
    ):
        with pytest.raises(TypeError, match=message), replaced(norm, also):
            pass
    # Nothing has been replaced.
    if api == "nnx":
        assert type(norm) is LlamaNorm
    else:
        assert count_ops(as_function(norm), {"weight": X[0, 0]}, X) == (0, 0)


def test_a_compact_norm_declares_its_parts_in_compute():
    class CompactNorm(nn.Module):
        @nn.compact
        def __call__(self, x, condition):
            scale = nn.Dense(WIDTH, name="to_scale")(condition)[:, None]
            return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def compute(norm, x, condition):
        scale = nn.Dense(WIDTH, name="to_scale")(condition)[:, None]
        return jln.rms_norm({"scale": scale}, x)

    norm = CompactNorm()
    variables = drawn(jax.eval_shape(norm.init, jax.random.key(0), X, CONDITION))
    want = quick.jit(norm.apply)(variables, X, CONDITION)
    with jln.linen.replace(also={CompactNorm: compute}):
        assert_close(quick.jit(norm.apply)(variables, X, condition=CONDITION), want)
        assert count_ops(norm.apply, variables, X, CONDITION) == (1, 0)


@for_each(NNX)
def test_nnx_norms_in_a_bridge_are_replaced_under_linen(case):
    bridge = nnx.bridge.to_linen(case.norm, jnp.float32)
    abstract = jax.eval_shape(bridge.init, jax.random.key(0), *case.inputs)
    variables = drawn(abstract)
    want = quick.jit(bridge.apply)(variables, *case.inputs)
    with jln.linen.replace(also=case.also) as report:
        inside = jax.eval_shape(bridge.init, jax.random.key(0), *case.inputs)
        assert_close(quick.jit(bridge.apply)(variables, *case.inputs), want)
        assert count_ops(bridge.apply, variables, *case.inputs) == (1, 0)
    assert jax.tree.structure(inside) == jax.tree.structure(abstract)
    assert [*report.replaced.values()] == [case.norm.__name__] and not report.left


def test_an_nnx_model_in_a_bridge_is_replaced_under_linen():
    case = NNX["adaptive-nnx"]
    bridge = nnx.bridge.to_linen(lambda rngs: case.make())
    params = jax.eval_shape(bridge.init, jax.random.key(0), *case.inputs)
    with jln.linen.replace(also=case.also) as report:
        assert count_ops(bridge.apply, drawn(params), *case.inputs) == (case.norms, 0)
    assert len(report.replaced) == case.norms and not report.left


# Subclasses of NNX norms need no `also`.


class Widened(nnx.LayerNorm):
    def __call__(self, x):
        return super().__call__(x.astype("float32")).astype(x.dtype)


class NeverCalls(nnx.LayerNorm):
    def __call__(self, x):
        return 2 * x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_subclass_of_flaxs_that_calls_super_is_replaced(dtype):
    norm = Widened(FEATURES, rngs=nnx.Rngs(0))
    nnx.update(norm, drawn(nnx.state(norm)))
    x = draw(0, *SHAPE, dtype=dtype)

    def run():
        return quick.jit(as_function(norm))(nnx.state(norm), x)

    want = run()
    assert jln.nnx.replace(norm) is norm and isinstance(norm, Widened)
    got = run()
    assert got.dtype == dtype
    assert_same_bits(got, want)
    assert count_ops(norm, x) == (1, 0)
    assert jln.nnx.report(norm).replaced == {"Widened": "Widened"}
    jln.nnx.replace(norm, custom_vjp=False)
    jax.jvp(norm, (x,), (x,))


def test_a_subclass_of_flaxs_that_never_calls_super_is_left():
    norm = NeverCalls(FEATURES, rngs=nnx.Rngs(0))
    x = draw(0, *SHAPE)
    assert_equal(jln.nnx.replace(norm)(x), 2 * x)
    report = jln.nnx.report(norm)
    assert type(norm) is NeverCalls and not report.replaced
    assert "does not call super().__call__" in report.left["NeverCalls"]
    jln.nnx.replace(norm, also={NeverCalls: zeros})
    assert_equal(norm(x), jnp.zeros_like(x))
