"""Building blocks against convolutions written in float64 NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from flax_cifar import errors, models
from flax_cifar.kernels import backend
from flax_cifar.kernels.native import library
from flax_cifar.models import blocks, norms
from tests import reference

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 12, 11, 3)).astype(np.float32)
KEY = jax.random.key(0, impl="rbg")  # compiles much faster than threefry
NORM = partial(norms.BatchNorm, momentum=0.9, epsilon=1e-5)
F32 = jnp.float32


# The images have three channels.
UNITS = [
  blocks.ConvUnit,
  partial(blocks.ConvUnit, stride=2, groups=3),
  blocks.DepthwiseSeparableUnit,
  blocks.SpatiallySeparableUnit,
  partial(blocks.GroupedUnit, kernel_sizes=(3, 5, 3), dilations=(1, 1, 2)),
]


def random_kernel(*shape):
  return {"kernel": RNG.normal(size=shape).astype(np.float32)}


def random_norm(channels):
  """Parameters and statistics of a batch norm that commutes neither with ReLU nor with a conv."""
  scale, bias, mean = RNG.normal(size=(3, channels)).astype(np.float32)
  var = RNG.uniform(0.5, 2, channels).astype(np.float32)
  return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}


def evaluate(module, variables, x=X):
  return jax.jit(partial(module.apply, train=False))(variables, x)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
  ("kernel_size", "padding", "pad_mode", "dilation", "stride"),
  [
    (1, 0, "zeros", 1, 1),
    (3, 0, "zeros", 1, 1),
    (3, 1, "zeros", 1, 1),
    (3, 2, "zeros", 2, 1),
    (3, 1, "zeros", 2, 1),
    (3, 1, "reflect", 2, 1),
    (3, 2, "reflect", 2, 1),
    (3, 4, "reflect", 4, 1),
    (3, 8, "reflect", 8, 1),
    (1, 0, "zeros", 1, 2),
    (3, 1, "zeros", 1, 2),
    (3, 0, "zeros", 1, 2),
    (3, 1, "reflect", 1, 2),
    (3, 2, "zeros", 2, 2),
    (5, 2, "zeros", 1, 3),
    ((3, 1), 1, "zeros", 1, 2),
  ],
)
def test_conv_unit_is_conv_then_norm_then_relu(
  kernel_size, padding, pad_mode, dilation, stride, groups
):
  unit = blocks.ConvUnit(
    6,
    NORM,
    models.get_init("torch"),
    0.0,
    F32,
    kernel_size=kernel_size,
    padding=padding,
    pad_mode=pad_mode,
    dilation=dilation,
    stride=stride,
    groups=groups,
  )
  sides = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
  params, stats = random_norm(6)
  conv = random_kernel(*sides, 3 // groups, 6)
  variables = {"params": {"conv": conv, "norm": params}, "batch_stats": {"norm": stats}}
  mode = {"zeros": "constant", "reflect": "reflect"}[pad_mode]
  expected = reference.convolve(
    X, conv["kernel"], padding=padding, dilation=dilation, stride=stride, mode=mode
  )
  actual = evaluate(unit, variables)
  np.testing.assert_allclose(
    actual, reference.norm_and_relu(expected, params, stats), rtol=1e-4, atol=1e-4
  )
  assert (np.asarray(actual) == 0).any()


@pytest.mark.parametrize(("stride", "shape"), [(1, (12, 11)), (2, (6, 6)), (3, (4, 4))])
def test_a_strided_depthwise_unit_does_not_mix_channels(stride, shape):
  """As many filters as channels; sizes are floor((size - 1) / stride) + 1."""
  unit = blocks.ConvUnit(
    3, norms.NoNorm, models.get_init("torch"), 0.0, F32, stride=stride, groups=3
  )
  conv = random_kernel(3, 3, 1, 3)
  actual = np.asarray(evaluate(unit, {"params": {"conv": conv}}))
  assert actual.shape == (2, *shape, 3)
  for channel in range(3):
    own = slice(channel, channel + 1)
    expected = reference.convolve(X[..., own], conv["kernel"][..., own], padding=1, stride=stride)
    np.testing.assert_allclose(actual[..., own], np.maximum(expected, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [1, (3, 1), (1, 3), (1, 1)])
def test_padding_is_on_all_four_sides_for_every_kernel(sides):
  """As in torch: where a side of the kernel is 1, the map grows by 2; the rim equals the bias."""
  unit = blocks.ConvUnit(
    5, norms.NoNorm, models.get_init("torch"), 0.0, F32, kernel_size=sides, use_bias=True
  )
  height, width = (sides, sides) if isinstance(sides, int) else sides
  conv = random_kernel(height, width, 3, 5)
  conv["bias"] = RNG.normal(size=5).astype(np.float32)
  expected = reference.convolve(X, conv["kernel"], padding=1) + conv["bias"]
  actual = evaluate(unit, {"params": {"conv": conv}})
  assert actual.shape == (2, 12 + 3 - height, 11 + 3 - width, 5)
  np.testing.assert_allclose(actual, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)


def test_the_other_order_is_conv_then_relu_then_norm():
  unit = blocks.ConvUnit(5, NORM, models.get_init("torch"), 0.0, F32, order="conv_relu_norm")
  params, stats = random_norm(5)
  conv = random_kernel(3, 3, 3, 5)
  variables = {"params": {"conv": conv, "norm": params}, "batch_stats": {"norm": stats}}
  expected = reference.normalize(
    np.maximum(reference.convolve(X, conv["kernel"], padding=1), 0), params, stats
  )
  actual = evaluate(unit, variables)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  assert (np.asarray(actual) < 0).any()


def add_conv(x, conv, **options):
  return reference.convolve(x, conv["kernel"], **options) + conv.get("bias", 0)


def run_depthwise(x, convs):
  x = add_conv(x, convs["depthwise"], padding=1)
  return add_conv(x, convs["pointwise"])


def run_spatial(x, convs):
  x = add_conv(x, convs["vertical"], padding=(1, 0))
  return add_conv(x, convs["horizontal"], padding=(0, 1))


def run_groups(x, convs, kernel_sizes=(3, 3), dilations=(1, 1)):
  """Output channel c belongs to group c modulo the number of groups."""
  parts = np.split(x, len(kernel_sizes), -1)
  y = np.empty((*x.shape[:3], 6))
  for g, (part, size, dilation) in enumerate(zip(parts, kernel_sizes, dilations, strict=True)):
    padding = dilation * (size // 2)
    y[..., g :: len(parts)] = add_conv(
      part, convs[f"group{g + 1}"], padding=padding, dilation=dilation
    )
  return y


def create_case(unit, run, **options):
  return partial(unit, **options), partial(run, **options)


X6 = RNG.normal(size=(2, 12, 11, 6)).astype(np.float32)
SEPARABLE_AND_GROUPED = {
  "depthwise": create_case(blocks.DepthwiseSeparableUnit, run_depthwise),
  "spatial": create_case(blocks.SpatiallySeparableUnit, run_spatial),
  "grouped": create_case(blocks.GroupedUnit, run_groups),
  "kernel sizes": create_case(blocks.GroupedUnit, run_groups, kernel_sizes=(3, 5)),
  "dilations": create_case(blocks.GroupedUnit, run_groups, dilations=(1, 2)),
  "three groups": create_case(
    blocks.GroupedUnit, run_groups, kernel_sizes=(1, 3, 5), dilations=(1, 3, 2)
  ),
}


def draw_variables(module, x):
  """Random variables in the shapes of a module that has a batch norm."""
  shapes = jax.eval_shape(partial(module.init, train=False), KEY, x)["params"]
  convs = {name: shapes[name] for name in shapes if name != "norm"}
  convs = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), convs)
  params, stats = random_norm(module.features)
  return convs, {"params": {**convs, "norm": params}, "batch_stats": {"norm": stats}}


@pytest.mark.parametrize(
  ("order", "use_bias"), [("conv_norm_relu", False), ("conv_relu_norm", True)]
)
@pytest.mark.parametrize("name", SEPARABLE_AND_GROUPED)
def test_separable_and_grouped_units_equal_numpy(name, order, use_bias):
  unit, run = SEPARABLE_AND_GROUPED[name]
  module = unit(6, NORM, models.get_init("torch"), 0.0, F32, order=order, use_bias=use_bias)
  convs, variables = draw_variables(module, X6)
  norm = variables["params"]["norm"], variables["batch_stats"]["norm"]
  expected = run(X6.astype(np.float64), convs)
  if order == "conv_norm_relu":
    expected = reference.norm_and_relu(expected, *norm)
  else:
    expected = reference.normalize(np.maximum(expected, 0), *norm)
  actual = evaluate(module, variables, X6)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("unit", "names"),
  [
    (blocks.ConvUnit, {"conv"}),
    (blocks.DepthwiseSeparableUnit, {"pointwise"}),
    (blocks.SpatiallySeparableUnit, {"horizontal"}),
    (blocks.GroupedUnit, {"group1", "group2"}),
  ],
)
def test_a_bias_is_added_once_to_each_output(unit, names):
  module = unit(6, norms.NoNorm, models.get_init("torch"), 0.0, F32, use_bias=True)
  variables = jax.eval_shape(partial(module.init, train=False), KEY, X6)
  convs = variables["params"]
  assert {name for name, conv in convs.items() if "bias" in conv} == names


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_with_equal_kernels_are_a_grouped_convolution_and_a_shuffle_of_channels(groups):
  options = {"kernel_sizes": (3,) * groups, "dilations": (2,) * groups}
  module = blocks.GroupedUnit(12, norms.NoNorm, models.get_init("torch"), 0.0, F32, **options)
  convs = {f"group{g + 1}": random_kernel(3, 3, 6 // groups, 12 // groups) for g in range(groups)}
  y = jax.lax.conv_general_dilated(
    X6,
    np.concatenate([conv["kernel"] for conv in convs.values()], -1),
    (1, 1),
    "SAME",
    rhs_dilation=(2, 2),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
    precision="highest",
  )
  y = np.asarray(y).reshape(*y.shape[:3], groups, -1)
  expected = np.maximum(y.swapaxes(-1, -2).reshape(*y.shape[:3], 12), 0)
  actual = evaluate(module, {"params": convs}, X6)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_each_group_of_the_next_grouped_unit_reads_from_all_groups_of_this_one():
  module = blocks.GroupedUnit(6, norms.NoNorm, nn.initializers.constant(1), 0.0, F32)
  variables = jax.jit(partial(module.init, train=False))(KEY, X6)
  only_first = np.concatenate([np.ones_like(X6[..., :3]), np.zeros_like(X6[..., 3:])], -1)
  once = evaluate(module, variables, only_first)
  assert (np.asarray(once) > 0).any((0, 1, 2)).tolist() == [True, False] * 3
  assert (np.asarray(evaluate(module, variables, once)) > 0).any((0, 1, 2)).all()


@pytest.mark.parametrize(("channels", "features"), [(5, 6), (6, 5), (5, 5)])
def test_channels_that_groups_cannot_share_are_an_error(channels, features):
  module = blocks.GroupedUnit(features, norms.NoNorm, models.get_init("torch"), 0.0, F32)
  x = jax.ShapeDtypeStruct((1, 4, 4, channels), F32)
  with pytest.raises(ValueError, match=f"2 groups cannot share {channels} -> {features} channels"):
    jax.eval_shape(partial(module.init, train=False), KEY, x)


def test_each_group_needs_a_kernel_size_and_a_dilation():
  module = blocks.GroupedUnit(
    6, norms.NoNorm, models.get_init("torch"), 0.0, F32, kernel_sizes=(3, 5, 7)
  )
  with pytest.raises(ValueError, match="zip"):
    jax.eval_shape(partial(module.init, train=False), KEY, X6)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("side", [(12, 11), (7, 7), (8, 8)])
def test_transition_is_a_bare_convolution_then_a_pool(side, pool):
  x = RNG.normal(size=(2, *side, 3)).astype(np.float32)
  module = blocks.Transition(5, models.get_init("torch"), F32, pool=pool)
  conv = random_kernel(1, 1, 3, 5)
  expected = reference.convolve(x, conv["kernel"])
  if pool:
    height, width = side[0] // 2, side[1] // 2
    corners = [
      expected[:, i : 2 * height : 2, j : 2 * width : 2] for i in range(2) for j in range(2)
    ]
    expected = np.max(corners, 0)
  actual = jax.jit(module.apply)({"params": {"conv": conv}}, x)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
  assert (np.asarray(actual) < 0).any()  # no ReLU


def test_a_transition_has_one_kernel_and_returns_the_type_it_computes_in():
  module = blocks.Transition(5, models.get_init("torch"), jnp.bfloat16)
  y, variables = jax.eval_shape(module.init_with_output, KEY, X)
  assert y.dtype == jnp.bfloat16
  kernel = jax.ShapeDtypeStruct((1, 1, 3, 5), F32)
  assert variables == {"params": {"conv": {"kernel": kernel}}}


def test_parallel_sum_adds_its_branches():
  shared = {"features": 4, "norm": NORM, "kernel_init": models.get_init("torch")}
  shared |= {"dropout_rate": 0.0, "dtype": F32}
  plain = partial(blocks.DepthwiseSeparableUnit, **shared)
  dilated = partial(blocks.ConvUnit, padding=4, pad_mode="reflect", dilation=4, **shared)
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
  total = evaluate(blocks.ParallelSum(plain, dilated), {"params": params, "batch_stats": stats})
  assert all(np.any(part) for part in parts)
  np.testing.assert_allclose(total, parts[0] + parts[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_takes_the_maximum_of_each_whole_window(window):
  actual = np.asarray(blocks.MaxPool(window).apply({}, jnp.asarray(X)))
  assert actual.shape == (2, 12 // window, 11 // window, 3)
  for i, j in np.ndindex(actual.shape[1:3]):
    tile = X[:, i * window : (i + 1) * window, j * window : (j + 1) * window]
    np.testing.assert_array_equal(actual[:, i, j], tile.max((1, 2)))


def test_global_average_pool_is_the_mean_over_positions():
  actual = blocks.GlobalAveragePool().apply({}, jnp.asarray(X))
  assert actual.shape == (2, 1, 1, 3)
  np.testing.assert_allclose(actual[:, 0, 0], X.astype(np.float64).mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_head_gives_float32_logits_without_bias(dtype):
  head, x = blocks.ConvHead(7, models.get_init("torch")), jnp.asarray(X, dtype)
  variables = jax.jit(head.init)(KEY, x)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"conv": {"kernel": (1, 1, 3, 7)}}}
  logits = jax.jit(head.apply)(variables, x)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  kernel = np.asarray(variables["params"]["conv"]["kernel"])[0, 0]
  mean = np.asarray(x, np.float64).mean((1, 2))
  np.testing.assert_allclose(logits, mean @ kernel, atol=1e-5)


def test_a_head_with_bias_adds_it():
  head = blocks.ConvHead(7, nn.initializers.zeros, use_bias=True)
  bias = RNG.normal(size=7).astype(np.float32)
  conv = {"kernel": np.zeros((1, 1, 3, 7), np.float32), "bias": bias}
  logits = head.apply({"params": {"conv": conv}}, jnp.asarray(X))
  np.testing.assert_array_equal(logits, [bias] * 2)


def test_the_convolutions_of_units_have_no_bias_by_default():
  for unit in UNITS:
    module = unit(6, norms.NoNorm, models.get_init("torch"), 0.0, F32)
    variables = jax.eval_shape(partial(module.init, train=False), KEY, X)
    assert all(set(conv) == {"kernel"} for conv in variables["params"].values())


def assert_uniform(values, fan_in):
  """Within 1 / sqrt(fan_in), with the moments of a uniform distribution."""
  values, bound = np.asarray(values), 1 / np.sqrt(fan_in)
  assert 0.98 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
  # A uniform's fourth moment is 9/5 of its squared variance: sd of the mean square is 0.9 / sqrt N.
  np.testing.assert_allclose((values**2).mean() * 3 * fan_in, 1, atol=5 * 0.9 / values.size**0.5)
  assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)


@pytest.mark.parametrize("shape", [(3, 3, 32, 64), (1, 1, 256, 64), (3, 3, 1, 1024)])
def test_torchs_init_is_uniform_within_one_over_the_root_of_the_fan_in(shape):
  kernel = jax.jit(partial(models.get_init("torch"), shape=shape))(KEY)
  assert_uniform(kernel, np.prod(shape[:3]))


@pytest.mark.parametrize("shape", [(3, 3, 32, 64), (3, 3, 1, 1024), (768, 512)])
def test_keras_init_is_that_of_glorot(shape):
  """Uniform within sqrt(6 / (fan_in + fan_out)): Glorot and Bengio 2010, equation 16."""
  *window, fan_in, fan_out = shape
  kernel = jax.jit(partial(models.get_init("keras"), shape=shape))(KEY)
  assert_uniform(kernel, np.prod(window) * (fan_in + fan_out) / 6)


def test_flaxs_init_has_the_variance_one_over_fan_in():
  kernel = np.asarray(jax.jit(partial(models.get_init("flax"), shape=(3, 3, 32, 64)))(KEY))
  np.testing.assert_allclose((kernel**2).mean() * 288, 1, atol=5 * (2 / kernel.size) ** 0.5)


@pytest.mark.parametrize(
  ("unit", "fan_ins"),
  [
    (partial(blocks.ConvUnit, kernel_size=(3, 1)), {"conv": 3 * 64}),
    (partial(blocks.ConvUnit, stride=2), {"conv": 9 * 64}),
    (partial(blocks.ConvUnit, groups=4), {"conv": 9 * 16}),
    (partial(blocks.ConvUnit, groups=64), {"conv": 9}),
    (blocks.DepthwiseSeparableUnit, {"depthwise": 9, "pointwise": 64}),
    (blocks.SpatiallySeparableUnit, {"vertical": 3 * 64, "horizontal": 3 * 1024}),
    (partial(blocks.GroupedUnit, kernel_sizes=(3, 5)), {"group1": 9 * 32, "group2": 25 * 32}),
    (partial(blocks.GroupedUnit, dilations=(1, 2)), {"group1": 9 * 32, "group2": 9 * 32}),
  ],
)
def test_torchs_kernels_and_biases_are_bounded_by_the_fan_in(unit, fan_ins):
  module = unit(1024, norms.NoNorm, models.get_init("torch"), 0.0, F32, use_bias=True)
  convs = jax.jit(partial(module.init, train=False))(KEY, jnp.zeros((1, 4, 4, 64)))["params"]
  assert set(convs) == set(fan_ins)
  assert any("bias" in conv for conv in convs.values())
  for name, conv in convs.items():
    for values in conv.values():
      assert_uniform(values, fan_ins[name])


def test_torchs_bias_of_a_head_is_bounded_by_its_input_channels():
  head = blocks.ConvHead(4096, models.get_init("torch"), use_bias=True)
  assert_uniform(head.init(KEY, jnp.zeros((1, 4, 4, 5)))["params"]["conv"]["bias"], 5)


@pytest.mark.parametrize("name", ["flax", "he", "keras"])
def test_the_other_biases_start_at_zero(name):
  assert (blocks.get_bias_init(models.get_init(name), 9)(KEY, (64,), F32) == 0).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
  "norm", [NORM, partial(norms.GroupNorm, num_groups=1, epsilon=1e-5), norms.NoNorm]
)
def test_a_unit_returns_the_type_it_computes_in(unit, norm):
  module = unit(6, norm, models.get_init("torch"), 0.5, jnp.bfloat16)
  variables = jax.eval_shape(partial(module.init, train=False), KEY, X)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(F32)}
  apply = partial(
    module.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
  )
  y, changed = jax.eval_shape(apply, variables, X)
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == F32 for leaf in jax.tree.leaves(changed))


@pytest.mark.parametrize("unit", [*UNITS, blocks.Transition, blocks.ConvHead])
def test_every_convolution_uses_the_given_initializer(unit):
  seven = nn.initializers.constant(7)
  if unit is blocks.ConvHead:
    variables = jax.jit(blocks.ConvHead(4, seven).init)(KEY, X)
  elif unit is blocks.Transition:
    variables = jax.jit(blocks.Transition(4, seven, F32).init)(KEY, X)
  else:
    variables = jax.jit(partial(unit(6, norms.NoNorm, seven, 0.0, F32).init, train=False))(KEY, X)
  kernels = jax.tree.leaves(variables["params"])
  assert kernels
  assert all((kernel == 7).all() for kernel in kernels)


def draw_smooth(count=64):
  """Images whose neighbouring pixels and channels are alike."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(count, 9, 9, 1)) + 0.3 * rng.normal(size=(count, 9, 9, 3))
  return jnp.asarray(base[:, 1:, 1:] + base[:, :-1, :-1], jnp.float32)


