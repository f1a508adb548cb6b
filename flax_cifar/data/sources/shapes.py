"""The embedded data set `shapes`: ten classes of shapes and textures, drawn from a seed.

Place, size, angle, colors, background, noise and a second small shape vary, so that no single
pixel reveals the class; the accuracy of a linear model stays below 20 %.
"""

from collections.abc import Callable

import numpy as np

CLASS_NAMES = (
  "disk",
  "ring",
  "square",
  "frame",
  "triangle",
  "cross",
  "star",
  "stripes",
  "checkers",
  "dots",
)

NUM_TRAIN = 10_000
NUM_TEST = 2_000
SEED = 0
MAX_SIZE = 128  # pixels; drawing larger images would need more than 10 GB of memory

# A shape is a mask over (u, v), coordinates about its center in units of its radius.
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_shapes(
  *, num_train: int, num_test: int, image_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
  """Draws the data set.

  Args:
    num_train: number of training images.
    num_test: number of test images.
    image_size: height and width in pixels.
    seed: of the random numbers; the images are a pure function of all arguments.

  Returns:
    Training images uint8 (N, H, W, 3) and labels int32 (N,), test images and labels, class names.
  """
  rng = np.random.default_rng(seed)
  train_images, train_labels = _draw(rng, num_train, image_size)
  test_images, test_labels = _draw(rng, num_test, image_size)
  return train_images, train_labels, test_images, test_labels, CLASS_NAMES


def _draw(rng: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  labels = rng.permutation(np.arange(count) % len(CLASS_NAMES)).astype(np.int32)
  images = _backgrounds(rng, count, size)
  clutter = rng.integers(len(CLASS_NAMES), size=count)
  _paint(rng, images, clutter, radius=(0.05, 0.09), spread=0.45)
  _paint(rng, images, labels, radius=(0.24, 0.4), spread=0.14)
  images += 0.04 * rng.standard_normal(images.shape, np.float32)
  return (np.clip(images, 0, 1) * 255).round().astype(np.uint8), labels


def _backgrounds(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Draws backgrounds float32 (N, H, W, 3); each corner has a color near the image's color."""
  base = rng.uniform(0.1, 0.9, (count, 1, 1, 3))
  corners = base + rng.uniform(-0.25, 0.25, (count, 2, 2, 3))
  t = np.linspace(0, 1, size, dtype=np.float32)
  weights = np.stack([1 - t, t])
  return np.einsum("ay,bx,nabc->nyxc", weights, weights, corners.astype(np.float32), optimize=True)


def _paint(
  rng: np.random.Generator,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  radius: tuple[float, float],
  spread: float,
) -> None:
  """Paints shape `labels[i]` on image i; `radius` and `spread` are fractions of its side."""
  count, size = images.shape[:2]
  half = (size - 1) / 2
  y, x = np.mgrid[:size, :size].astype(np.float32)
  center = half + rng.uniform(-spread, spread, (2, count, 1, 1)).astype(np.float32) * size
  angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
  scale = rng.uniform(*radius, (count, 1, 1)).astype(np.float32) * size
  dx, dy = (x - center[0]) / scale, (y - center[1]) / scale
  u = np.cos(angle) * dx + np.sin(angle) * dy
  v = np.cos(angle) * dy - np.sin(angle) * dx
  colors = _contrasting(rng, images.mean((1, 2)))
  for label, shape in enumerate(SHAPES):
    rows = np.flatnonzero(labels == label)
    mask = shape(u[rows], v[rows])[..., None]
    images[rows] = np.where(mask, colors[rows, None, None], images[rows])


def _contrasting(rng: np.random.Generator, means: np.ndarray) -> np.ndarray:
  """Draws a color for each image, lighter or darker than its mean color in every channel."""
  sign = np.where(means.mean(-1, keepdims=True) > 0.5, -1, 1)
  return np.clip(means + sign * rng.uniform(0.2, 0.55, means.shape), 0, 1).astype(np.float32)


# ---- The shapes


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  slant = np.sqrt(0.75) * np.abs(u) + 0.5 * v
  return (slant < 0.5) & (v > -0.5)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  u, v = np.abs(u), np.abs(v)
  return (np.maximum(u, v) < 0.95) & (np.minimum(u, v) < 0.3)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.hypot(u, v) < 0.62 + 0.38 * np.cos(5 * np.arctan2(v, u))


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.maximum(np.abs(u), np.abs(v)) < 0.8


def _in_disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.hypot(u, v) < 1.0


SHAPES: tuple[Shape, ...] = (
  _in_disk,
  lambda u, v: _in_disk(u, v) & (np.hypot(u, v) > 0.55),
  _square,
  lambda u, v: _square(u, v) & (np.maximum(np.abs(u), np.abs(v)) > 0.45),
  _triangle,
  _cross,
  _star,
  lambda u, v: _in_disk(u, v) & (np.sin(2.2 * np.pi * u) > 0),
  lambda u, v: _square(u, v) & (np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) > 0),
  lambda u, v: _in_disk(u, v) & (np.hypot(u % 0.66 - 0.33, v % 0.66 - 0.33) < 0.24),
)
