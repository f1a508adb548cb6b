"""Statistics of the hashed dropout masks; tolerances are five standard deviations, keys fixed."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.models import dropout
from flax_cifar.parallel import mesh as mesh_lib

SHAPE = (32, 16, 16, 32)  # a feature map of a small batch
SIZE = int(np.prod(SHAPE))

get_bits = jax.jit(dropout.hash_bits, static_argnums=1)


@partial(jax.jit, static_argnums=0)
def drop(rate, key, x):
  return dropout.Dropout(rate).apply({}, x, True, rngs={"dropout": key})


@pytest.fixture(scope="module")
def bits():
  return np.asarray(get_bits(jax.random.key(42), SHAPE))


def correlation_in_sigmas(a, b):
  """The correlation of two arrays in standard deviations of that of independent arrays."""
  return np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size)


def lowbias32(x):
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
  return x ^ (x >> np.uint64(16))


@pytest.mark.parametrize("words", [(4_000_000_000, 3_000_000_001), (5, 6)])
def test_bits_are_lowbias32_of_a_sequence_with_an_odd_step(words):
  key = jax.random.wrap_key_data(np.array(words, np.uint32))
  first, second = np.array(words, np.uint64)
  start = lowbias32(lowbias32(first) ^ second)
  step = lowbias32(start ^ first) | np.uint64(1)
  counter = [(int(start) + int(step) * index) % 2**32 for index in range(4 * 5 * 6)]
  expected = lowbias32(np.array(counter, np.uint64))
  actual = dropout.hash_bits(key, (4, 5, 6))
  assert actual.dtype == jnp.uint32
  np.testing.assert_array_equal(actual, expected.reshape(4, 5, 6))


def test_the_hash_is_a_bijection_so_no_two_elements_share_a_value(bits):
  assert len(np.unique(bits)) == SIZE


def test_same_key_same_bits_other_key_other_bits(bits):
  np.testing.assert_array_equal(get_bits(jax.random.key(42), SHAPE), bits)
  other = np.asarray(get_bits(jax.random.key(43), SHAPE))
  assert (other == bits).mean() < 1e-4


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_is_balanced(bits, bit):
  ones = (bits >> bit) & 1
  assert abs(ones.mean() - 0.5) < 5 * 0.5 / np.sqrt(SIZE)


def test_no_two_bits_of_a_value_are_correlated(bits):
  columns = np.stack([(bits.ravel() >> bit) & 1 for bit in range(32)]).astype(np.float32)
  correlation = np.corrcoef(columns) - np.eye(32)
  assert np.abs(correlation).max() < 5 / np.sqrt(SIZE)


@pytest.mark.parametrize("byte", range(4))
def test_every_byte_is_uniform(bits, byte):
  counts = np.bincount((bits.ravel() >> (8 * byte)) & 255, minlength=256)
  chi_square = ((counts - SIZE / 256) ** 2 / (SIZE / 256)).sum()
  assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 8])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_neighbors_are_independent_along_every_axis(bits, axis, lag, rate):
  keep = np.moveaxis(bits >= rate * 2**32, axis, 0)
  assert abs(correlation_in_sigmas(keep[lag:], keep[:-lag])) < 5


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_consecutive_steps_are_independent(rate):
  key = jax.random.key(0)
  keeps = [
    np.asarray(get_bits(jax.random.fold_in(key, t), SHAPE)) >= rate * 2**32 for t in range(5)
  ]
  for t in range(4):
    assert abs(correlation_in_sigmas(keeps[t], keeps[t + 1])) < 5


def test_consecutive_steps_are_not_shifted_copies_of_one_another():
  first, second = (
    np.asarray(get_bits(jax.random.fold_in(jax.random.key(0), t), SHAPE)) >> 31 for t in (0, 1)
  )
  for shift in (-32, -2, -1, 1, 2, 32, 512):
    assert abs(correlation_in_sigmas(first.ravel(), np.roll(second.ravel(), shift))) < 5


class TwoLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    return dropout.Dropout(0.5, name="a")(x, True), dropout.Dropout(0.5, name="b")(x, True)


def test_layers_have_independent_masks():
  apply = jax.jit(lambda key, x: TwoLayers().apply({}, x, rngs={"dropout": key}))
  a, b = apply(jax.random.key(0), np.ones(SHAPE, np.float32))
  assert abs(correlation_in_sigmas(np.asarray(a), np.asarray(b))) < 5


def test_keys_that_differ_in_one_seed_bit_have_independent_masks():
  a, b = (np.asarray(get_bits(jax.random.key(seed), SHAPE)) >> 31 for seed in (0, 1))
  assert abs(correlation_in_sigmas(a, b)) < 5


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.25, 0.5, 0.9])
def test_the_fraction_of_zeros_is_the_rate_and_the_mean_is_kept(rate):
  y = np.asarray(drop(rate, jax.random.key(7), np.ones(SHAPE, np.float32)), np.float64)
  assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / SIZE)
  assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / SIZE)
  np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_number_of_zeros_is_binomial_over_examples(rate):
  y = np.asarray(drop(rate, jax.random.key(8), np.ones((512, 16, 64), np.float32)))
  zeros = (y == 0).sum((1, 2))
  variance = 1024 * rate * (1 - rate)
  assert abs(zeros.var(ddof=1) / variance - 1) < 5 * np.sqrt(2 / 511)


@pytest.mark.parametrize(("rate", "train"), [(0.0, True), (0.0, False), (0.5, False)])
def test_rate_zero_and_evaluation_are_the_identity_and_need_no_key(rate, train):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), jnp.float32)
  np.testing.assert_array_equal(dropout.Dropout(rate).apply({}, x, train), x)


def test_the_gradient_is_the_mask_times_the_scale():
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(2, 4, 8, 8, 16)).astype(np.float32)
  key = jax.random.key(3)
  gradient = jax.jit(jax.grad(lambda x: (drop(0.2, key, x) * weight).sum()))(x)
  keep = np.asarray(drop(0.2, key, np.ones_like(x))) != 0
  np.testing.assert_allclose(gradient, np.where(keep, weight / 0.8, 0), rtol=1e-5)
  assert 0 < keep.mean() < 1


def test_masks_do_not_depend_on_jit():
  x = jnp.ones((8, 4, 4, 8))
  eager = dropout.Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(1)})
  np.testing.assert_array_equal(drop(0.3, jax.random.key(1), x), eager)


def test_masks_do_not_depend_on_the_number_of_devices():
  mesh, x = mesh_lib.create_mesh(4), np.ones((8, 6, 6, 8), np.float32)
  key = jax.random.key(1)
  sharded = drop(
    0.3,
    jax.device_put(key, mesh_lib.replicated(mesh)),
    jax.device_put(x, mesh_lib.split_batch(mesh)),
  )
  assert len(sharded.sharding.device_set) == 4
  np.testing.assert_array_equal(sharded, drop(0.3, key, x))


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_scale_is_not_rounded_to_bfloat16(rate):
  x = jax.random.uniform(jax.random.key(1), SHAPE).astype(jnp.bfloat16)
  y = np.asarray(drop(rate, jax.random.key(0), x), np.float32)
  expected = np.asarray((x.astype(jnp.float32) / (1 - rate)).astype(jnp.bfloat16), np.float32)
  np.testing.assert_array_equal(y[y > 0], expected[y > 0])