def test_whitened_patches_are_uncorrelated_and_come_with_their_negatives():
  images = draw_smooth()
  layer = blocks.Whitening(24, (2, 2), padding=0)
  y, variables = layer.init_with_output(jax.random.key(0), images)
  assert y.shape == (64, 7, 7, 24)
  assert {name: leaf.shape for name, leaf in variables["params"].items()} == {
    "fixed_kernel": (2, 2, 3, 24),
    "bias": (24,),
  }
  values = np.asarray(y, np.float64).reshape(-1, 24)
  np.testing.assert_array_equal(values[:, 12:], -values[:, :12])
  covariance = values[:, :12].T @ values[:, :12] / len(values)
  np.testing.assert_allclose(covariance, np.eye(12), atol=0.02)  # epsilon shrinks the smallest
  taps = [images[:, i : i + 7, j : j + 7] for i in range(2) for j in range(2)]
  kernel = np.asarray(variables["params"]["fixed_kernel"], np.float64).reshape(12, 24)
  np.testing.assert_allclose(np.concatenate(taps, -1).reshape(-1, 12) @ kernel, values, atol=1e-4)


def test_a_whitening_kernel_gets_no_gradient_and_its_bias_does():
  images = draw_smooth(4)
  layer = blocks.Whitening(24, (2, 2), padding=0)
  variables = layer.init(jax.random.key(0), images)
  gradients = jax.grad(lambda v: (layer.apply(v, images) ** 3).sum())(variables)["params"]
  assert not gradients["fixed_kernel"].any()
  assert gradients["bias"].any()


