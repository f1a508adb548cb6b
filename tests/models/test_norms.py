"""Norms against float64 NumPy, PyTorch's definition of the statistics, and Flax's own layers."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from flax_cifar import errors, models
from flax_cifar.configs import common
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels import norm_relu
from flax_cifar.models import norms
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from tests.kernels.native import definitions

pytestmark = pytest.mark.usefixtures("optimized")

EPSILON = 1e-5
RNG = np.random.default_rng(0)
X = RNG.normal(1.5, 2.0, (8, 3, 5, 4)).astype(np.float32)
SCALE, BIAS = (RNG.normal(1, 0.5, (2, 4))).astype(np.float32)
MEAN, VAR = RNG.uniform(0.5, 3, (2, 4)).astype(np.float32)
VARIABLES = {
  "params": {"scale": SCALE, "bias": BIAS},
  "batch_stats": {"mean": MEAN, "var": VAR},
}
GROUP_VARIABLES = {"params": VARIABLES["params"]}


def batch_norm(num_splits=1):
  return norms.BatchNorm(momentum=0.9, epsilon=EPSILON, num_splits=num_splits)


def apply(norm, variables, x, *arguments, **options):
  """Linen's `apply` for arrays of NumPy."""
  return norm.apply(*jax.tree.map(jnp.asarray, (variables, x)), *arguments, **options)


def init(norm, train=False):
  return norm.init(jax.random.key(0, impl="rbg"), jnp.asarray(X), train)


@partial(jax.jit, static_argnums=0)
def train_step(norm, variables, x):
  return norm.apply(variables, x, True, mutable=["batch_stats"])


def normalize(x, axes):
  x = x.astype(np.float64)
  return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPSILON)


def group_norm_reference(x, groups):
  parts = np.split(x, groups, axis=-1)
  return np.concatenate([normalize(part, (1, 2, 3)) for part in parts], -1) * SCALE + BIAS


@pytest.mark.parametrize("num_splits", [1, 2, 4])
def test_each_interleaved_ghost_batch_is_normalized_by_itself(num_splits):
  y, _ = train_step(batch_norm(num_splits), VARIABLES, X)
  for part in range(num_splits):
    expected = normalize(X[part::num_splits], (0, 1, 2)) * SCALE + BIAS
    np.testing.assert_allclose(y[part::num_splits], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_running_statistics_are_those_of_torch_averaged_over_ghost_batches(num_splits, steps):
  variables, mean, var = VARIABLES, MEAN.astype(np.float64), VAR.astype(np.float64)
  for step in range(steps):
    x = X * (step + 1) + step
    _, changed = train_step(batch_norm(num_splits), variables, x)
    variables = variables | changed
    parts = [x[part::num_splits].reshape(-1, 4).astype(np.float64) for part in range(num_splits)]
    mean = 0.9 * mean + 0.1 * np.mean([part.mean(0) for part in parts], 0)
    var = 0.9 * var + 0.1 * np.mean([part.var(0, ddof=1) for part in parts], 0)
  np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5)
  np.testing.assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-5)


def test_statistics_start_at_mean_zero_and_variance_one():
  variables = init(batch_norm())
  assert variables["batch_stats"]["mean"].tolist() == [0] * 4
  assert variables["batch_stats"]["var"].tolist() == [1] * 4
  assert variables["params"]["scale"].tolist() == [1] * 4
  assert variables["params"]["bias"].tolist() == [0] * 4


@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_evaluation_uses_the_running_statistics_and_keeps_them(num_splits):
  norm = batch_norm(num_splits)  # three does not divide the batch, which is allowed here
  y, changed = apply(norm, VARIABLES, X, False, mutable=["batch_stats"])
  expected = (X.astype(np.float64) - MEAN) / np.sqrt(VAR.astype(np.float64) + EPSILON)
  np.testing.assert_allclose(y, expected * SCALE + BIAS, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(changed["batch_stats"]["mean"], MEAN)
  np.testing.assert_array_equal(changed["batch_stats"]["var"], VAR)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_equals_flax_in_output_and_running_mean(train):
  flax_norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON)
  expected, flax_stats = flax_norm.apply(VARIABLES, X, mutable=["batch_stats"])
  y, stats = apply(batch_norm(), VARIABLES, X, train, mutable=["batch_stats"])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    stats["batch_stats"]["mean"], flax_stats["batch_stats"]["mean"], rtol=1e-5
  )


