"""All arguments, alone and together, against float64 NumPy; and what must not matter.

Compiling takes nearly all the time, so hypothesis varies what a compiled program takes:
values, their offset and spread, masks, and the values behind the masks. The programs are
the `POOL`, a table in which every two values of any two columns meet.
"""

import functools
import itertools
import random
from typing import Any, NamedTuple

import implementations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_layernorm as jln

pytestmark = pytest.mark.usefixtures("strict_promotion")

FUNCTIONS = {
    "layer_norm": jln.layer_norm,
    "rms_norm": jln.rms_norm,
    "add_layer_norm": jln.add_layer_norm,
    "add_rms_norm": jln.add_rms_norm,
}
LAYOUTS = (  # shape of x, axis
    ((5, 8), -1),
    ((24,), 0),
    ((2, 3, 64), (-1,)),
    ((6, 1), 1),
    ((8, 3), 0),
    ((3, 8, 4), -2),
    ((3, 4, 8), (1, 2)),
    ((3, 4, 8), (-1, 0)),
    ((2, 3, 4, 5), (3, -3)),
    ((2, 5, 3), (1, -3, -1)),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
PARAMS = ("none", "scale", "bias", "both", "broadcast")
MASKS = ("none", "full", "rows", "trailing")


class Signature(NamedTuple):
    """What is compiled; the first row of the pool has these defaults.

    `broadcast` parameters have the rank of `x`. If all axes are normalized, they cannot
    be broadcast, and the row has both parameters in the normalized shape.
    """

    function: str = "layer_norm"
    layout: tuple[Any, Any] = LAYOUTS[0]
    x: str = "float32"
    residual: str = "float32"  # of the `add_*` only
    params: str = "both"
    param: str = "float32"
    mask: str = "none"
    dtype: str | None = None
    scale_offset: float = 0.0
    epsilon: float = 1e-6
    return_statistics: bool = False

    def __str__(self):
        return "-".join(map(str, self)).replace(" ", "")

    @property
    def adds(self):
        return self.function.startswith("add_")

    @property
    def dtypes(self):
        return {self.x, self.param, self.dtype, self.residual if self.adds else None}

    @property
    def normalized_dtype(self):
        """The dtype of the sum, or of `x` if there is no residual."""
        with jax.numpy_dtype_promotion("standard"):
            return jnp.promote_types(self.x, self.residual if self.adds else self.x)

    @property
    def options(self):
        return {
            "axis": self.layout[1],
            "epsilon": self.epsilon,
            "scale_offset": self.scale_offset,
        }


COLUMNS = Signature(
    function=tuple(FUNCTIONS),
    layout=LAYOUTS,
    x=DTYPES,
    residual=DTYPES,
    params=PARAMS,
    param=DTYPES,
    mask=MASKS,
    dtype=(None, *DTYPES),
    scale_offset=(0.0, 1.0),
    epsilon=(1e-6, 1e-2),
    return_statistics=(False, True),
)


ALONE = (
    {},
    {"function": "add_layer_norm"},
    {"layout": ((3, 4, 8), (-1, 0))},
    {"params": "broadcast"},
    {"mask": "full"},
    {"return_statistics": True},
)


def pool():
    """The features of `ALONE`; then all pairs of values of `COLUMNS`, greedily."""
    rng = random.Random(111)
    rows = [Signature(**feature) for feature in ALONE]
    columns = list(enumerate(COLUMNS))
    missing = {
        ((i, v), (j, w))
        for (i, a), (j, b) in itertools.combinations(columns, 2)
        for v, w in itertools.product(a, b)
    }
    missing = dict.fromkeys(sorted(missing, key=repr))  # a set with an order
    for row in rows:
        _met_in(row, missing)
    while missing:
        row = dict(next(iter(missing)))
        for i, values in rng.sample(columns, len(columns)):
            if i not in row:
                meets = {
                    v: sum(_pair((i, v), other) in missing for other in row.items())
                    for v in rng.sample(values, len(values))
                }
                row[i] = max(meets, key=meets.get)
        rows.append(Signature(*(row[i] for i, _ in columns)))
        _met_in(rows[-1], missing)
    return rows


def _pair(*cells):
    return tuple(sorted(cells, key=lambda cell: cell[0]))


def _met_in(row, missing):
    for pair in itertools.combinations(enumerate(row), 2):
        missing.pop(pair, None)


POOL = pool()
MASKED = [signature for signature in POOL if signature.mask != "none"]
# Only one implementation takes a mask; without a mask, each runs by its name.
BY_EACH = [
    (signature, name)
    for signature in POOL
    for name in (implementations.NAMES if signature.mask == "none" else (None,))
]
# With epsilon = 0, scaling the rows does not change a norm at all.
EXACT = [
    Signature(function, layout, params="scale", epsilon=0.0)
    for function, layout in zip(
        FUNCTIONS, (LAYOUTS[0], LAYOUTS[5], LAYOUTS[7], LAYOUTS[2]), strict=True
    )
]


def over(signatures):
    return pytest.mark.parametrize("signature", signatures, ids=str)


def examples(number):
    """Settings for `number` examples of each signature, the same ones in every run."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@functools.cache
def compiled(signature, implementation):
    function = functools.partial(
        FUNCTIONS[signature.function],
        **signature.options,
        dtype=signature.dtype,
        return_statistics=signature.return_statistics,
        implementation=implementation,
    )

    def run(params, arrays, mask, cotangents):
        """What the function returns, and the gradients of its arguments."""
        out, vjp = jax.vjp(lambda p, a: function(p, *a, mask=mask), params, arrays)
        cotangents = cotangents if isinstance(out, tuple) else cotangents[0]
        return out if isinstance(out, tuple) else (out,), *vjp(cotangents)

    return jax.jit(run)


def assert_same(actual, expected):
    """Value for value; in NumPy, bfloat16's NaN does not equal itself."""
    assert np.asarray(actual).dtype == expected.dtype
    wide = (np.asarray(a).astype(np.longdouble) for a in (actual, expected))
    np.testing.assert_array_equal(*wide, strict=True)


class Problem(NamedTuple):
    """Arguments of one call, and the cotangents of what it returns."""

    params: dict[str, np.ndarray]
    arrays: tuple[np.ndarray, ...]  # x, residual
    mask: np.ndarray | None
    dy: np.ndarray
    dresidual_out: np.ndarray | None
    statistics: jln.Statistics | None  # dmean, drstd

    @property
    def cotangents(self):
        return tuple(a for a in self[3:] if a is not None)

    @property
    def kept(self):
        shape = self.arrays[0].shape
        return np.broadcast_to(True if self.mask is None else self.mask, shape)

    def hiding(self, value):
        """With `value` wherever the mask is False, also in the cotangent of y."""

        def spoiled(a):
            with np.errstate(over="ignore"):
                return np.where(self.kept, a, np.asarray(value).astype(a.dtype))

        arrays = tuple(spoiled(a) for a in self.arrays)
        return self._replace(arrays=arrays, dy=spoiled(self.dy))


class Result(NamedTuple):
    y: np.ndarray
    residual_out: np.ndarray | None
    statistics: jln.Statistics | None
    dparams: dict[str, np.ndarray]
    darrays: tuple[np.ndarray, ...]


def call(signature, problem, implementation=None):
    arguments = problem.params, problem.arrays, problem.mask, problem.cotangents
    with jax.enable_x64("float64" in signature.dtypes):
        try:
            out, dparams, darrays = jax.device_get(
                compiled(signature, implementation)(*arguments)
            )
        except NotImplementedError as reason:  # only if it was asked for by name
            pytest.skip(str(reason))
    y, *rest = out
    residual_out = rest.pop(0) if signature.adds else None
    statistics = rest.pop() if signature.return_statistics else None
    assert not rest
    return Result(y, residual_out, statistics, dparams, darrays)


def expected_of(signature, problem):
    dmean, drstd = problem.statistics or (None, None)
    return oracle.norm(
        summed(signature, problem.arrays),
        problem.params.get("scale"),
        problem.params.get("bias"),
        problem.dy,
        **signature.options,
        center="layer" in signature.function,
        mask=problem.mask,
        dmean=dmean,
        drstd=drstd,
    )


def summed(signature, arrays):
    """What is normalized: the sum, rounded once to its own dtype."""
    dtype = signature.normalized_dtype
    wide = np.promote_types(np.float32, dtype) if dtype == np.float64 else np.float32
    with np.errstate(invalid="ignore", over="ignore"):
        return sum(a.astype(wide) for a in reversed(arrays)).astype(dtype)


def make(signature, *, seed, offset, spread, density):
    """A problem of random numbers; `offset` is in units of the spread of a row."""
    rng = np.random.default_rng(seed)
    (shape, axis), narrow = signature.layout, "float16" in signature.dtypes
    axes = axis if isinstance(axis, tuple) else (axis,)
    axes = [a % len(shape) for a in axes]
    spread = 2.0 ** np.clip(spread, -2, 3) if narrow else 2.0**spread
    offset = np.clip(offset * spread, -1e4, 1e4) if narrow else offset * spread

    def normal(shape, dtype, size=1.0, middle=0.0):
        return np.asarray(rng.normal(size=shape) * size + middle).astype(dtype)

    dtypes = [signature.x, signature.residual][: 2 if signature.adds else 1]
    arrays = tuple(
        normal(shape, jnp.dtype(dtype), spread, middle)
        for dtype, middle in zip(dtypes, (offset, -offset / 3), strict=False)
    )
    shapes = dict.fromkeys(("scale", "bias"), tuple(shape[a] for a in axes))
    if signature.params == "broadcast" and len(axes) < len(shape):
        for parity, key in enumerate(shapes):
            shapes[key] = tuple(
                1 if i % 2 == parity else n for i, n in enumerate(shape)
            )
    params = {
        key: normal(shapes[key], jnp.dtype(signature.param), 0.5, middle)
        for key, middle in (("scale", 1.0), ("bias", 0.0))
        if signature.params in (key, "both", "broadcast")
    }
    mask_shape = {
        "none": None,
        "full": shape,
        "rows": tuple(1 if i in axes else n for i, n in enumerate(shape)),
        "trailing": shape[1:] or shape,
    }[signature.mask]
    mask = None if mask_shape is None else rng.random(mask_shape) < density

    dy = normal(shape, jnp.dtype(signature.dtype or signature.x))
    dresidual_out = (
        normal(shape, signature.normalized_dtype) if signature.adds else None
    )
    problem = Problem(params, arrays, mask, dy, dresidual_out, None)
    if signature.return_statistics:
        rstd = expected_of(signature, problem).rstd
        compute = np.float64 if summed(signature, arrays).dtype == "f8" else np.float32
        problem = problem._replace(
            statistics=jln.Statistics(  # in proportion to what dy contributes
                normal(rstd.shape, compute, rstd.astype(float)),
                normal(rstd.shape, compute, 1 / rstd.astype(float)),
            )
        )
    return problem


ROWS = {
    "seed": st.integers(0, 2**32 - 1),
    "offset": st.sampled_from((0.0, 1e2, -1e4, 1e6)) | st.floats(-1e6, 1e6),
    "spread": st.integers(-8, 8),
    "density": st.sampled_from((0.5, 0.9, 0.1, 0.0, 1.0)),
}
HIDDEN = st.sampled_from((np.nan, np.inf, -np.inf, 1e30, 0.0))


def test_the_pool_is_small_and_every_two_values_meet_in_it():
    assert len(set(POOL + EXACT)) <= 60
    met = {pair for row in POOL for pair in itertools.combinations(enumerate(row), 2)}
    for (i, a), (j, b) in itertools.combinations(enumerate(COLUMNS), 2):
        assert {((i, v), (j, w)) for v, w in itertools.product(a, b)} <= met


@pytest.mark.parametrize(("signature", "implementation"), BY_EACH, ids=str)
@examples(32)
@given(hidden=HIDDEN, **ROWS)
def test_values_and_gradients_are_those_of_float64(
    signature, implementation, hidden, **rows
):
    problem = make(signature, **rows).hiding(hidden)
    result = call(signature, problem, implementation)
    expected = expected_of(signature, problem)
    normalized = summed(signature, problem.arrays)
    compute = np.float64 if normalized.dtype == "f8" else np.float32
    close = functools.partial(oracle.assert_close, computed_in=compute)

    assert result.y.dtype == jnp.dtype(signature.dtype or signature.x)
    close(result.y, expected.y, against=expected.y_size)
    if signature.return_statistics:
        mean, rstd = result.statistics
        assert mean.dtype == rstd.dtype == compute
        close(mean, expected.mean, against=expected.mean_size)
        close(rstd, expected.rstd, against=expected.rstd)
    dx, size = expected.dx, expected.dx_size
    if signature.adds:
        assert_same(result.residual_out, normalized)
        dresidual_out = problem.dresidual_out.astype(expected.dx.dtype)
        dx, size = dx + dresidual_out, size + np.abs(dresidual_out)
    for gradient, like in zip(result.darrays, problem.arrays, strict=True):
        assert gradient.dtype == like.dtype
        close(gradient, dx, against=size)
    assert result.dparams.keys() == problem.params.keys()
    for key, gradient in result.dparams.items():
        assert gradient.dtype == problem.params[key].dtype
        against = getattr(expected, f"d{key}_size")
        close(gradient, getattr(expected, f"d{key}"), against=against)


@over(MASKED)
@examples(12)
@given(values=st.tuples(HIDDEN, HIDDEN).filter(lambda pair: pair[0] != pair[1]), **ROWS)
def test_masked_elements_reach_no_output_statistic_or_gradient(
    signature, values, **rows
):
    problem = make(signature, **rows)
    one, other = (call(signature, problem.hiding(value)) for value in values)
    if signature.adds:
        one, other = (
            result._replace(residual_out=np.where(problem.kept, result.residual_out, 0))
            for result in (one, other)
        )
    jax.tree.map(assert_same, one, other)
    assert np.all(np.isfinite(one.y)) and not one.y[~problem.kept].any()
    if not signature.adds:
        assert not one.darrays[0][~problem.kept].any()


@over([signature for signature in MASKED if signature.adds])
@examples(6)
@given(hidden=HIDDEN, **ROWS)
def test_the_sum_and_its_gradient_pass_the_mask(signature, hidden, **rows):
    problem = make(signature, **rows).hiding(hidden)
    result, out = call(signature, problem), ~problem.kept
    residual_out = summed(signature, problem.arrays)
    assert_same(result.residual_out[out], residual_out[out])
    for gradient in result.darrays:
        passed = problem.dresidual_out.astype(gradient.dtype)
        assert_same(gradient[out], passed[out])


def make_exact(signature, seed):
    """Whole numbers, so that shifting and scaling them does not round."""
    problem = make(signature, seed=seed, offset=0.0, spread=0, density=1.0)
    rng = np.random.default_rng(seed)
    whole = tuple(
        rng.integers(-50, 50, a.shape).astype(np.float32) for a in problem.arrays
    )
    problem = problem._replace(arrays=whole)
    return problem._replace(
        dresidual_out=None if len(whole) == 1 else 0 * problem.dresidual_out
    )


@over(EXACT)
@examples(30)
@given(
    seed=ROWS["seed"],
    shift=st.integers(-(10**5), 10**5),
    power=st.integers(-20, 20),
)
def test_shift_and_scale_of_a_row_leave_y_unchanged(signature, seed, shift, power):
    problem, factor = make_exact(signature, seed), np.float32(2.0**power)
    shift = shift if "layer" in signature.function else 0
    moved = problem._replace(
        arrays=tuple((a + np.float32(shift)) * factor for a in problem.arrays)
    )
    before, after = call(signature, problem), call(signature, moved)
    size = expected_of(signature, moved)
    for key, against in (("y", size.y_size), ("dx", size.dx_size * factor)):
        a, b = (
            result.y if key == "y" else result.darrays[0] * by
            for result, by in ((before, 1), (after, factor))
        )
        oracle.assert_close(a, b.astype(np.float64), against=2 * against)
    oracle.assert_close(
        before.dparams["scale"],
        after.dparams["scale"].astype(np.float64),
        against=2 * size.dscale_size,
    )


@over(EXACT)
@examples(30)
@given(seed=ROWS["seed"])
def test_dx_is_orthogonal_to_x_hat_and_its_sum_is_zero(signature, seed):
    problem = make_exact(signature, seed)
    dx = call(signature, problem).darrays[0].astype(np.float64)
    bare = expected_of(signature, problem._replace(params={}))
    axes = signature.layout[1]
    rounding = 8 * np.finfo(np.float32).eps * expected_of(signature, problem).dx_size

    def sum_of(a):
        return np.sum(a, axes, keepdims=True)

    assert np.all(np.abs(sum_of(dx * bare.y)) <= sum_of(np.abs(bare.y) * rounding))
    if "layer" in signature.function:
        assert np.all(np.abs(sum_of(dx)) <= sum_of(np.ones_like(dx) * rounding))