def test_a_whitening_needs_two_outputs_for_each_value_of_a_patch():
  with pytest.raises(ValueError, match="two outputs for each value of a patch"):
    blocks.Whitening(23, (2, 2), padding=0).init(jax.random.key(0), draw_smooth(1))


def test_an_unknown_init_is_an_error_that_lists_the_choices():
  with pytest.raises(
    errors.UserError, match=r"model\.init='torhc' is unknown; .*torch, flax.*'torch'"
  ):
    models.get_init("torhc")


@pytest.mark.parametrize("unit", UNITS)
def test_dropout_of_a_unit_acts_in_training_only(unit):
  module = unit(18, norms.NoNorm, nn.initializers.constant(0.5), 0.25, F32)
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
  """Variance 2 / fan_in: ReLU halves the second moment, and the kernel doubles it."""
  kernel = np.asarray(jax.jit(partial(models.get_init("he"), shape=(3, 3, 32, 64)))(KEY))
  assert kernel.var() == pytest.approx(2 / (9 * 32), rel=0.05)


@pytest.mark.parametrize(
  "ignored",
  [
    {"input_dilation": 2},
    {"mask": np.ones((3, 3, 3, 4))},
    {"precision": "highest"},
    {"param_dtype": jnp.bfloat16},
    {"conv_general_dilated": jax.lax.conv_general_dilated},
  ],
)
def test_attributes_that_a_convolution_would_ignore_are_refused(ignored):
  with pytest.raises(ValueError, match=rf"{next(iter(ignored))}=[\s\S]* has no effect"):
    blocks.Conv(4, (3, 3), **ignored).init(KEY, jnp.asarray(X))


