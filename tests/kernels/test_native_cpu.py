"""The CPU kernel as XLA calls it: rows, threads, processes, versions, export.

`test_native_cpu_calls.py` tests the checks of its buffers. The tests of all
implementations cover its numbers, and so does `tests/kernels/native/driver.cc` in C++
(`make native`).
"""

import _ctypes
import ctypes
import functools
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType

import jax_layernorm as jln
from jax_layernorm._kernels import _library


@pytest.fixture(autouse=True)
def built():
    implementations.needed("native_cpu")


ours = functools.partial(jln.layer_norm, implementation="native_cpu")


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(params, x, dy, function=ours):
    y, vjp = jax.vjp(function, params, x)
    return y, vjp(dy)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ---- rows and groups of rows


@pytest.mark.parametrize("shift", (1, 2, 3, 5))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_rows_that_start_at_odd_addresses_are_right(dtype, shift):
    """If a row is `8 * k + shift` long, only the first is aligned to a vector."""
    x, dy = draw(37, 64 + shift, dtype=dtype), draw(37, 64 + shift, dtype=dtype, seed=1)
    params = jln.init_params(64 + shift)
    y, (dparams, dx) = jax.jit(gradients)(params, x, dy)
    expected = oracle.norm(x, **params, dy=dy)
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dparams["scale"], expected.dscale, summed=37)


@pytest.mark.parametrize("center", (True, False))
@pytest.mark.parametrize(
    ("scale", "bias"),
    (
        ((6, 1, 8), (6, 1, 8)),
        ((6, 5, 8), (6, 5, 8)),
        ((6, 5, 8), (8,)),
        ((6, 1, 8), (6, 5, 8)),
        ((8,), (6, 1, 8)),
    ),
    ids=str,
)
def test_parameters_of_groups_of_rows_are_summed_by_group(scale, bias, center):
    x, dy = draw(6, 5, 8), draw(6, 5, 8, seed=1)
    params = {"scale": draw(*scale, seed=2), "bias": draw(*bias, seed=3)}
    function = jln.layer_norm if center else jln.rms_norm
    function = functools.partial(function, implementation="native_cpu")
    y, (dparams, dx) = gradients(params, x, dy, function)
    expected = oracle.norm(x, **params, dy=dy, center=center)
    oracle.assert_close(y, expected.y, against=expected.y_size)
    oracle.assert_close(dx, expected.dx, against=expected.dx_size)
    oracle.assert_close(dparams["scale"], expected.dscale, against=expected.dscale_size)
    oracle.assert_close(dparams["bias"], expected.dbias, against=expected.dbias_size)


def test_gradients_of_single_examples_keep_the_kernel():
    params, x = jln.init_params(16), draw(5, 7, 16)

    def loss(params, x):
        return jnp.sum(jnp.sin(ours(params, x)))

    each = jax.vmap(jax.grad(loss), (None, 0))
    assert jax.jit(each).lower(params, x).as_text().count(_library.CPU_BACKWARD) == 1
    for i, one in enumerate(jnp.unstack(x)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            jax.tree.map(lambda a, i=i: a[i], each(params, x)),
            jax.grad(loss)(params, one),
        )


# ---- threads and processes

ON_SO_MANY_CORES = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
import hashlib, jax, jax.numpy as jnp, numpy as np, jax_layernorm as jln
rng, digest = np.random.default_rng(0), hashlib.sha256()
for rows, features in ((1037, 301), (3, 70000), (20000, 9), (4096, 768), (256, 4099)):
    x, dy = (jnp.asarray(rng.normal(size=(rows, features)) + 9, "float32") for _ in "xy")
    params = jln.init_params(features)
    norm = lambda p, x: jln.layer_norm(p, x, implementation="native_cpu")
    y, vjp = jax.vjp(norm, params, x)
    for leaf in jax.tree.leaves((y, vjp(dy))):
        digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest())
