"""Transformations that a norm must support: each case applies some to `norm`.

A case is a function of `norm(params, x)` and returns a pytree of numbers. The test
runs it with the library's norm and with plain `jax.numpy`, which JAX differentiates
itself, and compares. `forward_mode` marks those that need `custom_vjp=False`.

A case runs in one `jax.jit`, because op by op most of the time goes into compiling the
ops; `outside_jit` marks the cases that test running outside `jax.jit`.

Transformations of programs (control flow, remat, export, sharding) are in
`program_cases`, those of functions (differentiation, vmap) here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import quick
from jax import lax
from jax.experimental.jet import jet

BATCH, SEQUENCE, FEATURES = 3, 4, 6

CASES = {}
FORWARD_MODE = set()
OUTSIDE_JIT = set()


def case(function):
    CASES[function.__name__] = function
    return function


def forward_mode(function):
    FORWARD_MODE.add(function.__name__)
    return case(function)


def outside_jit(function):
    OUTSIDE_JIT.add(function.__name__)
    return function


def run(name, norm):
    function = CASES[name]
    return (
        function(norm) if name in OUTSIDE_JIT else quick.jit(lambda: function(norm))()
    )


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


PARAMS = {"scale": draw(FEATURES, seed=0) + 1, "bias": draw(FEATURES, seed=1)}
X = draw(BATCH, SEQUENCE, FEATURES, seed=2)
DPARAMS = {"scale": draw(FEATURES, seed=3), "bias": draw(FEATURES, seed=4)}
DX = draw(BATCH, SEQUENCE, FEATURES, seed=5)
DY = draw(BATCH, SEQUENCE, FEATURES, seed=6)
WEIGHTS = draw(BATCH, SEQUENCE, FEATURES, seed=7)
STACK = {"scale": draw(5, FEATURES, seed=8) + 1, "bias": draw(5, FEATURES, seed=9)}
X_STACK = draw(5, SEQUENCE, FEATURES, seed=10)


def loss_of(norm):
    return lambda params, x: jnp.sum(jnp.sin(norm(params, x)) * WEIGHTS)


def unweighted_loss_of(norm):
    return lambda params, x: jnp.sum(jnp.sin(norm(params, x)))


BOTH = (0, 1)


@outside_jit
@case
def eager(norm):
    return norm(PARAMS, X)


@case
def jitted(norm):
    return jax.jit(norm)(PARAMS, X)


@outside_jit
@case
def eval_shape(norm):
    shape = jax.eval_shape(norm, PARAMS, X)
    return jnp.zeros(shape.shape, shape.dtype)


# Reverse mode.


@case
def vjp(norm):
    y, pullback = jax.vjp(norm, PARAMS, X)
    return y, pullback(jnp.asarray(DY))


@case
def vjp_vmap(norm):
    y, pullback = jax.vjp(norm, PARAMS, X)
    return y, jax.vmap(pullback)(jnp.stack([DY, 2 * DY]))


@case
def jit_of_grad(norm):
    return jax.jit(jax.grad(loss_of(norm), BOTH))(PARAMS, X)


@case
def grad_of_jit(norm):
    return jax.grad(jax.jit(loss_of(norm)), BOTH)(PARAMS, X)


@case
def grad_of_x(norm):
    return jax.grad(loss_of(norm), 1)(PARAMS, X)


@case
def grad_of_params(norm):
    return jax.grad(loss_of(norm), 0)(PARAMS, X)


@case
def grad_of_bias(norm):
    def loss(bias):
        return loss_of(norm)({"scale": PARAMS["scale"], "bias": bias}, X)

    return jax.grad(loss)(PARAMS["bias"])


@case
def grad_with_stopped_params(norm):
    return jax.grad(lambda x: loss_of(norm)(lax.stop_gradient(PARAMS), x))(X)


@case
def jacrev(norm):
    return jax.jacrev(norm, BOTH)(PARAMS, X)


# Second and third order.


@case
def hessian(norm):
    return jax.hessian(loss_of(norm), BOTH)(PARAMS, X)


@case
def jacrev_of_jacrev(norm):
    return jax.jacrev(jax.jacrev(loss_of(norm), BOTH), BOTH)(PARAMS, X)


@case
def hvp(norm):
    return jax.jvp(jax.grad(loss_of(norm), BOTH), (PARAMS, X), (DPARAMS, DX))


@case
def hvp_jitted(norm):
    return jax.jit(lambda *primals: hvp_at(norm, *primals))(PARAMS, X)


def hvp_at(norm, params, x):
    return jax.jvp(jax.grad(loss_of(norm), BOTH), (params, x), (DPARAMS, DX))


@case
def grad_of_grad(norm):
    def inner(params, x):
        dparams, dx = jax.grad(loss_of(norm), BOTH)(params, x)
        return jnp.sum(dx * DX) + jnp.sum(dparams["scale"] * DPARAMS["scale"])

    return jax.grad(inner, BOTH)(PARAMS, X)


@case
def grad_of_grad_of_grad(norm):
    def first(params, x):
        return jnp.sum(jax.grad(loss_of(norm), 1)(params, x) ** 2)

    def second(params, x):
        return jnp.sum(jax.grad(first, 1)(params, x) ** 2)

    return jax.jit(jax.grad(second, BOTH))(PARAMS, X)


@case
def jvp_of_grad_of_grad(norm):
    def first(params, x):
        return jnp.sum(jax.grad(loss_of(norm), 1)(params, x) ** 2)

    return jax.jvp(jax.grad(first, BOTH), (PARAMS, X), (DPARAMS, DX))


# vmap.


@case
def vmap_of_x(norm):
    return jax.vmap(norm, (None, 0))(PARAMS, X)


@case
def vmap_of_x_axis_1(norm):
    return jax.vmap(norm, (None, 1))(PARAMS, X)


@case
def vmap_of_x_last_axis_to_axis_1(norm):
    return jax.vmap(norm, (None, -1), 1)(PARAMS, jnp.moveaxis(X, 0, -1))


@case
def vmap_of_params(norm):
    return jax.vmap(norm, (0, None))(STACK, X)


@case
def vmap_of_params_last_axis(norm):
    last = {key: value.T for key, value in STACK.items()}
    return jax.vmap(norm, (1, None), 2)(last, X)


@case
def vmap_of_scale(norm):
    params = {"scale": STACK["scale"], "bias": PARAMS["bias"]}
    return jax.vmap(norm, ({"scale": 0, "bias": None}, None))(params, X)


@case
def vmap_of_both(norm):
    return jax.vmap(norm)(STACK, X_STACK)


@case
def vmap_of_both_params_last_axis(norm):
    last = {key: value.T for key, value in STACK.items()}
    gradients = jax.grad(unweighted_loss_of(norm), BOTH)
    return jax.vmap(gradients, (1, 0))(last, X_STACK)


@case
def vmap_of_grad_of_parameters_of_two_shapes(norm):
    params = {"scale": PARAMS["scale"], "bias": draw(1, FEATURES, seed=13)}
    return jax.vmap(jax.grad(unweighted_loss_of(norm), BOTH), (None, 0))(params, X)


@case
def vmap_of_vmap(norm):
    return jax.vmap(jax.vmap(norm, (None, 0)), (0, None))(STACK, X)


@case
def vmap_of_grad(norm):
    return jax.vmap(jax.grad(unweighted_loss_of(norm), BOTH), (None, 0))(PARAMS, X)


@case
def jit_of_vmap_of_grad(norm):
    gradients = jax.vmap(jax.grad(unweighted_loss_of(norm), BOTH), (None, 1))
    return jax.jit(gradients)(PARAMS, X)


@case
def vmap_of_grad_over_params(norm):
    return jax.vmap(jax.grad(unweighted_loss_of(norm), BOTH), (0, None))(STACK, X)


@case
def vmap_of_vmap_of_grad(norm):
    gradients = jax.grad(unweighted_loss_of(norm), BOTH)
    return jax.vmap(jax.vmap(gradients, (None, 0)), (0, None))(STACK, X)


@case
def grad_of_vmap(norm):
    return jax.grad(loss_of(jax.vmap(norm, (None, 0))), BOTH)(PARAMS, X)


@case
def grad_of_vmap_over_params(norm):
    return jax.grad(unweighted_loss_of(jax.vmap(norm, (0, None))), BOTH)(STACK, X)


@case
def vmap_of_hvp(norm):
    def product(x, dx):
        gradient = jax.grad(lambda x: unweighted_loss_of(norm)(PARAMS, x))
        return jax.jvp(gradient, (x,), (dx,))

    return jax.vmap(product)(X, DX)


@case
def vmap_of_hessian(norm):
    return jax.vmap(jax.hessian(lambda x: unweighted_loss_of(norm)(PARAMS, x)))(X)


@case
def vmap_with_axis_name(norm):
    def loss(x):
        return jnp.sum(jnp.sin(norm(PARAMS, lax.pmean(x, "i")) + x))

    return jax.vmap(jax.grad(loss), axis_name="i")(X)


# Inside other custom rules, and JAX's own checks.


@case
def inside_custom_vjp(norm):
    outer = jax.custom_vjp(norm)
    outer.defvjp(lambda *args: jax.vjp(norm, *args), lambda pullback, dy: pullback(dy))
    return jax.grad(loss_of(outer), BOTH)(PARAMS, X)


@outside_jit
@case
def checkify_of_jit(norm):
    from jax.experimental import checkify

    checked = checkify.checkify(jax.jit(norm), errors=checkify.float_checks)
    error, y = checked(PARAMS, X)
    error.throw()
    return y


@outside_jit
@case
def debug_nans(norm):
    with jax.debug_nans(True):
        return jax.grad(loss_of(norm), BOTH)(PARAMS, X)


@outside_jit
@case
def checking_leaks(norm):
    with jax.checking_leaks():
        return jax.jit(jax.grad(loss_of(norm), BOTH))(PARAMS, X)


@outside_jit
@case
def disabled_jit(norm):
    with jax.disable_jit():
        return jax.grad(loss_of(norm), BOTH)(PARAMS, X)


# Forward mode.


@forward_mode
def jvp(norm):
    return jax.jvp(norm, (PARAMS, X), (DPARAMS, DX))


@forward_mode
def jvp_of_x(norm):
    return jax.jvp(lambda x: norm(PARAMS, x), (X,), (DX,))


@forward_mode
def jvp_of_params(norm):
    return jax.jvp(lambda params: norm(params, X), (PARAMS,), (DPARAMS,))


@forward_mode
def jvp_of_jit(norm):
    return jax.jvp(jax.jit(norm), (PARAMS, X), (DPARAMS, DX))


@forward_mode
def jit_of_jvp(norm):
    along = jax.jit(lambda *primals: jax.jvp(norm, primals, (DPARAMS, DX)))
    return along(PARAMS, X)


@forward_mode
def jacfwd(norm):
    return jax.jacfwd(norm, BOTH)(PARAMS, X)


@forward_mode
def jacrev_of_jacfwd(norm):
    return jax.jacrev(jax.jacfwd(loss_of(norm), BOTH), BOTH)(PARAMS, X)


@forward_mode
def jacfwd_of_jacfwd(norm):
    return jax.jacfwd(jax.jacfwd(loss_of(norm), BOTH), BOTH)(PARAMS, X)


@forward_mode
def grad_of_jvp(norm):
    def slope(*primals):
        return jax.jvp(loss_of(norm), primals, (DPARAMS, DX))[1]

    return jax.grad(slope, BOTH)(PARAMS, X)


@forward_mode
def jvp_of_jvp(norm):
    def along(*primals):
        return jax.jvp(norm, primals, (DPARAMS, DX))

    return jax.jvp(along, (PARAMS, X), (DPARAMS, DX))


@forward_mode
def linearize(norm):
    y, tangent = jax.linearize(norm, PARAMS, X)
    return y, tangent(DPARAMS, DX)


@forward_mode
def linearize_of_jit(norm):
    y, tangent = jax.linearize(jax.jit(norm), PARAMS, X)
    return y, tangent(DPARAMS, DX)


@forward_mode
def vmap_of_linearized(norm):
    _, tangent = jax.linearize(norm, PARAMS, X)
    stacked = jax.tree.map(lambda t: jnp.stack([t, 2 * t]), (DPARAMS, DX))
    return jax.vmap(tangent)(*stacked)


@case
def transpose_of_linearized(norm):
    _, tangent = jax.linearize(norm, PARAMS, X)
    return jax.linear_transpose(tangent, PARAMS, X)(jnp.asarray(DY))


@forward_mode
def jvp_of_vmap(norm):
    return jax.jvp(jax.vmap(norm, (None, 1)), (PARAMS, X), (DPARAMS, DX))


@forward_mode
def vmap_of_jvp(norm):
    return jax.vmap(lambda x, dx: jax.jvp(lambda x: norm(PARAMS, x), (x,), (dx,)))(
        X, DX
    )


@forward_mode
def taylor_series(norm):
    return jet(lambda x: norm(PARAMS, x), (jnp.asarray(X),), ((DX, DX),))


@case
def inside_custom_jvp(norm):
    outer = jax.custom_jvp(norm)
    outer.defjvp(lambda primals, tangents: jax.jvp(norm, primals, tangents))
    return jax.grad(loss_of(outer), BOTH)(PARAMS, X)


@case
def jacfwd_over_grad_of_closed_over_params(norm):
    def inner_gradient(x):
        params = {"scale": x.mean((0, 1)), "bias": x.sum((0, 1))}
        return jax.grad(lambda z: jnp.sum(jnp.sin(norm(params, z) * x)))(x)

    return jax.jit(jax.jacfwd(inner_gradient))(jnp.asarray(X))