# ---- Units in C++


UNIT_NORMS = {
  "batch": NORM,
  "ghost": partial(NORM, num_splits=2),
  "fixed scale": partial(NORM, train_scale=False),
  "group": partial(norms.GroupNorm, num_groups=4, epsilon=1e-5),
  "layer": partial(norms.GroupNorm, num_groups=1, epsilon=1e-5, affine=False),
  "none": norms.NoNorm,
}
residual = partial(blocks.ResidualSeparableUnit, 32)
conv = partial(blocks.ConvUnit, 24)
CPP_UNITS = {
  **{f"residual {n}": (residual, n, 0.0, True) for n in ("batch", "fixed scale", "group", "none")},
  "residual evaluation": (residual, "batch", 0.1, False),
  "residual dropout": (residual, "batch", 0.1, True),
  "gelu": (partial(residual, activation="gelu"), "batch", 0.1, True),
  "glu": (partial(residual, activation="glu", squeeze_excite=0.25), "batch", 0.1, True),
  **{
    f"squeeze excite {norm}": (partial(residual, squeeze_excite=0.25), norm, 0.0, True)
    for norm in ("batch", "ghost", "layer")
  },
  "squeeze excite evaluation": (partial(residual, squeeze_excite=0.25), "batch", 0.0, False),
  "drop path": (partial(residual, activation="silu", drop_path=0.5), "layer", 0.0, True),
  "strided": (partial(blocks.ResidualSeparableUnit, 48, stride=2), "batch", 0.0, True),
  **{
    f"conv {norm}": (partial(conv, use_bias=True), norm, 0.1, True)
    for norm in ("batch", "ghost", "layer", "none")
  },
  "conv evaluation": (conv, "batch", 0.1, False),
  "bare": (partial(conv, use_bias=True), "none", 0.0, True),
  "relu first": (partial(conv, order="conv_relu_norm"), "ghost", 0.0, True),
  "reflected": (partial(conv, pad_mode="reflect", padding=2, dilation=2), "batch", 0.0, True),
  "separable": (partial(blocks.DepthwiseSeparableUnit, 48), "batch", 0.1, True),
  "separable relu first": (
    *(partial(blocks.DepthwiseSeparableUnit, 48, order="conv_relu_norm"), "batch", 0.1, True),
  ),
  "pooled": (partial(blocks.PooledConvUnit, 16), "batch", 0.0, True),
}


