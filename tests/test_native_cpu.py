"""The CPU kernel at its edges: what XLA passes, alignments, threads, forks, versions."""

import functools
import os
import pathlib
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_layernorm as jln
from jax_layernorm._kernels import native_cpu

ROWS, FEATURES = 6, 40
F32, F16, I32 = np.float32, np.float16, np.int32


@pytest.fixture(autouse=True)
def _needed():
    implementations.needed("native_cpu")


def forward_call(operands, results, *, has="sb", center=True):
    call = jax.ffi.ffi_call(
        native_cpu.FORWARD, [jax.ShapeDtypeStruct(*result) for result in results]
    )
    given = [jnp.zeros(shape, dtype) for shape, dtype in operands]
    return call(*given, has=has, center=center, epsilon=1e-6, scale_offset=0.0)


def backward_call(operands, results, *, has="sSB", center=True):
    call = jax.ffi.ffi_call(
        native_cpu.BACKWARD, [jax.ShapeDtypeStruct(*result) for result in results]
    )
    given = [jnp.zeros(shape, dtype) for shape, dtype in operands]
    return call(*given, has=has, center=center, scale_offset=0.0)


MATRIX, PARAM, STAT = ((ROWS, FEATURES), F32), ((1, FEATURES), F32), ((ROWS,), F32)
FORWARD = ([MATRIX, PARAM, PARAM], [MATRIX])
BACKWARD = ([MATRIX, PARAM, STAT, STAT, STAT, MATRIX], [MATRIX, PARAM, PARAM])


def test_the_calls_that_the_tests_below_spoil_are_right():
    forward_call(*FORWARD)
    backward_call(*BACKWARD)


SPOILED = [
    ("x of integers", FORWARD, 0, ((ROWS, FEATURES), I32), "got x of"),
    ("x of rank 1", FORWARD, 0, ((ROWS,), F32), "got x of"),
    ("x of rank 3", FORWARD, 0, ((1, ROWS, FEATURES), F32), "got x of"),
    ("scale too short", FORWARD, 1, ((1, FEATURES - 1), F32), "got scale of"),
    ("scale of rank 1", FORWARD, 1, ((FEATURES,), F32), "got scale of"),
    (
        "groups of rows that do not fit",
        FORWARD,
        1,
        ((4, FEATURES), F32),
        "got scale of",
    ),
    ("y too long", FORWARD, 3, ((ROWS + 1, FEATURES), F32), "got y of"),
    ("y of integers", FORWARD, 3, ((ROWS, FEATURES), I32), "got y of"),
    ("mean too short", BACKWARD, 2, ((ROWS - 1,), F32), "got mean of"),
    ("mean of another dtype", BACKWARD, 2, ((ROWS,), F16), "does not follow"),
    ("dy of other features", BACKWARD, 5, ((ROWS, 2 * FEATURES), F32), "got dy of"),
    ("dx of another dtype", BACKWARD, 6, ((ROWS, FEATURES), F16), "does not follow"),
    ("dscale of another dtype", BACKWARD, 7, ((1, FEATURES), F16), "does not follow"),
    ("groups that cross", BACKWARD, (7, 8), (2, 3), "groups of rows that cross"),
]


@pytest.mark.parametrize("case", SPOILED, ids=lambda case: case[0])
def test_a_buffer_that_does_not_fit_is_an_error_and_no_crash(case):
    _, (operands, results), which, wrong, message = case
    arrays = [*operands, *results]
    if isinstance(which, tuple):
        for i, groups in zip(which, wrong, strict=True):
            arrays[i] = ((groups, FEATURES), F32)
    else:
        arrays[which] = wrong
    call = forward_call if len(operands) == 3 else backward_call
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(arrays[: len(operands)], arrays[len(operands) :]))


@pytest.mark.parametrize(
    ("has", "message"),
    (("s", "more operands"), ("sbr", "got residual"), ("sbm", "was not given")),
)
def test_operands_and_results_that_were_not_told_of_are_an_error(has, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(forward_call(*FORWARD, has=has))


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=300, check=False
    )


BITS = """
    import os, sys
    cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
    os.sched_setaffinity(0, cores)
    import hashlib, jax, jax.numpy as jnp, numpy as np
    import jax_layernorm as jln
    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    for rows, features in ((2051, 301), (3, 70000), (20000, 9)):
        x, dy = rng.normal(size=(2, rows, features)).astype(np.float32) + 30
        params = {"scale": rng.normal(size=features).astype(np.float32)}
        @jax.jit
        def run(params, x, dy):
            norm = lambda p, x: jln.layer_norm(p, x, implementation="native_cpu")
            y, vjp = jax.vjp(norm, params, x)
            return y, vjp(dy)
        for out in jax.tree.leaves(run(params, x, dy)):
            digest.update(np.asarray(out).tobytes())
    print(digest.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    """XLA's pool has as many as the process has cores."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, or no way to keep to one")
    one, many = (run_python(BITS, n) for n in ("1", "64"))
    assert one.returncode == many.returncode == 0, one.stderr + many.stderr
    assert one.stdout == many.stdout != ""