def train_step_on(devices, module, x):
  """`train_step` on a mesh, as a run does it."""
  mesh = mesh_lib.create_mesh(devices)
  step = seeds_lib.map_seeds(
    partial(train_step, module), mesh, num_seeds=1, in_axes=(0, 0), out_axes=(0, 0)
  )
  return jax.jit(step)(VARIABLES, jax.device_put(x, mesh_lib.split_batch(mesh)))


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("num_splits", [1, 2, 4])
def test_statistics_cover_the_whole_batch_when_it_is_split_over_devices(devices, num_splits):
  y, stats = train_step_on(devices, batch_norm(num_splits), X)
  expected, expected_stats = train_step(batch_norm(num_splits), VARIABLES, X)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), stats, expected_stats)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_without_splits_each_device_has_its_own_statistics(devices):
  y, stats = train_step_on(devices, batch_norm(0), X)
  parts = [train_step(batch_norm(), VARIABLES, part) for part in np.split(X, devices)]
  np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-4, atol=1e-5)
  means = jax.tree.map(lambda *values: np.mean(values, 0), *(stats for _, stats in parts))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), stats, means)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_joined_statistics_survive_a_mean_far_from_zero(offset):
  (y, _), (expected, _) = (train_step_on(n, batch_norm(), X + np.float32(offset)) for n in (4, 1))
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=2e-3 if offset else 1e-5)


@pytest.mark.parametrize("num_splits", [3, 16, -2])
def test_a_number_of_splits_that_does_not_divide_the_batch_is_named(num_splits):
  with pytest.raises(ValueError, match=rf"num_splits={num_splits} .*batch size 8"):
    apply(batch_norm(num_splits), VARIABLES, X, True, mutable=["batch_stats"])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_matches_numpy(groups):
  y = apply(norms.GroupNorm(groups, EPSILON), GROUP_VARIABLES, X, True)
  np.testing.assert_allclose(y, group_norm_reference(X, groups), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_equals_flax(groups):
  y = apply(norms.GroupNorm(groups, EPSILON), GROUP_VARIABLES, X, False)
  expected = nn.GroupNorm(groups, epsilon=EPSILON).apply(GROUP_VARIABLES, X)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [3, 8, 0, -2])
def test_a_number_of_groups_that_does_not_divide_the_channels_is_named(groups):
  with pytest.raises(ValueError, match=rf"num_groups={groups} .*4 channels"):
    apply(norms.GroupNorm(groups, EPSILON), GROUP_VARIABLES, X, True)