@pytest.mark.parametrize("name", CPP_UNITS)
def test_a_unit_in_cpp_equals_its_modules(name, monkeypatch):
  if not library.is_available():
    pytest.skip("there is no C++ compiler")
  kind, norm, rate, train = CPP_UNITS[name]
  rng = np.random.default_rng(0)
  unit = kind(norm=UNIT_NORMS[norm], kernel_init=blocks.INITS["he"], dropout_rate=rate, dtype=F32)
  x = jnp.asarray(rng.normal(size=(8, 12, 11, 32)), F32)
  drawn = reference.draw_like(jax.eval_shape(partial(unit.init, train=False), KEY, x))
  variables = jax.tree.map(jnp.asarray, drawn)

  def run(params, x):
    y, changed = unit.apply(
      {**variables, "params": params},
      x,
      train=train,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(1)},
    )
    return y, changed

  def compute(params, x):
    y, backward, changed = jax.vjp(run, params, x, has_aux=True)
    return (y, changed), backward(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  results = []
  for backend_name in ("native", "definition"):
    monkeypatch.setenv(backend.VARIABLE, backend_name)
    step = jax.jit(lambda *a: compute(*a)).trace(variables.get("params", {}), x)
    assert ("flax_cifar_native" in str(step.jaxpr)) == (backend_name == "native")
    results.append(step.lower().compile()(variables.get("params", {}), x))
  values, gradients = zip(*results, strict=True)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), *values
  )
  # Rounding may switch a ReLU, which changes a few gradients by all that they are.
  actual, expected = (jax.flatten_util.ravel_pytree(tree)[0] for tree in gradients)
  assert jnp.linalg.norm(actual - expected) < 5e-3 * jnp.linalg.norm(expected)


