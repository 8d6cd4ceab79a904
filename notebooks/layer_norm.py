# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Layer normalization, one token at a time
#
# Layer normalization takes the vector of one token, subtracts its mean, divides by its
# standard deviation, and then applies a learned scale and a learned bias. This notebook
# shows in numbers and pictures what that does and what it is often confused with. It
# shows where the usual formula loses accuracy. Then it derives the backward pass and
# checks it. Most claims are checked by an `assert` in a cell. You need to know NumPy
# and a little calculus.
#
# 1. [One token](#1.-One-token)
# 2. [Each token by itself](#2.-Each-token-by-itself)
# 3. [Not batch normalization](#3.-Not-batch-normalization)
# 4. [Not the residual add](#4.-Not-the-residual-add)
# 5. [RMS norm: the same without the mean](#5.-RMS-norm:-the-same-without-the-mean)
# 6. [What a large mean does](#6.-What-a-large-mean-does)
# 7. [The backward pass](#7.-The-backward-pass)
# 8. [The same as a `jax.custom_vjp`](#8.-The-same-as-a-jax.custom_vjp)

# %%
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import jax_layernorm as jln

np.set_printoptions(precision=3, suppress=True)
BLUE, ORANGE, GREY = "#1f6fb4", "#d9691e", "#8a8a8a"
TEXT_ORANGE, TEXT_GREY = "#b4500f", "#5f5f5f"  # darker, so that text is legible
plt.rcParams.update(
    {"figure.dpi": 100, "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False}
)
plt.rcParams.update(
    {
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)

# %% [markdown]
# ## 1. One token
#
# Take a token with eight features. Its numbers are chosen so that the mean is 5 and the
# standard deviation is 2.

# %%
x = np.array([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
mean = x.mean()
var = x.var()  # divided by N, not by N - 1
print("mean", mean, " variance", var, " standard deviation", var**0.5)
assert (mean, var) == (5, 4)

# %% [markdown]
# The normalized vector is the following. `epsilon` is a small constant that keeps the
# division finite.
#
# $$\hat x_i = (x_i - \mu)\, r, \qquad r = \frac{1}{\sqrt{\sigma^2 + \epsilon}} .$$
#
# The code calls them `x_hat`, `mean` and `rstd` (reciprocal standard deviation).
# `x_hat` says how many standard deviations each feature lies above the mean of its
# token.

# %%
epsilon = 1e-6
rstd = 1 / np.sqrt(var + epsilon)
x_hat = (x - mean) * rstd
print("x_hat", x_hat)
assert np.allclose(x_hat, [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])
assert np.isclose(x_hat.mean(), 0)
assert np.isclose(x_hat.std(), 1)

# %% [markdown]
# A learned `scale` and a learned `bias` follow: $y_i = \hat x_i\,\gamma_i + \beta_i$.
# Each has one number for every feature, and all tokens share them. Training starts from
# `scale` 1 and `bias` 0. Here one feature is raised by 1, one is doubled and one is
# halved.

# %%
scale = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.5])
bias = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
y = x_hat * scale + bias
print("y", y)
print("mean of y", y.mean().round(3), " standard deviation of y", y.std().round(3))

# %% [markdown]
# The output need not have mean 0 and standard deviation 1: `scale` and `bias` can undo
# that if it helps. The library computes the same `y`, in float32.

# %%
params = {"scale": jnp.array(scale, jnp.float32), "bias": jnp.array(bias, jnp.float32)}
y_library, statistics = jln.layer_norm(
    params, jnp.array(x, jnp.float32), return_statistics=True
)
print("y", y_library, " mean", statistics.mean, " rstd", statistics.rstd)
assert np.allclose(y_library, y, atol=1e-6)

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.7))
titles = (
    "x: mean 5, standard deviation 2",
    "x_hat: mean 0, standard deviation 1",
    "y = x_hat · scale + bias",
)
for ax, values, title in zip(axes, (x, x_hat, y), titles, strict=True):
    ax.bar(range(8), values, color=BLUE)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(title=title, xlabel="feature", xticks=range(8), ylim=(-2.2, 2.4))
axes[0].set(ylabel="value", ylim=(-2.2, 10.5))
for ax, center, deviation in ((axes[0], 5, 2), (axes[1], 0, 1)):
    band = (center - deviation, center + deviation)
    ax.axhspan(*band, color="#e4e4e4", zorder=0)
    ax.axhline(center, color="black", linestyle="--", linewidth=1.2)
axes[0].text(-0.5, 8.3, "dashed: mean\ngray: ± one standard deviation", fontsize=8.5)
axes[2].bar([0, 6, 7], y[[0, 6, 7]], color=ORANGE)
axes[2].text(
    -0.5, -1.9, "orange: changed by scale or bias", fontsize=8.5, color=TEXT_ORANGE
)
plt.show()

# %% [markdown]
# Two kinds of change leave `x_hat` alone: adding one number to every feature, and
# multiplying every feature by one positive number. (The second holds up to `epsilon`.)
# What remains is how the features of a token *relate* to each other.

