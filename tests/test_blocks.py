"""Building blocks against convolutions written in float64 NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.errors import UserError
from flax_cifar.models.blocks import (
  ConvHead,
  ConvUnit,
  DepthwiseSeparableUnit,
  GlobalAveragePool,
  MaxPool,
  ParallelSum,
  get_bias_init,
  get_init,
  pad_reflect,
)
from flax_cifar.models.norms import BatchNorm, GroupNorm, NoNorm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 12, 11, 3)).astype(np.float32)
EPSILON = 1e-5
KEY = jax.random.key(0, impl="rbg")  # compiles much faster than threefry
NORM = partial(BatchNorm, momentum=0.9, epsilon=EPSILON)
F32 = jnp.float32


def convolve(x, kernel, *, padding=0, dilation=1, mode="constant"):
  """Cross-correlation of NHWC and HWIO in float64; a kernel with I = 1 is depthwise."""
  x = np.pad(x.astype(np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), mode)
  height = x.shape[1] - (kernel.shape[0] - 1) * dilation
  width = x.shape[2] - (kernel.shape[1] - 1) * dilation
  y = 0.0
  for i, j in np.ndindex(kernel.shape[:2]):
    tap = x[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
    depthwise = kernel.shape[2] == 1 < x.shape[3]
    y = y + (tap * kernel[i, j, 0] if depthwise else tap @ kernel[i, j].astype(np.float64))
  return y


def normalise(x, params, stats):
  x = (x - stats["mean"]) / np.sqrt(stats["var"].astype(np.float64) + EPSILON)
  return x * params["scale"] + params["bias"]


def norm_and_relu(x, params, stats):
  return np.maximum(normalise(x, params, stats), 0)


def random_kernel(*shape):
  return {"kernel": RNG.normal(size=shape).astype(np.float32)}


def random_norm(channels):
  """Parameters and statistics of a batch norm that commutes neither with ReLU nor with a conv."""
  scale, bias, mean = RNG.normal(size=(3, channels)).astype(np.float32)
  var = RNG.uniform(0.5, 2, channels).astype(np.float32)
  return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}


def evaluate(module, variables, x=X):
  return jax.jit(partial(module.apply, train=False))(variables, x)


@pytest.mark.parametrize(
  ("kernel_size", "padding", "pad_mode", "dilation"),
  [
    (1, 0, "zeros", 1),
    (3, 0, "zeros", 1),
    (3, 1, "zeros", 1),
    (3, 2, "zeros", 2),
    (3, 1, "reflect", 2),
    (3, 2, "reflect", 2),
    (3, 4, "reflect", 4),
    (3, 8, "reflect", 8),
  ],
)
def test_conv_unit_is_conv_then_norm_then_relu(kernel_size, padding, pad_mode, dilation):
  unit = ConvUnit(5, NORM, get_init("torch"), 0.0, F32, kernel_size, padding, pad_mode, dilation)
  params, stats = random_norm(5)
  conv = random_kernel(kernel_size, kernel_size, 3, 5)
  variables = {"params": {"conv": conv, "norm": params}, "batch_stats": {"norm": stats}}
  mode = {"zeros": "constant", "reflect": "reflect"}[pad_mode]
  expected = convolve(X, conv["kernel"], padding=padding, dilation=dilation, mode=mode)
  actual = evaluate(unit, variables)
  np.testing.assert_allclose(actual, norm_and_relu(expected, params, stats), rtol=1e-4, atol=1e-4)
  assert (np.asarray(actual) == 0).any()


@pytest.mark.parametrize("sides", [1, (3, 1), (1, 3), (1, 1)])
def test_padding_is_on_all_four_sides_whatever_the_kernel(sides):
  """As in torch: where a side of the kernel is 1, the map grows by 2, with the bias in the rim."""
  unit = ConvUnit(5, NoNorm, get_init("torch"), 0.0, F32, sides, use_bias=True)
  height, width = (sides, sides) if isinstance(sides, int) else sides
  conv = random_kernel(height, width, 3, 5)
  conv["bias"] = RNG.normal(size=5).astype(np.float32)
  expected = convolve(X, conv["kernel"], padding=1) + conv["bias"]
  actual = evaluate(unit, {"params": {"conv": conv}})
  assert actual.shape == (2, 12 + 3 - height, 11 + 3 - width, 5)
  np.testing.assert_allclose(actual, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)


def test_the_other_order_is_conv_then_relu_then_norm():
  unit = ConvUnit(5, NORM, get_init("torch"), 0.0, F32, order="conv_relu_norm")
  params, stats = random_norm(5)
  conv = random_kernel(3, 3, 3, 5)
  variables = {"params": {"conv": conv, "norm": params}, "batch_stats": {"norm": stats}}
  expected = normalise(np.maximum(convolve(X, conv["kernel"], padding=1), 0), params, stats)
  actual = evaluate(unit, variables)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  assert (np.asarray(actual) < 0).any()


def test_separable_unit_is_depthwise_then_pointwise_then_norm_then_relu():
  unit = DepthwiseSeparableUnit(5, NORM, get_init("torch"), 0.0, F32)
  params, stats = random_norm(5)
  depthwise, pointwise = random_kernel(3, 3, 1, 3), random_kernel(1, 1, 3, 5)
  variables = {
    "params": {"depthwise": depthwise, "pointwise": pointwise, "norm": params},
    "batch_stats": {"norm": stats},
  }
  expected = convolve(X, depthwise["kernel"], padding=1)
  expected = norm_and_relu(convolve(expected, pointwise["kernel"]), params, stats)
  np.testing.assert_allclose(evaluate(unit, variables), expected, rtol=1e-4, atol=1e-4)


def test_parallel_sum_adds_its_branches():
  shared = {"features": 4, "norm": NORM, "kernel_init": get_init("torch")}
  shared |= {"dropout_rate": 0.0, "dtype": F32}
  plain = partial(DepthwiseSeparableUnit, **shared)
  dilated = partial(ConvUnit, padding=4, pad_mode="reflect", dilation=4, **shared)
  stats = {name: {"norm": random_norm(4)[1]} for name in ("plain", "dilated")}
  params = {
    "plain": {
      "depthwise": random_kernel(3, 3, 1, 3),
      "pointwise": random_kernel(1, 1, 3, 4),
      "norm": random_norm(4)[0],
    },
    "dilated": {"conv": random_kernel(3, 3, 3, 4), "norm": random_norm(4)[0]},
  }
  parts = [
    evaluate(unit(), {"params": params[name], "batch_stats": stats[name]})
    for name, unit in (("plain", plain), ("dilated", dilated))
  ]
  total = evaluate(ParallelSum(plain, dilated), {"params": params, "batch_stats": stats})
  assert all(np.any(part) for part in parts)
  np.testing.assert_allclose(total, parts[0] + parts[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, 2, 8])
def test_pad_reflect_equals_numpy(padding):
  widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  np.testing.assert_array_equal(pad_reflect(X, padding), np.pad(X, widths, mode="reflect"))


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_takes_the_maximum_of_each_whole_window(window):
  actual = np.asarray(MaxPool(window).apply({}, X))
  assert actual.shape == (2, 12 // window, 11 // window, 3)
  for i, j in np.ndindex(actual.shape[1:3]):
    tile = X[:, i * window : (i + 1) * window, j * window : (j + 1) * window]
    np.testing.assert_array_equal(actual[:, i, j], tile.max((1, 2)))


def test_global_average_pool_is_the_mean_over_positions():
  actual = GlobalAveragePool().apply({}, X)
  assert actual.shape == (2, 1, 1, 3)
  np.testing.assert_allclose(actual[:, 0, 0], X.astype(np.float64).mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_head_gives_float32_logits_without_bias(dtype):
  head, x = ConvHead(7, get_init("torch")), jnp.asarray(X, dtype)
  variables = jax.jit(head.init)(KEY, x)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"conv": {"kernel": (1, 1, 3, 7)}}}
  logits = jax.jit(head.apply)(variables, x)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  kernel = np.asarray(variables["params"]["conv"]["kernel"])[0, 0]
  mean = np.asarray(x, np.float64).mean((1, 2))
  np.testing.assert_allclose(logits, mean @ kernel, atol=1e-5)


def test_a_head_with_bias_adds_it():
  head = ConvHead(7, nn.initializers.zeros, use_bias=True)
  bias = RNG.normal(size=7).astype(np.float32)
  conv = {"kernel": np.zeros((1, 1, 3, 7), np.float32), "bias": bias}
  logits = head.apply({"params": {"conv": conv}}, X)
  np.testing.assert_array_equal(logits, [bias] * 2)


def test_the_convolutions_of_units_have_no_bias_unless_told():
  for unit in (ConvUnit, DepthwiseSeparableUnit):
    module = unit(5, NoNorm, get_init("torch"), 0.0, F32)
    variables = jax.eval_shape(partial(module.init, train=False), KEY, X)
    assert all(set(conv) == {"kernel"} for conv in variables["params"].values())


@pytest.mark.parametrize("shape", [(3, 3, 32, 64), (1, 1, 256, 64), (3, 3, 1, 1024)])
def test_torchs_init_is_uniform_within_one_over_the_root_of_the_fan_in(shape):
  kernel = np.asarray(jax.jit(partial(get_init("torch"), shape=shape))(KEY))
  fan_in = np.prod(shape[:3])
  bound = 1 / np.sqrt(fan_in)
  assert 0.99 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
  # A uniform's fourth moment is 9/5 of its squared variance: sd of the mean square is 0.9 / sqrt N.
  np.testing.assert_allclose((kernel**2).mean() * 3 * fan_in, 1, atol=5 * 0.9 / kernel.size**0.5)
  assert abs(kernel.mean()) < 5 * bound / np.sqrt(3 * kernel.size)


def test_flaxs_init_has_the_variance_one_over_fan_in():
  kernel = np.asarray(jax.jit(partial(get_init("flax"), shape=(3, 3, 32, 64)))(KEY))
  np.testing.assert_allclose((kernel**2).mean() * 288, 1, atol=5 * (2 / kernel.size) ** 0.5)


@pytest.mark.parametrize("unit", [ConvUnit, ConvHead])
def test_torchs_bias_is_uniform_within_one_over_the_root_of_the_fan_in(unit):
  x = jnp.zeros((1, 4, 4, 5))
  if unit is ConvHead:
    variables, fan_in = ConvHead(4096, get_init("torch"), use_bias=True).init(KEY, x), 5
  else:
    module = ConvUnit(4096, NoNorm, get_init("torch"), 0.0, F32, (3, 1), use_bias=True)
    variables, fan_in = jax.jit(partial(module.init, train=False))(KEY, x), 15
  bias = np.asarray(variables["params"]["conv"]["bias"])
  assert 0.99 / fan_in**0.5 < np.abs(bias).max() <= (1 + 1e-6) / fan_in**0.5
  np.testing.assert_allclose((bias**2).mean() * 3 * fan_in, 1, atol=5 * 0.9 / bias.size**0.5)
  assert abs(bias.mean()) < 5 / np.sqrt(3 * fan_in * bias.size)


@pytest.mark.parametrize("name", ["flax", "he"])
def test_the_other_biases_start_at_zero(name):
  assert (get_bias_init(get_init(name), 9)(KEY, (64,), F32) == 0).all()


@pytest.mark.parametrize("unit", [ConvUnit, DepthwiseSeparableUnit])
@pytest.mark.parametrize("norm", [NORM, partial(GroupNorm, num_groups=1, epsilon=EPSILON), NoNorm])
def test_a_unit_returns_the_type_it_computes_in(unit, norm):
  module = unit(4, norm, get_init("torch"), 0.5, jnp.bfloat16)
  variables = jax.eval_shape(partial(module.init, train=False), KEY, X)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(F32)}
  apply = partial(
    module.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
  )
  y, changed = jax.eval_shape(apply, variables, X)
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == F32 for leaf in jax.tree.leaves(changed))


def test_a_depthwise_kernel_has_the_fan_in_of_one_channel():
  unit = DepthwiseSeparableUnit(4, NoNorm, get_init("torch"), 0.0, F32)
  x = jnp.zeros((1, 4, 4, 512))
  init = jax.jit(partial(unit.init, train=False))
  kernel = np.asarray(init(KEY, x)["params"]["depthwise"]["kernel"])
  assert kernel.shape == (3, 3, 1, 512)
  assert 0.99 / 3 < np.abs(kernel).max() <= 1 / 3 + 1e-6


@pytest.mark.parametrize("unit", [ConvUnit, DepthwiseSeparableUnit, ConvHead])
def test_every_convolution_uses_the_initialiser_it_is_given(unit):
  seven = nn.initializers.constant(7)
  if unit is ConvHead:
    variables = jax.jit(ConvHead(4, seven).init)(KEY, X)
  else:
    variables = jax.jit(partial(unit(4, NoNorm, seven, 0.0, F32).init, train=False))(KEY, X)
  kernels = jax.tree.leaves(variables["params"])
  assert kernels
  assert all((kernel == 7).all() for kernel in kernels)


def test_an_unknown_init_is_an_error_that_lists_the_choices():
  with pytest.raises(UserError, match=r"model\.init='torhc' is unknown; .*torch, flax.*'torch'"):
    get_init("torhc")


@pytest.mark.parametrize("unit", [ConvUnit, DepthwiseSeparableUnit])
def test_dropout_of_a_unit_acts_in_training_only(unit):
  module = unit(16, NoNorm, nn.initializers.constant(0.5), 0.25, F32)
  x = np.ones((4, 16, 16, 3), np.float32)
  variables = jax.jit(partial(module.init, train=False))(KEY, x)
  plain = np.asarray(evaluate(module, variables, x))
  assert (plain > 0).all()
  apply = jax.jit(partial(module.apply, train=True))
  dropped = np.asarray(apply(variables, x, rngs={"dropout": jax.random.key(1)}))
  kept = dropped != 0
  sigma = (0.25 * 0.75 / kept.size) ** 0.5
  assert abs(kept.mean() - 0.75) < 5 * sigma
  np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-5)


def test_he_init_keeps_the_variance_through_conv_and_relu():
  """Variance 2 / fan_in: ReLU halves the second moment, the kernel doubles it back."""
  kernel = np.asarray(jax.jit(partial(get_init("he"), shape=(3, 3, 32, 64)))(KEY))
  assert kernel.var() == pytest.approx(2 / (9 * 32), rel=0.05)
