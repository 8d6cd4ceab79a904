"""`also=` and reports: classes that share a `__call__`, names, and subclasses."""

import dataclasses
import pickle
import pickletools
from concurrent import futures

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import FEATURES, assert_equal, draw

import jax_layernorm as jln
from jax_layernorm import _linen_replace

X = draw(0, 3, FEATURES)


class Layer(nn.Module):
    def __call__(self, x):
        return self.body(x)


class NormOfLayer(Layer):
    def body(self, x):
        return jln.rms_norm({}, x)


class Activation(Layer):
    def body(self, x):
        return jnp.tanh(x)


def test_a_class_that_only_shares_the_call_of_a_listed_one_is_not_computed():
    want = Activation().apply({}, X)
    with jln.linen.replace(also={NormOfLayer: lambda _, x: 0 * x}) as report:
        assert_equal(Activation().apply({}, X), want)
        assert_equal(NormOfLayer().apply({}, X), 0 * X)
    assert report.replaced == {"NormOfLayer": "NormOfLayer"}


class Plain(nnx.Module):
    def __call__(self, x):
        return x + 1


class Keyed(Plain):
    pass


class Between(Plain):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Diamond(Keyed, Between):
    pass


def test_a_call_that_ends_in_another_class_is_not_computed():
    model = jln.nnx.replace(Diamond(), also={Keyed: lambda _, x: 0 * x})
    assert_equal(model(X), 2 * (X + 1))
    assert_equal(jln.nnx.replace(Keyed(), also={Keyed: lambda _, x: 0 * x})(X), 0 * X)


class TakesNoOptions(nnx.LayerNorm):
    def __init_subclass__(cls):
        super().__init_subclass__()


class Final(nnx.LayerNorm):
    def __init_subclass__(cls, **options):
        raise TypeError("it is final")


def test_no_subclass_of_a_norm_need_take_options_or_exist():
    norm = TakesNoOptions(FEATURES, rngs=nnx.Rngs(0))
    assert jln.nnx.report(jln.nnx.replace(norm)).replaced
    norms = nnx.List(
        [nnx.RMSNorm(FEATURES, rngs=nnx.Rngs(0)), Final(FEATURES, rngs=nnx.Rngs(0))]
    )
    report = jln.nnx.report(jln.nnx.replace(norms))
    assert report.replaced == {"0": "RMSNorm"}
    assert report.left == {
        "1": "no subclass of Final can be made: TypeError: it is final"
    }
    norms = nnx.List(
        [nnx.RMSNorm(FEATURES, rngs=nnx.Rngs(0)), Final(FEATURES, rngs=nnx.Rngs(0))]
    )
    with pytest.raises(TypeError, match="got Final at '1': TypeError: it is final"):
        jln.nnx.replace(norms, also={Final: lambda _, x: x})
    assert not jln.nnx.report(norms).replaced


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        *[(n, True) for n in ("Norm", "RMSNorm", "T5LayerNorm", "rms_norm", "Norm2")],
        *[(n, False) for n in ("Normal", "Normalizer", "NormalizingFlow", "Enormous")],
        *[(n, False) for n in ("BatchNorm1", "MyGroupNorm", "Abnormal")],
        *[(n, True) for n in ("RMSNormGated", "LayerNormalization")],
        *[(n, True) for n in ("Rmsnorm", "Prenorm", "LN", "AdaLN", "RMS")],
        *[(n, False) for n in ("MLN", "RMSProp", "VLNet")],
    ],
)
def test_names_that_look_like_a_norm(name, listed):
    kind = type(name, (nnx.Module,), {"__call__": lambda self, x: x})
    assert bool(jln.nnx.report(kind()).left) == listed


def in_a_thread(function):
    """What it returns, in a thread that ends with it, because contexts stay changed."""
    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_blocks_must_be_closed_in_the_reverse_order():
    def close_in_another_order():
        first, second = jln.linen.replace(), jln.linen.replace(custom_vjp=False)
        first.__enter__()
        second.__enter__()
        for block in (first, second):
            with pytest.raises(RuntimeError, match="closed in the reverse order of th"):
                block.__exit__(None, None, None)
        # Nothing is left of them: a function compiled in a block stays in that block.
        norm = jax.jit(nn.LayerNorm().apply)
        far = X + 1e5  # where Flax's norm is not accurate
        variables = nn.LayerNorm().init(jax.random.key(0), X)
        want = jax.jit(nn.LayerNorm().apply)(variables, far)
        with jln.linen.replace() as report:
            inside = norm(variables, far)
        assert report.replaced and (inside != want).any()
        assert_equal(norm(variables, far), want)

    in_a_thread(close_in_another_order)


def test_a_block_inside_one_that_was_closed_before_it_does_nothing_more():
    def close_the_middle():
        variables = nn.LayerNorm().init(jax.random.key(0), X)
        norm = jax.jit(nn.LayerNorm().apply)
        blocks = [jln.linen.replace(also={Scaled: compute_scaled}) for _ in range(3)]
        reports = [block.__enter__() for block in blocks]
        with pytest.raises(RuntimeError, match="still open do nothing more"):
            blocks.pop(1).__exit__(None, None, None)
        far = X + 1e5
        inside = norm(variables, far)
        for block in reversed(blocks):
            with pytest.raises(RuntimeError, match="in the reverse order"):
                block.__exit__(None, None, None)
        assert not any(report.replaced for report in reports)
        assert_equal(norm(variables, far), inside)

    in_a_thread(close_the_middle)


def test_a_block_must_be_closed_in_the_thread_that_opened_it():
    def open_and_close():
        block = jln.linen.replace()
        block.__enter__()
        with pytest.raises(RuntimeError, match="in the thread that opened it"):
            in_a_thread(lambda: block.__exit__(None, None, None))
        (open_still,) = _linen_replace._open.blocks
        open_still.contexts.close()

    in_a_thread(open_and_close)