def test_layer_norm_normalizes_over_channels_and_positions_together():
  norm = models.get_norm("layer", {"layer": {"epsilon": EPSILON}})()
  y = apply(norm, GROUP_VARIABLES, X, True)
  np.testing.assert_allclose(y, group_norm_reference(X, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_layer_norm_without_affine_has_no_parameters(train):
  norm = models.get_norm("layer", {"layer": {"epsilon": EPSILON, "affine": False}})()
  assert init(norm, train) == {}
  y = apply(norm, {}, X, train)
  np.testing.assert_allclose(y, normalize(X, (1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_fixed_scale_is_one_and_has_no_gradient(num_splits):
  norm = norms.BatchNorm(momentum=0.9, epsilon=EPSILON, num_splits=num_splits, train_scale=False)
  params = jax.tree.map(np.asarray, init(norm)["params"] | {"bias": BIAS})
  assert params["fixed_scale"].tolist() == [1] * 4
  variables = {"params": params, "batch_stats": VARIABLES["batch_stats"]}
  y, _ = train_step(norm, variables, X)
  for part in range(num_splits):
    expected = normalize(X[part::num_splits], (0, 1, 2)) + BIAS
    np.testing.assert_allclose(y[part::num_splits], expected, rtol=1e-4, atol=1e-5)

  def loss(params):
    return jnp.square(train_step(norm, variables | {"params": params}, X)[0] + X).sum()

  gradients = jax.grad(loss)(params)
  assert (gradients["fixed_scale"] == 0).all()
  assert (gradients["bias"] != 0).all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["batch", "ghost", "layer", "group"])
def test_bfloat16_is_normalized_in_float32(name, train):
  norm = models.get_norm(name, common.get_config().norm)()
  x = jnp.asarray(X + 100, jnp.bfloat16)  # squares of this would lose all digits of the variance
  variables = norm.init(jax.random.key(0, impl="rbg"), x, train)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  y, changed = apply(norm, variables, x, train, mutable=["batch_stats"])
  expected, expected_changed = apply(
    norm, variables, x.astype(jnp.float32), train, mutable=["batch_stats"]
  )
  np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, changed, expected_changed)


# E[x^2] - E[x]^2 in float32 would be off by several units here and often negative.
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_a_large_offset_does_not_spoil_the_variance_of_batch_norm(noise):
  x = (1e4 + noise * RNG.standard_normal((16, 4, 4, 4))).astype(np.float32)
  start = {"mean": MEAN, "var": np.zeros(4, np.float32)}
  y, changed = train_step(batch_norm(), VARIABLES | {"batch_stats": start}, x)
  assert np.isfinite(y).all()
  batch_var = np.asarray(changed["batch_stats"]["var"]) / 0.1
  assert (batch_var >= 0).all()
  expected = x.astype(np.float64).var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(batch_var, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_a_large_offset_does_not_spoil_the_variance_of_group_norm(noise, groups):
  x = (1e4 + noise * RNG.standard_normal((4, 8, 8, 4))).astype(np.float32)
  y = np.asarray(apply(norms.GroupNorm(groups, EPSILON), GROUP_VARIABLES, x, True))
  assert np.isfinite(y).all()
  # float32 has a mean near 1e4 to about 1e-3: 1e-3 standard deviations if the noise is 1, and
  # a third of the root of epsilon otherwise; SCALE at most doubles that.
  tolerance = 2e-2 if noise == 1.0 else 0.7
  np.testing.assert_allclose(y, group_norm_reference(x, groups), atol=tolerance)


def test_a_single_value_per_channel_stays_finite():
  y, changed = train_step(batch_norm(), VARIABLES, X[:1, :1, :1])
  # x * slope and mean * slope are rounded; slope is scale / sqrt(epsilon), about 300.
  np.testing.assert_allclose(y[0, 0, 0], BIAS, atol=1e-3)
  np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 * VAR, rtol=1e-6)


def test_an_image_without_a_batch_axis_is_refused():
  pytest.importorskip("beartype")
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
    apply(batch_norm(), VARIABLES, X[0], False)


def test_no_norm_is_the_identity():
  norm = models.get_norm("none", {"none": {}})()
  for train in (True, False):
    np.testing.assert_array_equal(apply(norm, {}, X, train), X)


def test_an_unknown_norm_is_an_error_that_lists_the_choices():
  message = r"model\.norm='bach' is unknown; .*batch, ghost, layer, group, none.*'batch'"
  with pytest.raises(errors.UserError, match=message):
    models.get_norm("bach", {})


def test_the_arguments_of_the_chosen_norm_are_used():
  arguments = {"batch": {"momentum": 0.5, "epsilon": 3.0}, "ghost": {"momentum": 0.1}}
  norm = models.get_norm("batch", arguments)()
  y, changed = train_step(norm, VARIABLES, X)
  x = X.astype(np.float64)
  expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 3) * SCALE + BIAS
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  running = 0.5 * MEAN + 0.5 * x.mean((0, 1, 2))
  np.testing.assert_allclose(changed["batch_stats"]["mean"], running, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "per_channel"), [("batch", 2), ("ghost", 2), ("layer", 2), ("group", 2), ("none", 0)]
)
def test_parameters_per_channel(name, per_channel):
  norm = models.get_norm(name, common.get_config().norm)()
  variables = jax.eval_shape(partial(norm.init, train=False), jax.random.key(0), X)
  leaves = jax.tree.leaves(variables.get("params", {}))
  assert sum(leaf.size for leaf in leaves) == per_channel * X.shape[-1]


def test_every_norm_has_arguments_in_the_config():
  assert set(common.get_config().norm) == set(norms.NORMS)


# ---- The fused function of all norms


TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}  # of the largest value
SHAPES = [(16, 1, 1, 8), (2, 26, 3, 32)]


def list_sets(x, sets):
  """x with an axis for its sets, and the axes within each set."""
  count, height, width, channels = x.shape
  if isinstance(sets, moments_lib.GhostBatches):
    return x.reshape(-1, sets.number, height, width, channels), (0, 2, 3)
  if isinstance(sets, moments_lib.DeviceBatches):
    return x.reshape(sets.number, -1, height, width, channels), (1, 2, 3)
  return x.reshape(count, height, width, sets.number, -1), (1, 2, 4)


