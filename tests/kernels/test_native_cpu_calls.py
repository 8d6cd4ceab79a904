"""Raw calls of the CPU kernel: a wrong buffer is an error that names it, not a crash."""

from typing import NamedTuple

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_layernorm._kernels import _library


@pytest.fixture(autouse=True)
def built():
    implementations.needed("native_cpu")


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


class Call(NamedTuple):
    """A raw call of a handler, with the buffers by name."""

    handler: str
    operands: dict
    results: dict
    attributes: dict

    def run(self):
        operands = [jnp.ones(a.shape, a.dtype) for a in self.operands.values()]
        call = jax.ffi.ffi_call(self.handler, list(self.results.values()))
        results = jax.block_until_ready(call(*operands, **self.attributes))
        return dict(zip(self.results, results, strict=True))

    def fails(self, message):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            self.run()


MATRIX, ROW, STATISTIC = array(4, 8), array(1, 8), array(4)
STATISTICS = dict.fromkeys(("mean", "mean_low", "rstd"), STATISTIC)
CALLS = {
    "forward": Call(
        _library.CPU_FORWARD,
        {"x": MATRIX, "residual": MATRIX, "scale": ROW, "bias": ROW},
        {"y": MATRIX, "residual_out": MATRIX} | STATISTICS,
        {
            "center": True,
            "round_before_scale": False,
            "round_product": False,
            "round_sum": False,
            "has_residual": True,
            "has_scale": True,
            "has_bias": True,
            "with_statistics": True,
            "epsilon": np.float64(1e-6),
            "scale_offset": np.float64(0),
        },
    ),
    "backward": Call(
        _library.CPU_BACKWARD,
        {"x": MATRIX, "scale": ROW}
        | STATISTICS
        | {"dy": MATRIX, "dresidual_out": MATRIX}
        | {"dmean": STATISTIC, "drstd": STATISTIC},
        {"dx": MATRIX, "dscale": ROW, "dbias": ROW},
        {
            "center": True,
            "round_before_scale": False,
            "has_scale": True,
            "has_dresidual_out": True,
            "has_dmean": True,
            "has_drstd": True,
            "with_dx": True,
            "with_dscale": True,
            "with_dbias": True,
            "scale_offset": np.float64(0),
        },
    ),
}
WRONG = (
    ("forward", "x", array(4, 8, dtype="int32"), "x in F32, BF16, F16 or F64; got S32"),
    (
        "forward",
        "x",
        array(32),
        r"x of shape \(rows, features\), both above 0; got F32 of",
    ),
    ("forward", "x", array(1, 4, 8), r"x of shape \(rows, features\), .* \(1, 4, 8\)"),
    ("forward", "x", array(0, 8), r"x of shape \(rows, features\), .* \(0, 8\)"),
    (
        "forward",
        "residual",
        array(4, 7),
        r"residual of shape \(4, 8\); got .* \(4, 7\)",
    ),
    ("forward", "scale", array(1, 7), r"scale of shape \(groups, 8\), .* \(1, 7\)"),
    ("forward", "scale", array(8), r"scale of shape \(groups, 8\), .* got F32 of"),
    ("forward", "scale", array(3, 8), r"groups divides 4; got .* \(3, 8\)"),
    ("forward", "scale", array(0, 8), r"groups divides 4; got .* \(0, 8\)"),
    ("forward", "bias", array(1, 8, dtype="complex64"), "needs bias in F32.* got C64"),
    ("forward", "y", array(5, 8), r"needs y of shape \(4, 8\); got F32 .* \(5, 8\)"),
    ("forward", "y", array(4, 8, dtype="uint8"), "needs y in F32.* got U8"),
    ("forward", "residual_out", array(4, 8, dtype="float16"), "out in F32; got F16"),
    ("forward", "mean", array(3), r"needs mean of shape \(4\); got F32 of shape \(3\)"),
    ("forward", "mean_low", array(4, dtype="bfloat16"), "mean_low in F32; got BF16"),
    ("forward", "rstd", array(4, 1), r"needs rstd of shape \(4\); got .* \(4, 1\)"),
    ("backward", "x", array(8), r"needs x of shape \(rows, features\)"),
    ("backward", "scale", array(3, 8), r"needs scale of shape \(groups, 8\)"),
    ("backward", "mean", array(4, dtype="float16"), "needs mean in F32; got F16"),
    ("backward", "mean_low", array(4, 8), r"needs mean_low of shape \(4\)"),
    ("backward", "rstd", array(8), r"needs rstd of shape \(4\)"),
    ("backward", "dy", array(4, 8, dtype="int8"), "needs dy in F32, BF16, F16 or F64"),
    ("backward", "dresidual_out", array(4, 8, dtype="float16"), "out in F32; got F16"),
    ("backward", "dmean", array(5), r"needs dmean of shape \(4\)"),
    ("backward", "drstd", array(4, dtype="bfloat16"), "needs drstd in F32; got BF16"),
    ("backward", "dx", array(4, 8, dtype="float16"), "needs dx in F32; got F16"),
    ("backward", "dscale", array(8), r"needs dscale of shape \(groups, 8\)"),
    ("backward", "dbias", array(1, 8, dtype="float16"), "needs dbias in F32; got F16"),
)


