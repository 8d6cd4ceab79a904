"""`import jax_layernorm` is light, and needs Flax only where Flax is asked for."""

import subprocess
import sys

import pytest

import jax_layernorm as jln

PUBLIC = {"layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "init_params"}
NO_FLAX = """
import sys

class NoFlax:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flax":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoFlax())
"""
HEAVY = """
def heavy():
    parts = ("flax", "orbax", "optax", "pallas", "triton", "jaxtyping", "torch")
    return {m for m in sys.modules if any(part in m.split(".") for part in parts)}
"""


def run(script):
    """What `script` prints in a fresh interpreter, where a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_functions_work_without_flax():
    printed = run(
        NO_FLAX
        + """
import jax, jax_layernorm as jln
params, x = jln.init_params(4), jax.numpy.arange(4.0)
print(jax.grad(lambda p: jln.layer_norm(p, x).sum())(params)["bias"])
print(jln.rms_norm({}, x).shape, jln.add_rms_norm({}, x, x)[1])
"""
    )
    assert printed == "[1. 1. 1. 1.]\n(4,) [0. 2. 4. 6.]\n"


def test_dir_has_what_loads_on_first_use():
    on_first_use = {"convert", "linen", "nnx"}
    assert {*PUBLIC, "explain", "Statistics", "__version__"} | on_first_use <= {
        *dir(jln)
    }


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_modules_without_flax_are_an_import_error_that_names_it(name):
    printed = run(
        NO_FLAX
        + f"""
import jax_layernorm
for statement in ("jax_layernorm.{name}", "from jax_layernorm import {name}"):
    try:
        exec(statement)
    except ImportError as error:
        print("flax" in str(error), error.name.partition(".")[0])
"""
    )
    assert printed == "True flax\nTrue flax\n"


def test_import_loads_neither_flax_nor_a_kernel_language():
    # jax.extend, whose Primitive the package uses, itself loads a little of Pallas.
    printed = run(
        f"""
import sys, jax, jax.extend.core, jax.interpreters.mlir
{HEAVY}
before = heavy()
import jax_layernorm
print(sorted(heavy() - before))
import jax_layernorm.linen
print("flax" in heavy())
"""
    )
    assert printed == "[]\nTrue\n"


def test_import_asks_no_device():
    printed = run(
        """
import jax_layernorm
from jax.extend import backend
import jax._src.xla_bridge as bridge
print(bridge.backends_are_initialized())
"""
    )
    assert printed == "False\n"


@pytest.mark.parametrize(
    "statement",
    [
        "module = jax_layernorm.{}",
        "from jax_layernorm import {} as module",
        "import jax_layernorm.{} as module",
    ],
)
def test_modules_load_on_first_use_however_they_are_named(statement):
    printed = run(
        f"""
import jax_layernorm, sys
for name in ("linen", "nnx"):
    print("jax_layernorm." + name in sys.modules)
    exec({statement!r}.format(name))
    print(module.LayerNorm.__module__, module.RMSNorm.__name__)
    print(module is getattr(jax_layernorm, name) is sys.modules["jax_layernorm." + name])
"""
    )
    assert printed == "".join(
        f"False\njax_layernorm.{name} RMSNorm\nTrue\n" for name in ("linen", "nnx")
    )


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'jax_layernorm' .* 'layernorm'"):
        jln.layernorm  # noqa: B018
    assert not hasattr(jln, "_nothing")
    with pytest.raises(ImportError, match="cannot import name 'layernorm'"):
        from jax_layernorm import layernorm  # noqa: F401