# %%
plain = jln.init_params(8)  # scale 1, bias 0
token = jnp.array(x, jnp.float32)
for other in (token + 100, 3 * token, 0.5 * token - 7):
    assert np.allclose(
        jln.layer_norm(plain, other), jln.layer_norm(plain, token), atol=1e-5
    )

# %% [markdown]
# `epsilon` matters if the features of a token are nearly equal. If they are all equal,
# the variance is 0 and the output is `bias`, not NaN. The CPU kernel gives exactly
# `bias`. Other implementations may leave a rounding error. If the standard deviation is
# not far above $\sqrt\epsilon$, the standard deviation of `x_hat` is less than 1.

# %%
assert np.allclose(jln.layer_norm(params, jnp.full(8, 5.0)), params["bias"], atol=1e-6)
for std in (1e-1, 1e-2, 1e-3, 1e-4):
    out = jln.layer_norm(plain, (token - 5) / 2 * std)
    print(f"standard deviation {std:6.4f} in, {out.std():.3f} out")
    assert np.isclose(out.std(), std / np.sqrt(std**2 + epsilon), rtol=1e-5)

# %% [markdown]
# ## 2. Each token by itself
#
# In a transformer, the array has the shape `(batch, tokens, features)`. The statistics
# are taken over the features only, so every token of every example has one mean and one
# `rstd`.

# %%
rng = np.random.default_rng(0)
batch = jnp.array(rng.normal(size=(2, 4, 8)), jnp.float32)
y_batch, statistics = jln.layer_norm(params, batch, return_statistics=True)
print("x", batch.shape, " mean", statistics.mean.shape, " rstd", statistics.rstd.shape)
assert statistics.mean.shape == (2, 4, 1)

# %% [markdown]
# If other tokens change, in the same sequence or in another example, this token's
# result stays the same to the last bit.

# %%
# Change one token of example 0, and all of example 1.
changed = batch.at[0, 1].set(1e6).at[1].multiply(-3)
y_changed = jln.layer_norm(params, changed)
untouched = [0, 2, 3]
assert np.array_equal(y_changed[0, untouched], y_batch[0, untouched])
assert not np.any(y_changed[0, 1] == y_batch[0, 1])

# %% [markdown]
# The gradient says the same: the output of one token does not depend on another token
# *at all*. The picture cuts the Jacobian into one block for each pair of tokens. It
# shows the Frobenius norm of each block, the root of the sum of its squares. White is
# exactly 0. On the right is the same picture for batch normalization, where each
# token's output depends on all tokens.


# %%
def influence(function):
    """`[i, j]`: the Frobenius norm of d(output of token i) / d(input of token j)."""
    jacobian = jax.jacrev(
        lambda tokens: function(tokens.reshape(2, 4, 8)).reshape(8, 8)
    )(batch.reshape(8, 8))
    return np.sqrt((np.asarray(jacobian) ** 2).sum(axis=(1, 3)))


batch_norm = nn.BatchNorm(use_running_average=False)
batch_variables = batch_norm.init(jax.random.key(0), batch)
by_layer = influence(lambda x: jln.layer_norm(plain, x))
by_batch = influence(
    lambda x: batch_norm.apply(batch_variables, x, mutable="batch_stats")[0]
)
off_diagonal = ~np.eye(8, dtype=bool)
assert np.all(by_layer[off_diagonal] == 0)
assert np.all(by_layer.diagonal() > 0)
assert np.all(by_batch[off_diagonal] > 0)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.8))
largest = max(by_layer.max(), by_batch.max())
shades = plt.get_cmap("Blues")(np.linspace(0.15, 1, 256))  # without the near whites
blues = ListedColormap(shades).with_extremes(bad="white")
panels = (("layer norm", by_layer), ("batch norm", by_batch))
for ax, (title, sizes) in zip(axes, panels, strict=True):
    not_zero = np.ma.masked_equal(sizes, 0)
    image = ax.imshow(not_zero, cmap=blues, vmin=0, vmax=largest)
    ax.axhline(3.5, color="black", linewidth=0.8)
    ax.axvline(3.5, color="black", linewidth=0.8)
    ax.set(xlabel="input of token", ylabel="output of token")
    ax.set_xticks(range(8), [*range(4)] * 2)
    ax.set_yticks(range(8), [*range(4)] * 2)
    for at, name in ((1.5, "example 0"), (5.5, "example 1")):
        ax.text(at, -0.75, name, ha="center", fontsize=8.5, color=TEXT_GREY)
    ax.set_title(title, pad=20)
    ax.spines[:].set_visible(True)
figure.colorbar(image, ax=axes, label="Frobenius norm of the block", shrink=0.8)
plt.show()