ACTIVATIONS = {  # in float64
  "relu": lambda x: np.maximum(x, 0),
  "silu": lambda x: x / (1 + np.exp(-x)),
  "gelu": lambda x: x * special.ndtr(x),
  "glu": lambda x: x[..., :32] * special.expit(x[..., 32:]),
}


@pytest.mark.parametrize("squeeze", [0.0, 0.25])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_residual_unit_adds_its_activation_to_its_input(name, squeeze):
  options = {"activation": name, "squeeze_excite": squeeze}
  unit = residual(UNIT_NORMS["batch"], blocks.INITS["he"], 0.0, F32, **options)
  x = jnp.asarray(RNG.normal(size=(4, 6, 6, 32)), F32)
  variables = reference.draw_like(jax.eval_shape(partial(unit.init, train=False), KEY, x))
  params, stats = variables["params"], variables["batch_stats"]
  y = reference.convolve(np.asarray(x), params["depthwise"]["kernel"], padding=1)
  y = reference.normalize(y, params["depthwise_norm"], stats["depthwise_norm"])
  if squeeze:
    layers = params["squeeze_excite"]
    assert layers["squeeze"]["kernel"].shape == (1, 1, 32, 8)
    hidden = y.mean((1, 2)) @ layers["squeeze"]["kernel"][0, 0] + layers["squeeze"]["bias"]
    gate = np.maximum(hidden, 0) @ layers["excite"]["kernel"][0, 0] + layers["excite"]["bias"]
    y = y * special.expit(gate)[:, None, None]
  y = reference.convolve(y, params["pointwise"]["kernel"])
  y = np.asarray(x) + ACTIVATIONS[name](reference.normalize(y, params["norm"], stats["norm"]))
  actual = jax.jit(partial(unit.apply, train=False))(variables, x)
  # nn.gelu is an approximation, off by at most 5e-4.
  np.testing.assert_allclose(actual, y, atol=1e-3 if name == "gelu" else 1e-5)


