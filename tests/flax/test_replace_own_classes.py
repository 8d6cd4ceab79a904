"""`also=` and reports: classes that share a `__call__`, names, and subclasses."""

import threading

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx
from flax_cases import FEATURES, assert_equal, draw

import jax_layernorm as jln

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


def test_blocks_must_be_closed_in_the_reverse_order():
    """In a thread, because JAX's contexts do not come back if they are not."""
    errors = []

    def close_in_another_order():
        first, second = jln.linen.replace(), jln.linen.replace()
        first.__enter__()
        second.__enter__()
        try:
            first.__exit__(None, None, None)
        except RuntimeError as error:
            errors.append(error)
        second.__exit__(None, None, None)

    thread = threading.Thread(target=close_in_another_order)
    thread.start()
    thread.join()
    assert [str(error)[:61] for error in errors] == [
        "blocks of replace() must be closed in the reverse order of th"
    ]