# %% [markdown]
# ## 3. Not batch normalization
#
# Both subtract a mean and divide by a standard deviation. They differ in what they
# average. Layer norm averages along one row of the picture, the features of one token.
# Batch norm averages along one column, one feature of all tokens of all examples.
# (RMS norm, section 5, averages along the same row as layer norm.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.3))
panels = (
    ("layer norm: 8 means, one for each token", lambda row, column: row == 2),
    ("batch norm: 6 means, one for each feature", lambda row, column: column == 2),
)
for ax, (title, averaged) in zip(axes, panels, strict=True):
    for row, column in np.ndindex(8, 6):
        corner = (column, row + 0.5 * (row >= 4))  # a gap between the examples
        color = BLUE if averaged(row, column) else "#e4e4e4"
        ax.add_patch(plt.Rectangle(corner, 0.92, 0.92, color=color, linewidth=0))
    ax.set(title=title, xlim=(-0.1, 6), ylim=(8.6, -0.1), xlabel="feature")
    ax.set_xticks(np.arange(6) + 0.46, range(6))
    names = [f"example {row // 4}, token {row % 4}" for row in range(8)]
    ax.set_yticks([row + 0.5 * (row >= 4) + 0.46 for row in range(8)], names)
    ax.tick_params(length=0, labelsize=8.5)
    ax.spines[:].set_visible(False)
figure.get_layout_engine().set(wspace=0.08)
plt.show()

# %% [markdown]
# Three things follow.
#
# - For a batch of one token, batch norm in training gives only its bias, because every
#   variance is 0. Layer norm gives a single token the same result as in a batch.
# - Batch norm keeps running averages for use after training. Layer norm has only
#   `scale` and `bias`, and does the same during training and after it.
# - In layer norm, each token has its own mean and variance, but all tokens share the
#   `scale` and `bias` of each feature.

# %%
one_token = batch[:1, :1]
alone, _ = batch_norm.apply(batch_variables, one_token, mutable="batch_stats")
assert np.allclose(alone, batch_variables["params"]["bias"], atol=1e-3)
assert np.allclose(jln.layer_norm(params, one_token), y_batch[:1, :1], atol=1e-6)

layer_variables = jln.linen.LayerNorm().init(jax.random.key(0), batch)
for name, variables in (("layer", layer_variables), ("batch", batch_variables)):
    for kind, arrays in variables.items():
        print(f"{name} norm, {kind}:", jax.tree.map(jnp.shape, arrays))
assert set(layer_variables) == {"params"}
assert set(batch_variables) == {"params", "batch_stats"}

# %% [markdown]
# ## 4. Not the residual add
#
# Diagrams of the transformer have a box called "Add & Norm". It holds two operations:
#
# ```
# total = residual + x                 # the add: the residual connection
# y     = layer_norm(params, total)    # the norm
# ```
#
# Layer norm is only the second. It has no skip connection, and it does not know where
# its input comes from. The library also offers both in one call, because reading the
# array once for both is cheaper. That call returns both results.

# %%
branch, residual = batch, jnp.array(rng.normal(size=(2, 4, 8)), jnp.float32)
y_fused, total = jln.add_layer_norm(params, branch, residual)
assert np.array_equal(total, residual + branch)
assert np.array_equal(y_fused, jln.layer_norm(params, total))

# %% [markdown]
# The two do different things, as the backward pass shows. The add passes the gradient
# on unchanged. The norm removes a part of it: the gradient that it passes on sums to 0
# over the features of each token (section 7).

# %%
# `dy` is some gradient that arrives from above.
dy = jnp.array(rng.normal(size=(2, 4, 8)), jnp.float32)
(through_add,) = jax.vjp(lambda r: r + branch, residual)[1](dy)
(through_norm,) = jax.vjp(lambda r: jln.layer_norm(params, r + branch), residual)[1](dy)
for name, gradient in (("add", through_add), ("norm", through_norm)):
    largest = np.abs(gradient.sum(-1)).max()
    print(f"through the {name:4s}: sums over the features up to {largest:.0e}")
assert np.array_equal(through_add, dy)
assert np.allclose(through_norm.sum(-1), 0, atol=1e-5)

# %% [markdown]
# The architecture, not the norm, decides where the norm stands relative to the add.
# *Pre* placement is `x + f(norm(x))`: the residual stream itself is never normalized.
# *Post* placement is `norm(x + f(x))`: it is normalized after every block.
# The notebook [train_toy_transformer](train_toy_transformer.ipynb) trains both.

# %% [markdown]
# ## 5. RMS norm: the same without the mean
#
# RMS norm leaves out the subtraction. It divides by the root of the mean square:
#
# $$y_i = \frac{x_i}{\sqrt{\frac1N \sum_j x_j^2 + \epsilon}}\,\gamma_i .$$
#
# For the token of section 1 the mean square is $\mu^2 + \sigma^2 = 25 + 4 = 29$. The
# mean of the output is not 0, because nothing was subtracted.

# %%
rms = np.sqrt(np.mean(x**2))
y_rms = jln.rms_norm({}, token)  # no parameters: no scale, no bias
y_layer = jln.layer_norm({}, token)
print(f"root mean square {rms:.3f}, so the mean becomes 5 / {rms:.3f} = {5 / rms:.3f}")
for name, out in (("layer norm", y_layer), ("RMS norm", y_rms)):
    print(f"{name:10s}", out)
    print(f"{'':10s} mean {abs(out.mean()):.3f}, mean square {(out**2).mean():.3f}")