class Sized(nn.Module):
    features: int = FEATURES
    path: str = "a field of this name"
    variables: str = "and of this one"

    def size(self):
        return self.features

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm")(x)


def test_modules_that_are_not_bound_and_fields_of_any_name_are_as_in_flax():
    variables = Sized().init(jax.random.key(0), X)
    want = Sized().apply(variables, X)
    with jln.linen.replace() as report:
        assert Sized().size() == FEATURES
        np.testing.assert_allclose(Sized().apply(variables, X), want, atol=1e-5)
    assert report.replaced == {"norm": "LayerNorm"}


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale, bias = self.param("weight", lambda _: (jnp.ones(FEATURES), jnp.ones(2)))
        return x * scale + bias[0]


def test_a_parameter_may_be_a_tuple():
    variables = Pair().init(jax.random.key(0), X)
    with jln.linen.replace() as report:
        assert_equal(jax.jit(Pair().apply)(variables, X), X + 1)
    assert not report.left
    holder = Plain()
    holder.weight = nnx.Param((jnp.ones(3), jnp.ones(2)))
    assert not jln.nnx.report(holder).left


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.constant(3.0)
        return jln.rms_norm({"scale": self.param("weight", ones, x.shape[-1:])}, x)


def compute_scaled(norm, x):
    return jln.rms_norm({"scale": norm.variables["params"]["weight"]}, x)


def test_parameters_that_a_call_makes_are_made():
    options = {"rngs": {"params": jax.random.key(0)}, "mutable": ["params"]}
    want = Scaled().apply({}, X, **options)
    with jln.linen.replace(also={Scaled: compute_scaled}):
        assert_equal(Scaled().apply({}, X, **options), want)
        with pytest.raises(KeyError, match="params"):
            Scaled().apply({}, X)
        with pytest.raises(KeyError, match="weight"):
            Scaled().apply({"params": {"wieght": jnp.ones(FEATURES)}}, X)


class OwnBridge(nnx.bridge.ToLinen):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + 1


def test_a_subclass_of_a_bridge_keeps_its_code():
    bridge = OwnBridge(nnx.LayerNorm, args=(FEATURES,))
    variables = bridge.init(jax.random.key(0), X)
    want = bridge.apply(variables, X)
    with jln.linen.replace() as report:
        np.testing.assert_allclose(bridge.apply(variables, X), want, atol=1e-5)
    assert list(report.replaced.values()) == ["LayerNorm"]


class Holder(nnx.Module):
    def __init__(self, norm, rngs=None):
        self.norm = norm

    def __call__(self, x):
        return self.norm(x)


def test_a_bridge_leaves_the_norms_that_it_is_given_as_they_were():
    norm = nnx.LayerNorm(FEATURES, rngs=nnx.Rngs(0))
    before = set(vars(norm))
    bridge = nnx.bridge.to_linen(Holder, norm)
    variables = bridge.init(jax.random.key(0), X)
    with jln.linen.replace() as report:
        bridge.apply(variables, X)
    assert list(report.replaced.values()) == ["LayerNorm"]
    assert type(norm) is nnx.LayerNorm and set(vars(norm)) == before


class Tree(nnx.Pytree):
    def __init__(self, rngs=None):
        self.weight = nnx.Param(jnp.ones(FEATURES))

    def __call__(self, x):
        return x * self.weight


def test_a_bridge_may_hold_what_is_no_module():
    with jln.linen.replace():
        y, _ = nnx.bridge.to_linen(Tree).init_with_output(jax.random.key(0), X)
    assert_equal(y, X)


class Marked(nnx.Module):
    def __init__(self):
        self._replaced = True

    def __call__(self, x):
        return x + 1


def test_an_attribute_of_the_users_is_no_mark_of_ours():
    model = jln.nnx.replace(Marked(), also={Marked: lambda _, x: 0 * x})
    assert_equal(model(X), 0 * X)


class Frozen(nnx.LayerNorm):
    def __setattr__(self, name, value):
        if name == "round_before_scale":
            raise AttributeError(f"frozen: {name}")
        super().__setattr__(name, value)


def test_if_one_norm_refuses_none_is_replaced():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.LayerNorm(FEATURES, rngs=rngs), Frozen(FEATURES, rngs=rngs)
    )
    before = [set(vars(norm)) for norm in model.layers]
    with pytest.raises(AttributeError, match="frozen: round_before_scale"):
        jln.nnx.replace(model)
    assert [type(norm) for norm in model.layers] == [nnx.LayerNorm, Frozen]
    assert [set(vars(norm)) for norm in model.layers] == before


def test_a_function_of_also_must_have_a_hash():
    @dataclasses.dataclass(frozen=True)
    class Compute:
        options: dict

        def __call__(self, norm, x):
            return x

    with pytest.raises(TypeError, match=r"hashable function.*unhashable type: 'dict'"):
        jln.nnx.replace(Plain(), also={Plain: Compute({})})


class Doubled(nnx.LayerNorm):
    def __call__(self, x, mask=None):
        return 2 * super().__call__(x)


def test_a_pickle_names_the_public_modules():
    model = jln.nnx.replace(Doubled(FEATURES, rngs=nnx.Rngs(0)))
    pickled = pickle.dumps(model)
    named = {
        argument
        for opcode, argument, _ in pickletools.genops(pickled)
        if opcode.name.endswith("UNICODE") and str(argument).startswith("jax_layernorm")
    }
    assert named == {"jax_layernorm.nnx"}
    assert_equal(pickle.loads(pickled)(X), model(X))