def test_drop_path_leaves_out_whole_images_in_training_alone():
  rate, count = 0.25, 400
  kind = partial(residual, UNIT_NORMS["layer"], blocks.INITS["he"], 0.0, F32)
  x = jnp.asarray(RNG.normal(size=(count, 3, 3, 32)), F32)
  variables = kind().init(KEY, x, train=False)
  whole = kind().apply(variables, x, train=True) - x  # without drop path
  unit = kind(drop_path=rate)
  np.testing.assert_allclose(unit.apply(variables, x, train=False) - x, whole, atol=1e-6)
  branch = unit.apply(variables, x, train=True, rngs={"dropout": KEY}) - x
  left_out = np.all(np.asarray(branch) == 0, axis=(1, 2, 3))
  assert abs(left_out.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
  np.testing.assert_allclose(branch[~left_out], whole[~left_out] / (1 - rate), atol=1e-5)


def test_drop_path_keeps_the_mean_in_bfloat16():
  """It would be 0.2 % off if it divided by 0.9 as bfloat16 rounds it."""
  kind = partial(residual, UNIT_NORMS["layer"], blocks.INITS["he"], 0.0, jnp.bfloat16)
  x = jnp.asarray(RNG.normal(size=(400, 3, 3, 32)), jnp.bfloat16)
  variables = kind().init(KEY, x, train=False)
  outputs = (
    unit.apply(variables, x, train=True, rngs={"dropout": KEY})
    for unit in (kind(), kind(drop_path=0.1))
  )
  whole, branch = (np.asarray(y, np.float64) - np.asarray(x, np.float64) for y in outputs)
  kept = np.any(branch != 0, axis=(1, 2, 3))
  assert 0.9 * branch[kept].sum() / whole[kept].sum() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("option", [{"use_bias": True}, {"order": "conv_relu_norm"}])
def test_a_residual_unit_refuses_what_it_would_ignore(option):
  unit = residual(NORM, blocks.INITS["he"], 0.0, F32, **option)
  with pytest.raises(ValueError, match="a residual unit has no bias"):
    unit.init(KEY, jnp.zeros((1, 8, 8, 32)), train=False)


def test_a_residual_unit_with_a_norm_of_its_own_is_computed_by_modules(monkeypatch):
  """A norm without get_affine, as in docs/extending.md."""
  if library.is_available():
    monkeypatch.setenv(backend.VARIABLE, "native")

  class Halve(nn.Module):
    relu: bool = False

    def __call__(self, x, train):
      return nn.relu(x / 2) if self.relu else x / 2

  unit = blocks.ResidualSeparableUnit(32, Halve, blocks.INITS["he"], 0.0, F32)
  x = jnp.asarray(RNG.normal(size=(2, 4, 4, 32)), F32)
  y, variables = unit.init_with_output(KEY, x, train=False)
  np.testing.assert_array_equal(unit.apply(variables, x, train=False), y)