assert np.isclose(rms**2, 29)
assert np.allclose(y_rms, x / rms, atol=1e-6)
assert np.isclose(y_rms.mean(), 5 / rms, atol=1e-6)
assert np.isclose(y_layer.mean(), 0, atol=1e-6)

# %% [markdown]
# If the mean is 0, the two norms agree. Otherwise they differ, because RMS norm treats
# the mean as part of the signal. So a shift changes its output, and a factor does not.

# %%
assert np.allclose(jln.rms_norm({}, token - token.mean()), y_layer, atol=1e-6)
shift = np.abs(jln.rms_norm({}, token + 100) - y_rms).max()
assert shift > 0.1
assert np.allclose(jln.rms_norm({}, 3 * token), y_rms, atol=1e-6)
print(f"largest change of RMS norm when 100 is added to every feature: {shift:.3f}")

# %% [markdown]
# With three features we can draw this. Subtracting the mean projects the token onto the
# plane where the features sum to 0, which is at a right angle to $(1, 1, 1)$. Dividing
# puts it at distance $\sqrt 3$ from the origin. So layer norm maps every token to a
# *circle*, and RMS norm to a *sphere*. Gray dots are tokens, and colored dots are their
# results. In general the distance is $\sqrt N$. Layer norm removes two of the $N$
# dimensions, and RMS norm removes one.

# %%
directions = rng.normal(loc=0.4, size=(14, 3))
directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
points = jnp.array(directions * rng.uniform(2.5, 4, size=(14, 1)), jnp.float32)
centered = points - points.mean(-1, keepdims=True)
on_circle, on_sphere = jln.layer_norm({}, points), jln.rms_norm({}, points)

for normalized in (on_circle, on_sphere):
    assert np.allclose(np.linalg.norm(normalized, axis=-1), np.sqrt(3), atol=1e-4)
assert np.allclose(centered.sum(-1), 0, atol=1e-5)
assert np.allclose(on_circle.sum(-1), 0, atol=1e-5)
assert np.abs(on_sphere.sum(-1)).max() > 1

# %%
turn = np.linspace(0, 2 * np.pi, 61)
in_plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # unit vectors
circle = np.stack([np.cos(turn), np.sin(turn)], axis=1) @ in_plane
corners = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]).reshape(2, 2, 2)
corners[1] = corners[1, ::-1]
plane = 3.2 * corners @ in_plane
tilt = np.linspace(0, np.pi, 31)[:, None]
sphere = (
    np.sin(tilt) * np.cos(turn),
    np.sin(tilt) * np.sin(turn),
    np.cos(tilt + 0 * turn),
)

figure = plt.figure(figsize=(8.8, 4.2))
panels = (
    (
        "layer norm: to the plane, then to the circle",
        BLUE,
        [points, centered, on_circle],
    ),
    ("RMS norm: to the sphere", ORANGE, [points, on_sphere]),
)
for number, (title, color, path) in enumerate(panels, start=1):
    ax = figure.add_subplot(1, 2, number, projection="3d", proj_type="ortho")
    for start, stop in itertools.pairwise(path):
        last = stop is path[-1]
        for segment in np.stack([start, stop], axis=1):
            ax.plot(*segment.T, color=color if last else GREY, linewidth=0.9)
    ax.scatter(*points.T, color=GREY, s=16, depthshade=False)
    ax.scatter(*path[-1].T, color=color, s=20, depthshade=False)
    if number == 1:
        ax.plot_surface(*np.moveaxis(plane, -1, 0), color=BLUE, alpha=0.12)
        ax.plot(*np.sqrt(3) * circle.T, color=BLUE, linewidth=1.5)
    else:
        ax.plot_surface(*np.sqrt(3) * np.array(sphere), color=ORANGE, alpha=0.2)
    ax.set_title(title, y=1.0)
    ax.set(xlabel="feature 0", ylabel="feature 1", zlabel="feature 2")
    ticks = (-2, 0, 2)
    ax.set(xticks=ticks, yticks=ticks, zticks=ticks)
    ax.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), zlim=(-3.3, 3.3))
    ax.set_box_aspect((1, 1, 1), zoom=1.05)
    ax.tick_params(labelsize=8, pad=0)
    ax.view_init(elev=16, azim=-16)
plt.show()

# %% [markdown]
# ## 6. What a large mean does
#
# The variance can be computed in one pass over the data, as $E[x^2] - E[x]^2$. This is
# `flax.linen.LayerNorm`'s default (`use_fast_variance=True`). In exact arithmetic it is
# the variance. In float32 it is the difference of two large numbers. If the mean is
# 1000 times the standard deviation, both are about $10^6$, where neighboring float32
# numbers are 0.06 apart. A variance of 1 is then known to one digit.

# %%
# 64 tokens with 768 features, mean 0 and standard deviation 1
normal = rng.standard_normal((64, 768))
print("offset    E[x^2]  spacing there  E[x^2] - E[x]^2  variance")
for offset in (10.0, 100.0, 1000.0, 10000.0):
    row = jnp.array(normal[0] + offset, jnp.float32)
    square = float((row * row).mean())
    fast = square - float(row.mean() ** 2)  # both are float32 numbers
    exact = np.asarray(row, np.float64).var()
    spacing = np.spacing(np.float32(square))
    print(f"{offset:6.0f} {square:9.0f} {spacing:14.6f} {fast:16.4f} {exact:9.4f}")
