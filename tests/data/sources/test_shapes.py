"""The shapes are reproducible, balanced, hard to classify by pixels and easy by their form."""

import numpy as np
import pytest

from flax_cifar.data.sources import shapes

NUM_TRAIN, NUM_TEST = 4000, 1000


def draw(seed=0, num_train=60, num_test=20, image_size=32):
  return shapes.make_shapes(
    num_train=num_train, num_test=num_test, image_size=image_size, seed=seed
  )


@pytest.fixture(scope="module")
def data():
  """Training images and labels, test images and labels."""
  return draw(num_train=NUM_TRAIN, num_test=NUM_TEST)[:4]


def test_the_same_seed_draws_the_same_images():
  for first, second in zip(draw(seed=3), draw(seed=3), strict=True):
    np.testing.assert_array_equal(first, second)


def test_another_seed_draws_other_images():
  first, second = draw(seed=3), draw(seed=4)
  assert (first[0] != second[0]).mean() > 0.9
  assert (first[2] != second[2]).mean() > 0.9
  assert (first[1] != second[1]).any()


@pytest.mark.parametrize("size", [16, 32, 45])
def test_shapes_and_dtypes(size):
  train, train_labels, test, test_labels, names = draw(image_size=size)
  assert (train.shape, train.dtype) == ((60, size, size, 3), np.uint8)
  assert (test.shape, test.dtype) == ((20, size, size, 3), np.uint8)
  assert (train_labels.shape, train_labels.dtype) == ((60,), np.int32)
  assert (test_labels.shape, test_labels.dtype) == ((20,), np.int32)
  assert names == shapes.CLASS_NAMES
  assert len(set(names)) == len(shapes.SHAPES) == 10