"""


def script(source, *arguments):
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_the_number_of_threads_changes_no_bit():
    assert script(ON_SO_MANY_CORES, "1") == script(ON_SO_MANY_CORES, "2")


def test_many_python_threads_at_once_get_the_same_bits():
    params, dy = jln.init_params(300), draw(700, 300, seed=1)
    run = jax.jit(gradients)
    inputs = [draw(700, 300, seed=seed) for seed in range(8)]
    expected = [bits(run(params, x, dy)) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda x: bits(run(params, x, dy)), inputs * 8)
        assert list(results) == expected * 8


def test_several_devices_run_it_at_once():
    """Inside `shard_map` on the 8 devices of the tests, which share one pool."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": jax.P("rows"), "out_specs": jax.P("rows")}
    norm = functools.partial(ours, jln.init_params(64))
    x = draw(8 * 1000, 64)
    split = jax.jit(jax.shard_map(norm, mesh=mesh, **specs))(x)
    np.testing.assert_array_equal(split, norm(x))


FORKED = """
import os, signal, time, jax, jax.numpy as jnp, jax_layernorm as jln
jax.config.update("jax_cpu_enable_async_dispatch", False)
norm = jax.jit(lambda x: jln.layer_norm({}, x, implementation="native_cpu"))
x = jnp.ones((4, 8))
norm(x).block_until_ready()
child = os.fork()
if child == 0:
    norm(x).block_until_ready()
    os._exit(0)
deadline = time.monotonic() + 3
while os.waitpid(child, os.WNOHANG) == (0, 0):
    if time.monotonic() > deadline:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        break
    time.sleep(0.1)
"""


def test_in_a_forked_process_the_kernel_returns_an_error():
    """XLA prints it, and then hangs, as it does after a fork without the kernel."""
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "in a fork of a process that had called it" in done.stderr


def test_a_fork_of_a_process_that_only_imported_the_package_may_compute():
    """As in a server that imports the application and then forks its workers."""
    script(
        """
import os, jax, jax.numpy as jnp, jax_layernorm as jln
child = os.fork()
if child == 0:
    y = jln.layer_norm({}, jnp.arange(32.0).reshape(4, 8), implementation="native_cpu")
    os._exit(not jnp.isfinite(y).all())
raise SystemExit(os.waitpid(child, 0)[1])
"""
    )


# ---- versions, and a machine without a compiler


def headers_of(version, folder):
    api = folder / "xla" / "ffi" / "api"
    api.mkdir(parents=True)
    major, minor = version
    text = f"#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n"
    (api / "c_api.h").write_text(text)
    return folder


@pytest.fixture
def unregistered(monkeypatch):
    def register(name, *_, **__):
        pytest.fail(f"{name} was registered")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("version", ((0, 0), (0, 2), (1, 0), (1, 9)))
def test_a_jaxlib_of_an_older_ffi_never_sees_the_library(version, tmp_path):
    reason = _library.load(_library.path(), headers_of(version, tmp_path))
    assert "needs version 0.3 of XLA's FFI" in reason
    assert f"has {version[0]}.{version[1]}" in reason


def test_a_library_from_before_its_sources_changed_is_known(tmp_path):
    """It would fail when a program runs, and not when the program is lowered."""
    library = ctypes.CDLL(str(_library.path()))
    assert not _library.is_old(library)  # beside its sources, or in a wheel without any
    assert not _library.is_old(library, tmp_path)
    for name in _library.HANDLERS:
        source = tmp_path / name
        source.parent.mkdir()
        source.write_text("changed since\n")
    assert _library.is_old(library, tmp_path)
    assert _library.is_old(ctypes.CDLL(None), tmp_path)  # has no such symbol


@pytest.mark.usefixtures("unregistered")
def test_the_reason_says_what_cannot_be_loaded_or_compared(tmp_path):
    assert "is not found in" in _library.load(_library.path(), tmp_path)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "does not load" in _library.load(broken, tmp_path)
    other = pathlib.Path(_ctypes.__file__)
    assert "is none of this package" in _library.load(other, tmp_path)


def test_the_version_is_that_of_the_headers_the_library_was_built_with():
    here = _library.ffi_api_version(pathlib.Path(jax.ffi.include_dir()))
    assert here is not None and here >= (0, 3)