assert abs(fast - exact) > 0.5  # at the last offset no digit is right

# %% [markdown]
# Next we measure the whole layer. The error is the largest difference of any element
# from float64 NumPy on the *same* float32 input, so the rounding of the input does not
# count. The correct output is of size 1.


# %%
def reference(x):
    """Layer norm in float64, two passes, NumPy."""
    x = np.asarray(x, np.float64)
    c = x - x.mean(-1, keepdims=True)
    return c / np.sqrt((c * c).mean(-1, keepdims=True) + epsilon)


layers = {
    "Flax, default": nn.LayerNorm(),
    "Flax, use_fast_variance=False": nn.LayerNorm(use_fast_variance=False),
    "jax_layernorm": jln.linen.LayerNorm(),
}
offsets = np.logspace(0, 6, 25)
inputs = [jnp.array(normal + offset, jnp.float32) for offset in offsets]
variables = layers["jax_layernorm"].init(jax.random.key(0), inputs[0])  # for all three


def largest_error(layer, x):
    return np.abs(np.asarray(layer.apply(variables, x)) - reference(x)).max()


errors = {
    name: np.array([largest_error(layer, x) for x in inputs])
    for name, layer in layers.items()
}
for name, error in errors.items():
    print(f"{name:29s}", *(f"{value:.1e}" for value in error[::4]))

wrong = errors["Flax, default"] > 1000
print(f"Flax, default: off by more than 1000 from offset {offsets[wrong][0]:.0f} on")
assert 3000 < offsets[wrong][0] < 3500
assert errors["jax_layernorm"].max() < 1e-6
assert errors["Flax, default"][12] > 0.1  # offset 1000
assert errors["Flax, default"].max() > 1000
assert errors["Flax, use_fast_variance=False"][-1] > 0.01

# %%
figure, ax = plt.subplots(figsize=(7.2, 4))
for error, color in zip(errors.values(), (ORANGE, GREY, BLUE), strict=True):
    ax.loglog(offsets, error, color=color, linewidth=2)
ax.axhline(2.0**-23, color="black", linestyle=":", linewidth=1)
ax.text(1, 2.0**-23 / 1.5, "float32 epsilon", va="top", fontsize=8.5)
ax.axhline(1, color="black", linewidth=0.8)
ax.text(1, 1.4, "size of the correct output", fontsize=8.5)
ax.text(6e2, 30, "Flax, default", color=TEXT_ORANGE, ha="right")
ax.text(1.6e4, 4e-4, "Flax, use_fast_variance=False", color=TEXT_GREY)
ax.text(1.6e4, 1e-6, "jax_layernorm", color=BLUE)
ax.set(
    xlabel="mean of the token, in standard deviations",
    ylabel="largest absolute error of y",
    ylim=(3e-8, 3e4),
)
plt.show()

# %% [markdown]
# The three lines differ as follows.
#
# - Flax's default loses two digits each time the mean grows by a factor of 10. From
#   about 3000 standard deviations on, the difference can come out as 0 or less. Flax
#   then takes 0, and `rstd` becomes $1/\sqrt\epsilon = 1000$. The output is wrong by a
#   factor of about 1000. It stays finite, so nothing warns you.
# - Two passes, first the mean, then $E[(x - \mu)^2]$, lose one digit for each factor of
#   10. The float32 mean is off by one or two float32 spacings, because its sum rounds
#   at every step. At a mean of $10^6$ a spacing is 0.06.
# - The library subtracts twice: `c = x - mean(x)`, then `c = c - mean(c)`. The second
#   mean is just the rounding error of the first, measured where numbers are small. This
#   is the corrected two-pass algorithm (Chan, Golub, LeVeque). Its error does not
#   depend on the offset.

# %%
far = inputs[-1]  # mean 1e6
deviations = layers["Flax, default"].apply(variables, far).std(-1)
print(f"Flax, default: standard deviation of a token, at most {deviations.max():.0f}")
assert np.isclose(deviations.max(), 1000, rtol=0.1)

exact = np.asarray(far, np.float64).mean(-1)
off = np.abs(np.asarray(far.mean(-1), np.float64) - exact) / np.spacing(np.float32(1e6))
print(f"the mean is off by up to {off.max():.1f} float32 spacings")
assert 0.5 < off.max() < 2.5

c = far - far.mean(-1, keepdims=True)
print(
    f"largest mean of a token, after one subtraction: {jnp.abs(c.mean(-1)).max():.0e}"
)
c = c - c.mean(-1, keepdims=True)
print(
    f"after two:                                      {jnp.abs(c.mean(-1)).max():.0e}"
)
assert jnp.abs(c.mean(-1)).max() < 1e-6

