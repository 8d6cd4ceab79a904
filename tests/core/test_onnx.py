"""ONNX's test tables for its two operators pass: 19 node tests of each.

The onnx wheel computes them with NumPy when its modules of cases are imported.

References:
  https://onnx.ai/onnx/operators/onnx__LayerNormalization.html
  https://onnx.ai/onnx/operators/onnx__RMSNormalization.html
"""

import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as cases
from onnx.backend.test.case.node import (  # noqa: F401  they fill the list of cases
    layernormalization,
    rmsnormalization,
)

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion")

OPERATORS = {"LayerNormalization": jln.layer_norm, "RMSNormalization": jln.rms_norm}
TABLES = {
    case.name: case
    for case in cases._NodeTestCases
    if case.model.graph.node[0].op_type in OPERATORS  # others expand the operator
}


def attributes_of(model):
    """The node's attributes, with the operator's defaults for those left out."""
    (node,), (opset,) = model.graph.node, model.opset_import
    schema = onnx.defs.get_schema(node.op_type, opset.version)
    given = {a.name: a for a in node.attribute}
    return {
        name: onnx.helper.get_attribute_value(given.get(name, attribute.default_value))
        for name, attribute in schema.attributes.items()
    }


@pytest.mark.parametrize("operator", OPERATORS)
def test_there_are_19_tables_of_each_operator(operator):
    operators = [case.model.graph.node[0].op_type for case in TABLES.values()]
    assert operators.count(operator) == 19


@pytest.mark.parametrize("name", TABLES)
def test_each_output_is_that_of_the_table(name):
    model = TABLES[name].model
    ((inputs, outputs),) = TABLES[name].data_sets
    (node,) = model.graph.node
    attributes = attributes_of(model)
    assert attributes.keys() == {"axis", "epsilon", "stash_type"}
    assert attributes["stash_type"] == onnx.TensorProto.FLOAT  # of the statistics
    x, *params = inputs
    y, statistics = OPERATORS[node.op_type](
        dict(zip(("scale", "bias"), params, strict=False)),
        x,
        axis=tuple(range(attributes["axis"] % x.ndim, x.ndim)),
        epsilon=attributes["epsilon"],
        return_statistics=True,
    )
    names = ("Y", "Mean", "InvStdDev")[: 3 if len(params) == 2 else 1]
    assert tuple(node.output) == names
    actual = map(np.asarray, (y, *statistics)[: len(names)])
    for ours, theirs in zip(actual, outputs, strict=True):
        # The tables are float32 and ask for 1e-3; this is a few units of float32.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6, strict=True)
