"""Mixing: distributions match the sources, and targets follow the pixels exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_cifar import errors
from flax_cifar.configs import common
from flax_cifar.data.augment import mixing as mixing_lib

N, CLASSES = 12, 5


@functools.cache
def create(name, alpha):
  arguments = common.get_config().mixing.to_dict() | {"name": name, name: {"alpha": alpha}}
  return jax.jit(mixing_lib.create_mixing(**arguments))


@pytest.fixture(scope="module")
def batch():
  """Images filled with the number of the example, counted from 1, and smoothed targets."""
  images = np.broadcast_to(np.arange(1.0, N + 1)[:, None, None, None], (N, 16, 8, 3))
  labels = np.arange(N) % CLASSES
  return np.float32(images), np.float32(0.9 * np.eye(CLASSES)[labels] + 0.1 / CLASSES)


def test_the_mixing_called_none_is_none():
  assert mixing_lib.create_mixing(**common.get_config().mixing.to_dict()) is None


def test_common_holds_arguments_of_every_mixing():
  assert set(common.get_config().mixing) == {"name", *mixing_lib.MIXINGS} - {"none"}


def test_shares_are_beta_distributed():
  keys = jax.random.split(jax.random.key(1), 4000)
  for alpha in (0.2, 1.0, 3.0):
    draw = jax.jit(jax.vmap(functools.partial(mixing_lib.draw_share, alpha=alpha)))
    shares = np.asarray(draw(keys))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / len(keys))
    assert abs(shares.var() / variance - 1) < 0.1
    # Shares below 2^-24 from 1 round to it, so compare where floats are dense.
    assert stats.ks_1samp(np.minimum(shares, 1 - shares), folded_beta(alpha)).pvalue > 1e-4


def folded_beta(alpha):
  """The cumulative distribution function of min(share, 1 - share)."""
  return lambda share: 2 * stats.beta(alpha, alpha).cdf(np.minimum(share, 0.5))


def test_mixup_has_its_own_alpha(batch):
  """Mixes the examples 0 and 1: unless each is its own partner, the second becomes the share."""
  step = jax.jit(jax.vmap(create("mixup", 0.2), (None, None, 0)))
  pair = np.float32([0, 1])[:, None, None, None]
  mixed, _ = step(pair, batch[1][:2], jax.random.split(jax.random.key(1), 4000))
  first, second = np.asarray(mixed)[:, :, 0, 0, 0].T
  mixed_pair = (first != 0) & (second != 1)
  assert 0.4 < mixed_pair.mean() < 0.55
  assert stats.ks_1samp(np.minimum(first, second)[mixed_pair], folded_beta(0.2)).pvalue > 1e-4


def test_mixup_uses_one_share_and_a_permutation(batch):
  images, targets = batch
  mixup = create("mixup", 1.0)
  rng = np.random.default_rng(0)
  noise = np.float32(rng.normal(size=images.shape))
  for seed in range(5):
    mixed, mixed_targets = mixup(noise, targets, jax.random.key(seed))
    # Each mixed example lies in the plane of two; least squares finds these and the share.
    flat = noise.reshape(N, -1)
    weights = np.linalg.lstsq(flat.T, np.asarray(mixed).reshape(N, -1).T, rcond=None)[0].T
    np.testing.assert_allclose(mixed_targets, weights @ targets, atol=1e-5)
    np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-4)  # each is a partner once
    fixed = np.diag(weights) > 1 - 1e-4
    shares = np.diag(weights)[~fixed]
    np.testing.assert_allclose(shares, shares[0], atol=1e-4)


def test_cutmix_targets_follow_the_areas(batch):
  images, targets = batch
  cutmix = create("cutmix", 1.0)
  for seed in range(20):
    mixed, mixed_targets = map(np.asarray, cutmix(images, targets, jax.random.key(seed)))
    counts = np.stack([(mixed[..., 0] == n + 1).sum((1, 2)) for n in range(N)], 1)
    assert (counts.sum(1) == 16 * 8).all(), "a pixel belongs to no example"
    np.testing.assert_allclose(mixed_targets, counts / (16 * 8) @ targets, atol=1e-6)


def test_cutmix_pastes_one_box_at_the_same_place_in_the_whole_batch():
  noise = np.float32(np.random.default_rng(0).normal(size=(N, 16, 8, 3)))
  cutmix = create("cutmix", 1.0)
  for seed in range(10):
    mixed, _ = cutmix(noise, np.eye(N, dtype=np.float32), jax.random.key(seed))
    changed = (np.asarray(mixed) != noise).any(-1)
    if not changed.any():
      continue
    boxes = changed[changed.any((1, 2))]
    assert (boxes == boxes[0]).all()
    rows, columns = np.nonzero(boxes[0])
    assert boxes[0].sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1), "not a rectangle"
    origin = [(np.asarray(mixed)[:, boxes[0]] == other[boxes[0]]).all((1, 2)) for other in noise]
    assert (np.sum(origin, 0) == 1).all()
    assert (np.sum(origin, 1) == 1).all()


def test_ricap_puts_crops_of_four_examples_together():
  """Pixels say where they come from: the example, the row, the column."""
  height, width = 12, 8
  places = np.moveaxis(np.indices((N, height, width)), 0, -1)
  ricap = create("ricap", 1.0)
  targets = np.eye(N, dtype=np.float32)
  borders = set()
  for seed in range(20):
    mixed, mixed_targets = map(np.asarray, ricap(np.float32(places), targets, jax.random.key(seed)))
    source, moved = mixed[..., 0].astype(int), mixed[..., 1:] - places[..., 1:]
    # A part is where example and shift stay the same; the shifts are those of the whole batch.
    origins = np.concatenate([source[..., None], moved], -1)[0].reshape(-1, 3)
    parts, ids = np.unique(origins, axis=0, return_inverse=True)
    assert len(parts) <= 4
    for part in range(len(parts)):
      rows, columns = np.nonzero(ids.reshape(height, width) == part)
      assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1), "not a rectangle"
      borders |= {rows.min(), columns.min()}
    assert (moved == moved[0]).all()
    counts = np.stack([(source == n).sum((1, 2)) for n in range(N)], 1)
    np.testing.assert_allclose(mixed_targets, counts / (height * width), atol=1e-6)
    np.testing.assert_allclose(counts.sum(0), height * width)  # each example fills each part once
  assert len(borders) > 5


def test_a_large_alpha_halves_the_images(batch):
  """Its shares are one half: ricap has four equal parts, a whole box of cutmix half of the area."""
  images, targets = batch[0], np.eye(N, dtype=np.float32)
  shares, kept = [], []
  for seed in range(12):
    key = jax.random.key(seed)
    shares.append(create("ricap", 1e6)(images, targets, key)[1])
    kept.append(np.diag(create("cutmix", 1e6)(images, targets, key)[1]))
  np.testing.assert_array_equal(np.unique(4 * np.asarray(shares) % 1), 0)
  box = 2 * (int(16 * 0.5**0.5) // 2) * 2 * (int(8 * 0.5**0.5) // 2)
  assert np.min(kept) == pytest.approx(1 - box / (16 * 8))


@jax.jit
@jax.vmap
def draw_boxes(key, share):
  return mixing_lib.draw_box(key, share, (32, 16))


def test_a_box_that_is_not_clipped_has_the_drawn_area():
  """Compares with the formula of the reference code, for the same center."""
  keys = jax.random.split(jax.random.key(2), 4000)
  shares = jnp.linspace(0, 1, len(keys))
  top, bottom, left, right = map(np.asarray, draw_boxes(keys, shares))
  half_height = (32 * np.sqrt(1 - np.float32(shares))).astype(int) // 2
  half_width = (16 * np.sqrt(1 - np.float32(shares))).astype(int) // 2
  whole = (top > 0) & (bottom < 32) & (left > 0) & (right < 16)
  assert whole.sum() > 500
  np.testing.assert_array_equal((bottom - top)[whole], 2 * half_height[whole])
  np.testing.assert_array_equal((right - left)[whole], 2 * half_width[whole])
  assert (top >= 0).all()
  assert (bottom <= 32).all()
  assert (left >= 0).all()
  assert (right <= 16).all()


def test_box_centers_are_uniform():
  keys = jax.random.split(jax.random.key(3), 4000)
  share = jnp.full(len(keys), 0.97)
  top, bottom, left, right = map(np.asarray, draw_boxes(keys, share))
  for low, high, length in ((top, bottom, 32), (left, right, 16)):
    half = int(length * np.sqrt(0.03)) // 2
    center = np.where(low == 0, high - half, low + half)
    assert stats.chisquare(np.bincount(center, minlength=length)).pvalue > 1e-4


@pytest.mark.parametrize("name", ["mixup", "cutmix", "ricap"])
def test_another_key_gives_another_mixture(batch, name):
  noise = np.float32(np.random.default_rng(0).normal(size=batch[0].shape))
  mixing = create(name, 1.0)
  one, again, other = (np.asarray(mixing(noise, batch[1], jax.random.key(s))[0]) for s in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


@pytest.mark.parametrize("name", ["mixup", "cutmix", "ricap"])
def test_dtype_is_kept(batch, name):
  images, targets = jax.eval_shape(
    create(name, 1.0), jnp.bfloat16(batch[0]), batch[1], jax.random.key(0)
  )
  assert (images.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "ricap"])
def test_bad_alpha_is_quoted(name):
  with pytest.raises(errors.UserError, match=rf"mixing.{name}.alpha=0.0"):
    mixing_lib.create_mixing(name=name, **{name: {"alpha": 0.0}})


def test_unknown_name_is_quoted():
  with pytest.raises(errors.UserError, match=r"mixing.name='mixip'.*Did you mean 'mixup'"):
    mixing_lib.create_mixing(name="mixip")