# %% [markdown]
# ## 7. The backward pass
#
# The backward pass gets `dy`, the gradient of a loss $L$ with respect to the output. It
# is also called the *cotangent* of $y$. From it the backward pass computes `dx`,
# `dscale` and `dbias`. With $N$ features, the arrays have these shapes:
#
# | arrays | shape |
# |---|---|
# | $x$, $c$, $\hat x$, $y$, $g$, `dy`, `dx` | `(tokens, N)` |
# | $\gamma$ (`scale`), $\beta$ (`bias`), `dscale`, `dbias` | `(N,)` |
# | $\langle x\rangle$ (the mean), $\sigma^2$, $r$ (`rstd`) | one number for each token |
#
# All products are elementwise, $\delta$ is a small change, and $\langle\cdot\rangle$ is
# the mean over the features of a token:
#
# $$c = x - \langle x\rangle, \qquad
# \sigma^2 = \langle c^2\rangle, \qquad
# r = (\sigma^2+\epsilon)^{-1/2}, \qquad
# \hat x = r\,c, \qquad
# y = \hat x\,\gamma + \beta .$$
#
# **The parameters.** $\delta y = \hat x\,\delta\gamma + \delta\beta$. All tokens share
# the parameters, so their gradients are sums over the tokens:
#
# $$\mathrm{dscale} = \sum_{\text{tokens}} \mathrm{dy}\,\hat x, \qquad
# \mathrm{dbias} = \sum_{\text{tokens}} \mathrm{dy}.$$
#
# **Up to the normalized vector.** $\delta y = \gamma\,\delta\hat x$, so the cotangent
# of $\hat x$ is $g = \gamma\,\mathrm{dy}$.
#
# **Through the standard deviation.** A change $\delta c$ acts directly and through $r$:
#
# $$\begin{aligned}
# \delta(\sigma^2) &= 2\,\langle c\,\delta c\rangle, \\
# \delta r &= -\tfrac12 r^3\,\delta(\sigma^2) = -r^3\,\langle c\,\delta c\rangle, \\
# \delta\hat x &= r\,\delta c + c\,\delta r
# = r\,\bigl(\delta c - \hat x\,\langle \hat x\,\delta c\rangle\bigr).
# \end{aligned}$$
#
# **Through the mean.** $\delta c = \delta x - \langle\delta x\rangle$. Because
# $\langle\hat x\rangle = 0$,
# $\langle\hat x\,\delta c\rangle = \langle\hat x\,\delta x\rangle$. Together:
#
# $$\delta\hat x
# = r\,\bigl(\delta x - \langle\delta x\rangle
# {} - \hat x\,\langle\hat x\,\delta x\rangle\bigr).$$
#
# For one token this is a matrix times a vector. Let $I$ be the $N \times N$ identity
# matrix and $\mathbf 1$ the vector of $N$ ones. Then $\delta\hat x = J\,\delta x$ with
# the Jacobian
#
# $$J = r\,\Bigl(I - \tfrac1N \mathbf 1\mathbf 1^{\top}
# {} - \tfrac1N \hat x\hat x^{\top}\Bigr).$$
#
# **And back.** The cotangent of $x$ is $J^{\top} g$, and $J$ is symmetric:
#
# $$\boxed{\;\mathrm{dx}
# = r\,\bigl(g - \langle g\rangle - \hat x\,\langle g\,\hat x\rangle\bigr)\;}$$
#
# In words (apart from `epsilon`): subtract from `g` its mean and its part along `x_hat`,
# and divide by the standard deviation.
#
# RMS norm subtracts no mean. Its formulas have no $\langle x\rangle$ and no
# $\langle g\rangle$:
#
# $$r = (\langle x^2\rangle+\epsilon)^{-1/2}, \qquad
# \hat x = r\,x, \qquad
# y = \hat x\,\gamma, \qquad
# \mathrm{dx} = r\,\bigl(g - \hat x\,\langle g\,\hat x\rangle\bigr).$$


# %%
def backward(x, scale, dy):
    """`(dx, dscale, dbias)` by the formulas above, in float64 NumPy."""
    x_hat = reference(x)
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    g = dy * scale
    dx = rstd * (
        g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True)
    )
    return dx, (dy * x_hat).sum(0), dy.sum(0)


def backward_rms(x, scale, dy):
    """`dx` of RMS norm."""
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    x_hat, g = x * rstd, dy * scale
    return rstd * (g - x_hat * (g * x_hat).mean(-1, keepdims=True))


rng = np.random.default_rng(0)
tokens = rng.normal(loc=0.5, scale=2, size=(5, 8))  # five tokens, float64
dy = rng.normal(size=(5, 8))  # a random cotangent: the loss is the sum of dy * y
dx, dscale, dbias = backward(tokens, scale, dy)

# %% [markdown]
# **Check 1, finite differences.** We move each element by $\pm h$ and compute the loss
# again, all in float64.


# %%
def loss(x, scale, bias):
    return np.sum(dy * (reference(x) * scale + bias))


def central_differences(function, at, h=1e-5):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = h
        gradient[index] = (function(at + step) - function(at - step)) / (2 * h)
    return gradient