def test_many_python_threads_at_once_get_what_one_gets():
    rng = np.random.default_rng(0)
    problems = [
        jnp.asarray(rng.normal(size=(500 + 30 * i, 300)), "float32") for i in range(4)
    ]
    run = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jln.layer_norm({}, x)))))
    expected = [np.asarray(run(x)) for x in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: np.asarray(run(problems[i % 4])), range(200)))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[i % 4])


def test_in_a_fork_it_returns_an_error_and_does_not_hang():
    """XLA's own calls may hang there; the handler, if it is ever reached, may not."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    found = run_python(
        """
        import ctypes, os, sys
        import jax
        from jax_layernorm._kernels import native_cpu

        assert native_cpu._not_loaded() is None
        library = ctypes.CDLL(native_cpu._library())
        forked = library.jax_layernorm_forked
        assert forked() == 0
        child = os.fork()
        if child == 0:
            os._exit(10 + forked())
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
        """
    )
    assert found.stdout.strip() == "11", found.stderr


def test_importing_loads_no_library():
    found = run_python(
        """
        import sys
        import jax_layernorm
        from jax_layernorm._kernels import native_cpu
        assert native_cpu._not_loaded.cache_info().currsize == 0
        maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
        assert native_cpu.LIBRARY not in maps
        """
    )
    assert found.returncode == 0, found.stderr


def headers(folder, major, minor):
    file = folder / "xla" / "ffi" / "api" / "c_api.h"
    file.parent.mkdir(parents=True)
    file.write_text(
        f"#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n"
    )
    return folder


def test_a_library_built_for_a_newer_jaxlib_is_refused_before_it_is_registered(
    tmp_path, monkeypatch
):
    def never(*args, **kwargs):
        raise AssertionError("registered")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", never)
    library = pathlib.Path(native_cpu._library())
    for spoken in ((0, 0), (99, 0)):
        path = headers(tmp_path / str(spoken[0]), *spoken)
        reason = native_cpu._load(library, path)
        assert "build it against an older one" in reason
        assert f"this jaxlib has {spoken[0]}.{spoken[1]}" in reason
    assert "is not found" in native_cpu._load(library, tmp_path / "nowhere")


def test_what_is_no_library_is_a_reason_and_no_exception(tmp_path):
    broken = tmp_path / native_cpu.LIBRARY
    broken.write_text("this is no library")
    assert "does not load" in native_cpu._load(broken, pathlib.Path("unused"))


def test_a_program_for_export_takes_the_xla_form():
    from jax import export

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), "float32")
    params = jln.init_params(64)

    def run(params, x):
        y, vjp = jax.vjp(jln.layer_norm, params, x)
        return y, vjp(y)

    assert jln.explain(params, x)["cpu"].implementation == "native_cpu"
    exported = export.export(jax.jit(run))(params, x)
    assert "jax_layernorm_forward" not in exported.mlir_module()
    again = export.deserialize(exported.serialize()).call(params, x)
    for a, b in zip(*map(jax.tree.leaves, (again, run(params, x))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    named = functools.partial(jln.layer_norm, implementation="native_cpu")
    with pytest.raises(NotImplementedError, match=r"DisabledSafetyCheck\.custom_call"):
        export.export(jax.jit(named))(params, x)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "float64"))
@pytest.mark.parametrize("features", (1, 3, 16, 100, 768, 5000))
def test_a_constant_row_gives_exactly_the_bias(dtype, features):
    """Of whatever value, so that a row that rounding made constant has no gradient."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200)
    if dtype == "float16":
        values = rng.normal(size=200) * 10.0 ** rng.integers(-6, 4, 200)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (200, features))
        wide = jnp.promote_types(dtype, "float32")
        params = {
            k: jnp.asarray(rng.normal(size=features), wide) for k in ("scale", "bias")
        }
        dy = jnp.asarray(rng.normal(size=x.shape), dtype)
        norm = functools.partial(jln.layer_norm, implementation="native_cpu")
        y, vjp = jax.vjp(norm, params, x)
        dparams, _ = vjp(dy)
        bias = jnp.broadcast_to(params["bias"].astype(dtype), x.shape)
    np.testing.assert_array_equal(
        np.asarray(y, np.float64), np.asarray(bias, np.float64)
    )
    np.testing.assert_array_equal(dparams["scale"], np.zeros(features))
