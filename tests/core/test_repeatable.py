"""The same inputs give the same bits in every run, jitted or not, from any thread.

In a hand-written kernel, a row gives the same bits whatever the other rows are.
"""

import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion")

FUNCTIONS = (jln.layer_norm, jln.rms_norm, jln.add_layer_norm, jln.add_rms_norm)
RUNS = 20


def draw(function, shape, *, dtype="float32", masked=False, seed=0):
    """Arguments of a call at a mean of 30 standard deviations, and a cotangent of y."""
    rng = np.random.default_rng(seed)
    scale, bias = rng.normal(size=(2, shape[-1]))
    arrays = rng.normal(size=(2 if function.__name__.startswith("add_") else 1, *shape))
    dy = jnp.asarray(rng.normal(size=shape), dtype)
    mask = jnp.asarray(rng.random(shape) < 0.7) if masked else None
    params = {"scale": jnp.asarray(scale, "float32"), "bias": jnp.asarray(bias, dtype)}
    return params, tuple(jnp.asarray(a + 30, dtype) for a in arrays), mask, dy


def forward(function, params, arrays, mask):
    return function(params, *arrays, mask=mask, return_statistics=True)


def gradients(function, params, arrays, mask, dy):
    """What the function returns, then the gradients, with cotangents for all of it."""
    out, vjp = jax.vjp(lambda p, a: forward(function, p, a, mask), params, arrays)
    return out, vjp((dy, *jax.tree.map(jnp.cos, out[1:])))


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        np.testing.assert_array_equal(a.view(unsigned), b.view(unsigned), strict=True)


def label(value):
    return value.__name__


@pytest.mark.parametrize(
    ("function", "dtype", "masked", "shape"),
    (
        (jln.layer_norm, "float32", False, (257, 301)),
        (jln.layer_norm, "bfloat16", True, (7, 5, 97)),
        (jln.rms_norm, "bfloat16", False, (257, 301)),
        (jln.rms_norm, "float32", True, (7, 5, 97)),
        (jln.add_layer_norm, "float32", True, (257, 301)),
        (jln.add_layer_norm, "bfloat16", False, (7, 5, 97)),
        (jln.add_rms_norm, "bfloat16", True, (257, 301)),
        (jln.add_rms_norm, "float32", False, (7, 5, 97)),
    ),
)
def test_twenty_runs_give_the_same_bits_jitted_or_not(function, shape, dtype, masked):
    """Jitted, both passes are one program; otherwise, each pass is a program."""
    *arguments, dy = draw(function, shape, dtype=dtype, masked=masked)
    jitted = jax.jit(functools.partial(gradients, function))
    first = jitted(*arguments, dy)
    for i in range(RUNS):
        assert_same_bits(jitted(*arguments, dy), first)
        if i % 5 == 0:  # op by op takes long
            assert_same_bits(gradients(function, *arguments, dy), first)
    alone = forward(function, *arguments)
    assert_same_bits(alone, first[0])
    assert_same_bits(jax.jit(functools.partial(forward, function))(*arguments), alone)


@pytest.mark.parametrize("function", FUNCTIONS, ids=label)
def test_a_mask_known_to_the_compiler_gives_the_same_bits(function):
    params, arrays, mask, dy = draw(function, (65, 97), masked=True)
    constant = jax.jit(lambda p, a, dy: gradients(function, p, a, mask, dy))
    assert_same_bits(
        constant(params, arrays, dy), gradients(function, params, arrays, mask, dy)
    )


@pytest.mark.parametrize(
    ("jit", "threads"), ((True, 8), (False, 2)), ids=("jitted", "not jitted")
)
@pytest.mark.parametrize("function", FUNCTIONS[::3], ids=label)
def test_callers_in_several_threads_get_the_same_bits(function, jit, threads):
    run = functools.partial(gradients, function)
    run = jax.jit(run) if jit else run
    problems = [
        draw(function, (129, 97), masked=masked, seed=seed)
        for masked, seed in itertools.product((False, True), range(4))
    ]
    expected = [run(*arguments) for arguments in problems]
    times = RUNS if jit else 4
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda arguments: run(*arguments), problems * times))
    for result, one in zip(results, expected * times, strict=True):
        assert_same_bits(result, one)


@pytest.mark.parametrize(
    ("jit", "threads"), ((True, 8), (False, 2)), ids=("jitted", "not jitted")
)
def test_first_calls_at_once_compile_and_agree(jit, threads):
    """Each thread calls every function, and each starts with a different one."""
    features = 100 + 10 * threads + jit  # a shape that no other test has compiled
    problems = [(f, *draw(f, (33, features), masked=True)) for f in FUNCTIONS]
    run = jax.jit(gradients, static_argnums=0) if jit else gradients
    start = threading.Barrier(threads)

    def caller(number):
        start.wait()
        first = number % len(problems)
        results = [run(*problem) for problem in problems[first:] + problems[:first]]
        return results[len(problems) - first :] + results[: len(problems) - first]

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(caller, range(threads)))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize(
    ("function", "features", "dtype"),
    (
        (jln.add_layer_norm, 5, "float32"),
        (jln.add_rms_norm, 768, "float32"),
        (jln.add_layer_norm, 768, "bfloat16"),
        (jln.add_layer_norm, 1025, "float32"),
        (jln.add_rms_norm, 17000, "bfloat16"),
        (jln.add_layer_norm, 17000, "float32"),
    ),
)
def test_the_bits_of_a_row_do_not_depend_on_the_other_rows(function, features, dtype):
    """Nor on how many there are; the CPU kernel takes up to four rows together."""
    implementations.needed("native_cpu")
    function = functools.partial(function, implementation="native_cpu")
    rows = 11
    params, arrays, _, dy = draw(FUNCTIONS[2], (rows, features), dtype=dtype)

    def of_rows(params, arrays, dy):
        def norm(arrays):
            return function(params, *arrays, return_statistics=True)

        out, vjp = jax.vjp(norm, arrays)
        return out, vjp((dy, *jax.tree.map(jnp.cos, out[1:])))

    run = jax.jit(of_rows)
    whole = run(params, arrays, dy)
    for first, count in ((10, 1), (3, 2), (8, 3), (1, 4), (2, 7)):
        some = functools.partial(jax.lax.slice_in_dim, start_index=first,
                                 limit_index=first + count)  # fmt: skip
        alone = run(params, *jax.tree.map(some, (arrays, dy)))
        assert_same_bits(alone, jax.tree.map(some, whole))