differences = (
    np.abs(central_differences(lambda x: loss(x, scale, bias), tokens) - dx).max(),
    np.abs(central_differences(lambda s: loss(tokens, s, bias), scale) - dscale).max(),
    np.abs(central_differences(lambda b: loss(tokens, scale, b), bias) - dbias).max(),
)
print("largest difference of dx, dscale, dbias:", *(f"{d:.0e}" for d in differences))
assert max(differences) < 1e-8

# %% [markdown]
# **Check 2, JAX's own derivative.** `jax.vjp`, which `jax.grad` calls, differentiates a
# plain `jax.numpy` implementation without these formulas. We compare both that and the
# library's hand-written backward pass with the formulas.


# %%
def plain_layer_norm(params, x):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + epsilon) * params["scale"] + params["bias"]


def gradients(layer_norm):
    """`(dx, dscale, dbias)` in float32."""
    _, pullback = jax.vjp(layer_norm, params, jnp.array(tokens, jnp.float32))
    dparams, dx = pullback(jnp.array(dy, jnp.float32))
    return dx, dparams["scale"], dparams["bias"]


for name, function in (
    ("plain jax.numpy", plain_layer_norm),
    ("jax_layernorm", jln.layer_norm),
):
    by_formula = (dx, dscale, dbias)
    errors = [
        np.abs(got - want).max()
        for got, want in zip(gradients(function), by_formula, strict=True)
    ]
    print(
        f"{name:15s} largest difference of dx, dscale, dbias:",
        *(f"{error:.0e}" for error in errors),
    )
    assert max(errors) < 1e-5  # float32

only_scale = {"scale": params["scale"]}
_, pullback = jax.vjp(
    lambda x: jln.rms_norm(only_scale, x), jnp.array(tokens, jnp.float32)
)
(dx_rms,) = pullback(jnp.array(dy, jnp.float32))
assert np.allclose(dx_rms, backward_rms(tokens, scale, dy), atol=1e-5)

# %% [markdown]
# **Check 3, what must hold.** Adding a number to all features of a token does not
# change `y`. So `dx` has no part in that direction: it sums to 0. Stretching a token
# about its mean does not change `y` either, apart from `epsilon`. So `dx` is at a right
# angle to `x_hat`, apart from `epsilon`:
#
# $$\sum_i \mathrm{dx}_i = 0, \qquad
# \hat x\cdot\mathrm{dx}
# = r\,\frac{\epsilon}{\sigma^2+\epsilon}\;\hat x\cdot g \approx 0 .$$
#
# These hold for every `dy`, so a test can use them without a reference.

# %%
x_hat = reference(tokens)
g = dy * scale
rstd = 1 / np.sqrt(tokens.var(-1) + epsilon)
for name, value in (
    ("sum of dx", dx),
    ("x_hat · dx", x_hat * dx),
    ("x_hat · g", x_hat * g),
):
    print(f"{name:10s} at most {np.abs(value.sum(-1)).max():.0e}")
assert np.allclose(dx.sum(-1), 0, atol=1e-14)
assert np.allclose(
    (x_hat * dx).sum(-1), rstd * epsilon * rstd**2 * (x_hat * g).sum(-1), atol=1e-14
)

dx_library = np.asarray(gradients(jln.layer_norm)[0], np.float64)
assert np.allclose(dx_library.sum(-1), 0, atol=1e-6)
assert np.allclose((x_hat * dx_library).sum(-1), 0, atol=1e-5)

# %% [markdown]
# The picture shows this for one token: what arrives, what is removed, and what is
# passed on.

# %%
row = 0
mean_part = np.full(8, g[row].mean())
x_hat_part = x_hat[row] * (g[row] * x_hat[row]).mean()
left = g[row] - mean_part - x_hat_part
assert np.allclose(rstd[row] * left, dx[row])

figure, axes = plt.subplots(1, 4, figsize=(9.2, 2.5), sharey=True)
parts = (
    ("g = dy · scale", g[row], BLUE),
    ("minus its mean", -mean_part, ORANGE),
    ("minus its part along x_hat", -x_hat_part, ORANGE),
    ("leaves dx / rstd", left, BLUE),
)
for ax, (title, values, color) in zip(axes, parts, strict=True):
    ax.bar(range(8), values, color=color)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(title=title, xlabel="feature", xticks=range(8))
axes[0].set_ylabel("gradient")
plt.show()

# %% [markdown]
# ## 8. The same as a `jax.custom_vjp`
#
# `jax.custom_vjp` tells JAX to use this backward pass instead of deriving one line by
# line. It takes three functions: the function itself, a forward rule that also returns
# what to save, and a backward rule that gets what was saved and the cotangent.


# %%
@jax.custom_vjp
def my_layer_norm(x, scale, bias):
    return forward_rule(x, scale, bias)[0]


def forward_rule(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)
    return (x - mean) * rstd * scale + bias, (x, scale, mean, rstd)


def backward_rule(saved, dy):
    x, scale, mean, rstd = saved
    x_hat, g = (x - mean) * rstd, dy * scale
    dx = rstd * (
        g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True)
    )
    return dx, (dy * x_hat).sum(0), dy.sum(0)


my_layer_norm.defvjp(forward_rule, backward_rule)