@pytest.fixture
def fresh_choices():
    """Nothing that was decided before the test, or in it, is remembered after."""

    def forget():
        _library.not_loaded.cache_clear()
        jax.clear_caches()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_choices")
def test_on_a_machine_that_it_has_not_run_on_it_runs_by_name_only(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    x = draw(4, 24)
    choice = jln.explain({}, x)["cpu"]
    assert choice.implementation == "xla"
    assert "has not run on riscv64 yet" in choice.reasons["native_cpu"]
    named = jln.explain({}, x, implementation="native_cpu")["cpu"]
    assert named.implementation == "native_cpu"


def test_another_copy_of_the_library_is_not_registered(monkeypatch):
    """The CPU backend would fail with both."""
    monkeypatch.setattr(jax.ffi, _library.REGISTERED, "/elsewhere/library.so")
    reason = _library.load(_library.path(), pathlib.Path(jax.ffi.include_dir()))
    assert "another copy of the package, with the library /elsewhere/lib" in reason


@pytest.mark.usefixtures("fresh_choices")
def test_without_the_library_xla_runs_and_explain_says_why(monkeypatch):
    monkeypatch.setattr(_library, "LIBRARY", "no-such-library.so")
    x = draw(4, 24)
    choice = jln.explain({}, x)["cpu"]
    assert choice.implementation == "xla"
    assert "was not compiled" in choice.reasons["native_cpu"]
    oracle.assert_close(jln.layer_norm({}, x), oracle.norm(x).y)
    with pytest.raises(NotImplementedError, match="was not compiled"):
        ours({}, x)


SAVE_OR_RUN = """
import pickle, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import serialize_executable
import jax_layernorm as jln
x = np.arange(256, dtype="float32").reshape(4, 64)
if sys.argv[1] == "save":
    loss = lambda x: jnp.sum(jln.layer_norm(jln.init_params(64), x) ** 3)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x).compile()
    assert "jax_layernorm_backward" in compiled.as_text()
    pickle.dump(serialize_executable.serialize(compiled), open(sys.argv[2], "wb"))
else:
    compiled = serialize_executable.deserialize_and_load(
        *pickle.load(open(sys.argv[2], "rb")))
print(*(a.tobytes().hex() for a in map(np.asarray, jax.tree.leaves(compiled(x)))))
"""


def test_a_saved_executable_runs_in_another_process(tmp_path):
    path = str(tmp_path / "executable")
    assert script(SAVE_OR_RUN, "save", path) == script(SAVE_OR_RUN, "run", path)


FROM_THE_CACHE = """
import sys, jax, numpy as np, jax_layernorm as jln
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
x = np.arange(256, dtype="float32").reshape(4, 64)
norm = jax.jit(lambda x: jln.layer_norm({}, x, implementation="native_cpu"))
print(len(hits), np.asarray(norm(x)).tobytes().hex(), len(hits) > 0)
"""


def test_a_first_norm_may_come_from_the_persistent_cache(tmp_path):
    first, second = (script(FROM_THE_CACHE, str(tmp_path)).split() for _ in range(2))
    assert first == ["0", first[1], "False"]
    assert second == ["0", first[1], "True"]


# ---- export


def test_a_program_exported_with_the_kernel_as_the_default_holds_none_of_it():
    x = draw(4, 8)
    assert jln.explain({}, x)["cpu"].implementation == "native_cpu"
    norm = jax.jit(lambda x: jln.layer_norm({}, x))
    assert _library.CPU_FORWARD in norm.lower(x).as_text()
    exported = export.export(norm, platforms=("cpu", "cuda", "tpu"))(x)
    assert _library.CPU_FORWARD not in exported.mlir_module()
    y = export.deserialize(exported.serialize()).call(x)
    oracle.assert_close(y, oracle.norm(x).y)


def test_a_named_kernel_refuses_to_be_exported_and_says_what_would_be_needed():
    norm = jax.jit(functools.partial(ours, {}))
    with pytest.raises(NotImplementedError, match=r"DisabledSafetyCheck\.custom_call"):
        export.export(norm, platforms=("cpu",))(draw(4, 8))