def normalize_in_float64(x, scale, bias, direction, sets, relu):
  """By definition: value, statistics and gradients of x, scale and bias along `direction`."""
  parts, axes = list_sets(x, sets)
  mean, var = parts.mean(axes, keepdims=True), parts.var(axes, keepdims=True)
  normalized = ((parts - mean) / np.sqrt(var + EPSILON)).reshape(x.shape)
  y = normalized * scale + bias
  if relu:
    direction, y = direction * (y > 0), np.maximum(y, 0)
  normalized_gradient, _ = list_sets(direction * scale, sets)
  along = (normalized_gradient * normalized.reshape(parts.shape)).mean(axes, keepdims=True)
  parts_gradient = (
    normalized_gradient
    - normalized_gradient.mean(axes, keepdims=True)
    - normalized.reshape(parts.shape) * along
  )
  x_gradient = (parts_gradient / np.sqrt(var + EPSILON)).reshape(x.shape)
  sums = (direction * normalized).sum((0, 1, 2)), direction.sum((0, 1, 2))
  return y, mean.squeeze(axes), var.squeeze(axes), x_gradient, *sums


def get_operands(shape, dtype):
  """x, scale, bias and the gradient's direction."""
  rng = np.random.default_rng(0)
  x, direction = rng.normal(1.5, 2, shape), rng.normal(size=shape)
  scale, bias = rng.normal(1, 0.5, (2, shape[-1]))
  return jnp.asarray(x, dtype), *jnp.float32([scale, bias]), jnp.asarray(direction, dtype)


@pytest.mark.parametrize(
  ("shape", "sets", "dtype", "relu"),
  definitions.halve(
    SHAPES,
    [
      *(moments_lib.GhostBatches(1), moments_lib.GhostBatches(2)),
      *(moments_lib.ChannelGroups(1), moments_lib.ChannelGroups(4)),
      moments_lib.DeviceBatches(2),
    ],
    [jnp.float32, jnp.bfloat16],
    [False, True],
  ),
)
def test_normalize_equals_float64_in_value_and_gradients(shape, sets, dtype, relu):
  if shape[1:3] == (1, 1) and isinstance(sets, moments_lib.ChannelGroups):
    shape = (*shape[:3], 32)  # two values are always equally far from their mean
  operands = get_operands(shape, dtype)

  @jax.jit
  def run(x, scale, bias, direction):
    results, backward = jax.vjp(
      lambda *a: norm_relu.normalize(*a, sets, EPSILON, relu), x, scale, bias
    )
    statistics = (jnp.ones_like(result) for result in results[1:])
    return *results, *backward((direction, *statistics))

  actual = run(*operands)
  assert [a.dtype for a in actual] == [dtype, *2 * [jnp.float32], dtype, *2 * [jnp.float32]]
  expected = normalize_in_float64(*(np.asarray(a, np.float64) for a in operands), sets, relu)
  for name, a, e in zip(("y", "mean", "var", "x", "scale", "bias"), actual, expected, strict=True):
    error = np.abs(np.asarray(a, np.float64) - e).max() / max(1, np.abs(e).max())
    # The gradient of x would differ if the gradients of mean and var were not ignored.
    assert error <= TOLERANCE[dtype], (name, error)


def test_normalize_is_bit_for_bit_repeatable():
  x, scale, bias, _ = get_operands((16, 8, 8, 32), jnp.float32)
  function = jax.jit(
    jax.grad(
      lambda x: norm_relu.normalize(x, scale, bias, moments_lib.GhostBatches(2), 1.0, True)[0].sum()
    )
  )
  np.testing.assert_array_equal(function(x), function(x))


@pytest.mark.parametrize("sets", [moments_lib.GhostBatches(2), moments_lib.ChannelGroups(2)])
def test_vmap_equals_one_by_one(sets):
  x, scale, bias, _ = get_operands((3, 4, 5, 5, 8), jnp.float32)
  scales = scale * jnp.arange(1, 4)[:, None]

  def run(x, scale):
    y, backward = jax.vjp(lambda x: norm_relu.normalize(x, scale, bias, sets, EPSILON, True)[0], x)
    return y, backward(jnp.sin(x))[0]

  together = jax.jit(jax.vmap(run))(x, scales)
  for member in range(3):
    for t, a in zip(together, run(x[member], scales[member]), strict=True):
      np.testing.assert_allclose(t[member], a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", norms.NORMS)
def test_a_norm_with_relu_equals_the_norm_and_then_relu(name, train):
  plain, fused = (
    models.get_norm(name, common.get_config().norm)(relu=relu) for relu in (False, True)
  )
  variables = init(plain, train)
  (y, _), (z, _) = (apply(n, variables, X, train, mutable=["batch_stats"]) for n in (plain, fused))
  np.testing.assert_allclose(z, np.maximum(y, 0), rtol=1e-6, atol=1e-6)
  assert 0 < (np.asarray(z) == 0).mean() < 1