# %%
mine = gradients(lambda params, x: my_layer_norm(x, params["scale"], params["bias"]))
for got, want in zip(mine, (dx, dscale, dbias), strict=True):
    assert np.allclose(got, want, atol=1e-5)

# %% [markdown]
# The library does the same, and more:
#
# - It saves the mean in two words, so that the backward pass is as accurate as the
#   forward pass.
# - It computes the statistics in float32 even if `x` is bfloat16 or float16.
# - It takes arrays of any rank, with either parameter left out, and checks its
#   arguments.
# - Both rules can run a faster program that is written for the platform.
#
# The `custom_vjp` shows in the traced program:

# %%
example = jnp.ones((2, 8))
assert "custom_vjp_call" in str(jax.make_jaxpr(jln.layer_norm)(plain, example))
assert "custom_vjp_call" not in str(jax.make_jaxpr(plain_layer_norm)(plain, example))

# %% [markdown]
# The gain is memory. What the forward pass saves is kept until the backward pass, for
# every norm of the model. `jax.vjp` returns the backward pass as a function that
# carries the saved arrays. Here they are, for 512 tokens with 768 features.


# %%
def saved_arrays(layer, x):
    """`shape dtype` and bytes of each array that the backward pass of `layer` keeps."""
    variables = layer.init(jax.random.key(0), x)
    _, pullback = jax.vjp(jax.jit(layer.apply), variables, x)
    return [
        (f"{leaf.shape} {leaf.dtype}", leaf.nbytes)
        for leaf in jax.tree.leaves(pullback)
    ]


stream = jax.random.normal(jax.random.key(1), (512, 768))
flax_norm, our_norm = nn.LayerNorm(), jln.linen.LayerNorm()
for name, layer in (
    ("flax.linen.LayerNorm", flax_norm),
    ("jax_layernorm.linen.LayerNorm", our_norm),
):
    arrays = saved_arrays(layer, stream)
    print(f"{name}: {sum(size for _, size in arrays):,} bytes")
    for array, size in sorted(arrays, key=lambda entry: -entry[1]):
        print(f"    {array:22s} {size:9,}")

# %% [markdown]
# Flax keeps three arrays of the size of `x`. The library keeps one, `x` itself. It also
# keeps `scale` and three numbers for each token: `rstd` and the two words of the mean.
# The array of booleans is empty; its shape says which gradients are wanted. In bfloat16
# the difference is larger, because Flax saves float32 arrays and the library saves `x`
# in its own dtype.

# %%
per_element = {}
for dtype in (jnp.float32, jnp.bfloat16):
    for name, layer in (("Flax", flax_norm), ("jax_layernorm", our_norm)):
        total_bytes = sum(size for _, size in saved_arrays(layer, stream.astype(dtype)))
        per_element[name, dtype.__name__] = total_bytes / stream.size
for (name, dtype), count in per_element.items():
    print(f"{name:14s} {dtype:9s} {count:5.2f} bytes saved for each element of x")

assert 12 <= per_element["Flax", "float32"] < 12.1
assert 12 <= per_element["Flax", "bfloat16"] < 12.1
assert 4 <= per_element["jax_layernorm", "float32"] < 4.1
assert 2 <= per_element["jax_layernorm", "bfloat16"] < 2.1

# %% [markdown]
# These are the arrays that JAX asks to keep. Inside a jitted training step the compiler
# may share or recompute some of them, so measure what a model saves on that model.
#
# The price is that JAX cannot differentiate a function with a `custom_vjp` in forward
# mode (`jax.jvp`, `jax.jacfwd`). If you need that, pass `custom_vjp=False`. JAX then
# differentiates the same equations itself.

# %%
tangent = jnp.array(rng.normal(size=8), jnp.float32)
_, forward_mode = jax.jvp(
    lambda x: jln.layer_norm(plain, x, custom_vjp=False), (token,), (tangent,)
)
jacobian = jax.jacrev(lambda x: jln.layer_norm(plain, x))(token)
assert np.allclose(forward_mode, jacobian @ tangent, atol=1e-5)
try:
    jax.jvp(lambda x: jln.layer_norm(plain, x), (token,), (tangent,))
except TypeError as error:
    print("TypeError:", str(error).splitlines()[0])
else:
    raise AssertionError("forward mode needs custom_vjp=False")

# %% [markdown]
# ## References
#
# - Jimmy Lei Ba, Jamie Ryan Kiros, Geoffrey E. Hinton: *Layer Normalization*, 2016,
#   [arXiv:1607.06450](https://arxiv.org/abs/1607.06450).
# - Biao Zhang, Rico Sennrich: *Root Mean Square Layer Normalization*, 2019,
#   [arXiv:1910.07467](https://arxiv.org/abs/1910.07467).
# - Ruibin Xiong et al.: *On Layer Normalization in the Transformer Architecture*, 2020,
#   [arXiv:2002.04745](https://arxiv.org/abs/2002.04745).
# - Tony F. Chan, Gene H. Golub, Randall J. LeVeque: *Algorithms for Computing the
#   Sample Variance: Analysis and Recommendations*, The American Statistician 37(3),
#   1983.