def test_the_right_buffers_are_taken():
    forward = CALLS["forward"].run()
    np.testing.assert_array_equal(forward["y"], np.ones((4, 8)))
    np.testing.assert_array_equal(forward["residual_out"], np.full((4, 8), 2))
    np.testing.assert_array_equal(forward["mean"], np.full(4, 2))
    backward = CALLS["backward"].run()
    np.testing.assert_array_equal(backward["dbias"], np.full((1, 8), 4))


@pytest.mark.parametrize(("operation", "name", "wrong", "message"), WRONG)
def test_a_buffer_that_does_not_fit_is_an_error(operation, name, wrong, message):
    call = CALLS[operation]
    side = "operands" if name in call.operands else "results"
    buffers = getattr(call, side) | {name: wrong}
    call._replace(**{side: buffers}).fails(message)


@pytest.mark.parametrize("side", ("operand", "result"))
@pytest.mark.parametrize("operation", CALLS)
def test_a_wrong_number_of_buffers_is_an_error(operation, side):
    call = CALLS[operation]
    buffers = getattr(call, f"{side}s")
    *first, last = buffers
    fewer = {name: buffers[name] for name in first}
    call._replace(**{f"{side}s": fewer}).fails(
        f"did not get the {side} {last}; it got {len(fewer)} {side}s"
    )
    more = buffers | {"another": MATRIX}
    call._replace(**{f"{side}s": more}).fails(
        f"got {len(more)} {side}s; its attributes describe {len(buffers)}"
    )


@pytest.mark.parametrize(
    ("operation", "attribute", "absent"),
    (
        ("forward", "has_residual", ("residual", "residual_out")),
        ("forward", "has_scale", ("scale",)),
        ("forward", "has_bias", ("bias",)),
        ("forward", "with_statistics", ("mean", "mean_low", "rstd")),
        ("forward", "center", ("mean", "mean_low")),
        ("backward", "has_scale", ("scale",)),
        ("backward", "has_dresidual_out", ("dresidual_out",)),
        ("backward", "has_dmean", ("dmean",)),
        ("backward", "has_drstd", ("drstd",)),
        ("backward", "with_dscale", ("dscale",)),
        ("backward", "with_dbias", ("dbias",)),
        ("backward", "center", ("mean", "mean_low")),
    ),
)
def test_each_attribute_leaves_out_its_buffers(operation, attribute, absent):
    call = CALLS[operation]
    call = call._replace(attributes=call.attributes | {attribute: False})
    call.fails("need|describe")  # with all buffers
    operands, results = (
        {name: a for name, a in side.items() if name not in absent}
        for side in (call.operands, call.results)
    )
    assert (
        call._replace(operands=operands, results=results).run().keys() == results.keys()
    )


def test_dscale_and_dbias_have_groups_of_rows_that_nest():
    call = CALLS["backward"]
    rows = {name: array(6, *a.shape[1:]) for name, a in call.operands.items()}
    call = call._replace(operands=rows | {"scale": ROW})

    def grouped(dscale, dbias):
        shapes = {
            "dx": array(6, 8),
            "dscale": array(dscale, 8),
            "dbias": array(dbias, 8),
        }
        return call._replace(results=shapes)

    grouped(6, 2).run()
    grouped(2, 3).fails("rows that nest; got 2 groups of dscale and 3 of dbias")


@pytest.mark.parametrize("operation", CALLS)
def test_attributes_are_bound_by_name(operation):
    call = CALLS[operation]
    renamed = {k.replace("has_scale", "scale"): v for k, v in call.attributes.items()}
    call._replace(attributes=renamed).fails("has_scale")
    call._replace(attributes=call.attributes | {"other": True}).fails("attributes")