def test_classes_are_balanced_and_shuffled(data):
  _, train_labels, _, test_labels = data
  assert np.bincount(train_labels).tolist() == [NUM_TRAIN // 10] * 10
  assert np.bincount(test_labels).tolist() == [NUM_TEST // 10] * 10
  # Neighbors share a label in a tenth of the cases.
  same = (train_labels[1:] == train_labels[:-1]).mean()
  assert abs(same - 0.1) < 5 * np.sqrt(0.1 * 0.9 / NUM_TRAIN)


def test_values_use_the_whole_range(data):
  images = data[0]
  low, high = np.quantile(images, [0.02, 0.98])
  assert low < 30
  assert high > 225
  assert len(np.unique(images)) == 256


def test_no_image_is_drawn_twice(data):
  train, test = ({image.tobytes() for image in images} for images in (data[0], data[2]))
  assert len(train) == NUM_TRAIN
  assert len(test) == NUM_TEST
  assert not train & test


def ridge_accuracy(images, labels, test_images, test_labels, penalty):
  """Accuracy on the test images of a ridge regression from pixels to one-hot labels."""
  x, test_x = (a.reshape(len(a), -1).astype(np.float32) / 255 for a in (images, test_images))
  mean = x.mean(0)
  x, test_x = x - mean, test_x - mean
  targets = np.eye(10, dtype=np.float32)[labels] - 0.1
  gram = x.T @ x + penalty * np.eye(x.shape[1], dtype=np.float32)
  weights = np.linalg.solve(gram, x.T @ targets)
  return ((test_x @ weights).argmax(-1) == test_labels).mean()


@pytest.mark.parametrize("step", [1, 2])  # fewer pixels overfit less
@pytest.mark.parametrize("penalty", [10, 300])
def test_a_linear_classifier_on_pixels_stays_below_20_percent(data, penalty, step):
  images, labels, test_images, test_labels = data
  thinned, test_thinned = images[:, ::step, ::step], test_images[:, ::step, ::step]
  assert ridge_accuracy(thinned, labels, test_thinned, test_labels, penalty) < 0.2


def test_the_linear_classifier_learns_a_linear_task(data):
  def darken(images, labels):
    """Halves the brightness of the one of 16 tiles that belongs to the label."""
    images = images[:, ::2, ::2].copy()
    for image, label in zip(images, labels, strict=True):
      row, column = (4 * i for i in divmod(label, 4))
      image[row : row + 4, column : column + 4] //= 2
    return images

  images, labels, test_images, test_labels = data
  marked, test_marked = darken(images, labels), darken(test_images, test_labels)
  assert ridge_accuracy(marked, labels, test_marked, test_labels, 100) > 0.8


def get_features(images):
  """Features of the form, which do not depend on the position, size and colors of a shape."""
  size = images.shape[1]
  y, x = np.mgrid[:size, :size].reshape(2, -1)
  colors = images.reshape(len(images), -1, 3).astype(np.float64)
  # The background is bilinear; a fit to the border finds it.
  basis = np.stack([np.ones(size**2), x, y, x * y], -1)
  border = np.minimum(np.minimum(x, y), size - 1 - np.maximum(x, y)) < 3
  difference = np.abs(colors - basis @ (np.linalg.pinv(basis[border]) @ colors[:, border]))
  contrast = difference.sum(-1)
  mask = contrast > 0.5 * np.quantile(contrast, 0.97, axis=1, keepdims=True)

  area = mask.sum(1, keepdims=True)
  dx, dy = x - mask @ x[:, None] / area, y - mask @ y[:, None] / area
  distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
  radius = np.nanquantile(np.where(mask, distance, np.nan), 0.95, axis=1)[:, None]
  ring = np.floor(distance / radius * 10)
  filled = [(mask & (ring == i)).sum(1) / np.maximum((ring == i).sum(1), 1) for i in range(14)]
  waves = [np.abs((mask * np.exp(1j * k * angle)).sum(1)) / area[:, 0] for k in range(1, 9)]
  return np.stack(filled + waves, -1)


def test_features_of_the_form_separate_the_classes(data):
  features, labels = get_features(data[0][:2000]), data[1][:2000]
  test_features, test_labels = get_features(data[2][:500]), data[3][:500]
  squared_distances = (features**2).sum(-1) - 2 * test_features @ features.T
  predicted = labels[squared_distances.argmin(-1)]
  for label in range(10):
    assert (predicted == test_labels)[test_labels == label].mean() > 0.5, shapes.CLASS_NAMES[label]
  assert (predicted == test_labels).mean() > 0.75


AREAS = {
  "disk": np.pi,
  "ring": np.pi * (1 - 0.55**2),
  "square": 1.6**2,
  "frame": 1.6**2 - 0.9**2,
  "triangle": 0.75 * np.sqrt(3),  # equilateral in the unit circle
  "cross": 2 * 1.9 * 0.6 - 0.6**2,
  "star": np.pi * (0.62**2 + 0.38**2 / 2),  # half the integral of the squared radius
  "stripes": np.pi / 2,  # odd about the middle: half of the disk
  "checkers": 1.6**2 / 2,
}


@pytest.mark.parametrize("name", AREAS)
def test_masks_have_the_areas_of_their_shapes(name):
  u, v = np.meshgrid(*[np.arange(-1.2, 1.2, 0.004) + 0.002] * 2)
  mask = shapes.SHAPES[shapes.CLASS_NAMES.index(name)](u, v)
  np.testing.assert_allclose(mask.mean() * 2.4**2, AREAS[name], rtol=1e-2)


def test_dots_are_separate_disks():
  u, v = np.meshgrid(*[np.arange(-1.2, 1.2, 0.004) + 0.002] * 2)
  mask = shapes.SHAPES[shapes.CLASS_NAMES.index("dots")](u, v)
  # A grid of disks of radius 0.24, 0.66 apart; those at the rim are cut.
  np.testing.assert_allclose(mask.mean() * 2.4**2, np.pi * np.pi * (0.24 / 0.66) ** 2, rtol=0.1)
  lines = mask[np.abs(v) < 0.003].reshape(-1, mask.shape[1])
  assert not lines.any()  # the middle line runs between the dots
