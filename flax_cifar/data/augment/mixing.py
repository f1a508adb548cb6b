"""Mixing of the examples of a batch, inside the training step, after normalization."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from flax_cifar import errors

Mixed = tuple[Float[Array, "n h w c"], Float[Array, "n classes"]]
Mixing = Callable[[Array, Array, Array], Mixed]
Side = Int32[Array, ""]
Box = tuple[Side, Side, Side, Side]  # top, bottom, left, right


def create_mixing(*, name: str, **arguments: Any) -> Mixing | None:
  """Returns the mixing called `name` with the keyword arguments `arguments[name]`.

  It is called as mixing(images, targets, key) -> (images, targets) with images float
  (N, H, W, C), targets float (N, classes), each a distribution, and a typed key for this step.
  For "none" it is None.

  Raises:
    UserError: unknown name or an argument out of range.
  """
  return errors.choose("mixing.name", name, MIXINGS)(**arguments.get(name, {}))


def mixup(
  images: Float[Array, "n h w c"],
  targets: Float[Array, "n classes"],
  key: Key[Array, ""],
  *,
  alpha: float,
) -> Mixed:
  """Averages each example with another one, with one share for the whole batch.

  Source: Zhang et al. 2018, arXiv:1710.09412, and its reference code.

  Args:
    images: the batch.
    targets: its targets, averaged with the same share.
    key: a typed key for this step.
    alpha: both parameters of the Beta distribution of an example's share.
  """
  share_key, partner_key = jax.random.split(key)
  share = draw_share(share_key, alpha)
  partner = jax.random.permutation(partner_key, len(images))
  return _average(images, images[partner], share), _average(targets, targets[partner], share)


def cutmix(
  images: Float[Array, "n h w c"],
  targets: Float[Array, "n classes"],
  key: Key[Array, ""],
  *,
  alpha: float,
) -> Mixed:
  """Fills a box of each example from another one, with the same box for the whole batch.

  Source: Yun et al. 2019, arXiv:1905.04899, and its reference code.

  Args:
    images: the batch.
    targets: its targets, averaged with the areas as weights.
    key: a typed key for this step.
    alpha: both parameters of the Beta distribution of the share of its area that an example keeps,
      before the box is cut off at the border.
  """
  share_key, box_key, partner_key = jax.random.split(key, 3)
  _, height, width, _ = images.shape
  share = draw_share(share_key, alpha)
  top, bottom, left, right = draw_box(box_key, share, (height, width))
  partner = jax.random.permutation(partner_key, len(images))
  row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
  inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
  kept = 1 - (bottom - top) * (right - left) / (height * width)
  mixed = jnp.where(inside, images[partner], images)
  return mixed, _average(targets, targets[partner], kept)


def ricap(
  images: Float[Array, "n h w c"],
  targets: Float[Array, "n classes"],
  key: Key[Array, ""],
  *,
  alpha: float,
) -> Mixed:
  """Puts each image together from parts of four, with the same borders for the whole batch.

  Source: Takahashi et al. 2018, arXiv:1811.09030, "random image cropping and patching".

  Args:
    images: the batch.
    targets: its targets, averaged with the areas of the parts as weights.
    key: a typed key for this step.
    alpha: both parameters of the Beta distribution of where the borders are, as fractions.
  """
  border_key, crop_key, partner_key = jax.random.split(key, 3)
  size = jnp.array(images.shape[1:3])
  shares = jax.vmap(partial(draw_share, alpha=alpha))(jax.random.split(border_key))
  border = jnp.round(size * shares).astype(jnp.int32)
  row, column = (jnp.arange(length) for length in images.shape[1:3])
  mixed, mixed_targets = jnp.zeros_like(images), jnp.zeros_like(targets)
  for part in range(4):
    is_end = jnp.array(divmod(part, 2))  # below, and to the right of, the borders
    start, length = border * is_end, jnp.where(is_end, size - border, border)
    crop_seed, partner_seed = (jax.random.fold_in(k, part) for k in (crop_key, partner_key))
    corner = jax.random.randint(crop_seed, (2,), 0, size - length + 1)
    partner = jax.random.permutation(partner_seed, len(images))
    # The crop fits into the image, so nothing inside the part comes around the edge.
    moved = jnp.roll(images[partner], start - corner, (1, 2))
    rows = (row >= start[0]) & (row < start[0] + length[0])
    columns = (column >= start[1]) & (column < start[1] + length[1])
    mixed = jnp.where(rows[:, None, None] & columns[:, None], moved, mixed)
    mixed_targets += length.prod() / size.prod() * targets[partner]
  return mixed, mixed_targets.astype(targets.dtype)


def draw_share(key: Key[Array, ""], alpha: float) -> Float32[Array, ""]:
  """Draws from the distribution Beta(alpha, alpha)."""
  # Like jax.random.beta, but both gamma variates share one loop, because the loop is slow to
  # compile.
  first, second = jax.random.loggamma(key, alpha, (2,))
  return jax.nn.sigmoid(first - second)


def draw_box(key: Key[Array, ""], share: Float32[Array, ""], size: tuple[int, int]) -> Box:
  """Draws a box with about 1 - share of the area of `size`, (height, width) in pixels.

  Its center is uniform, and the box is cut off at the border.
  """
  length = jnp.array(size)
  center = jax.random.randint(key, (2,), 0, length)
  half = (length * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
  top, left = jnp.maximum(center - half, 0)
  bottom, right = jnp.minimum(center + half, length)
  return top, bottom, left, right


def _average(first: Array, second: Array, share: Array) -> Array:
  share = share.astype(first.dtype)
  return share * first + (1 - share) * second


# ---- Mixings by name


def _none() -> None:
  return None


def _mixup(*, alpha: float) -> Mixing:
  _check_alpha("mixup", alpha)
  return partial(mixup, alpha=alpha)


def _cutmix(*, alpha: float) -> Mixing:
  _check_alpha("cutmix", alpha)
  return partial(cutmix, alpha=alpha)


def _ricap(*, alpha: float) -> Mixing:
  _check_alpha("ricap", alpha)
  return partial(ricap, alpha=alpha)


def _check_alpha(name: str, alpha: float) -> None:
  # Outside this range the gamma variates of float32 are 0 or infinite.
  errors.require(1e-6 <= alpha <= 1e6, f"mixing.{name}.alpha", alpha, "from 1e-6 to 1e6")


MIXINGS: dict[str, Callable[..., Mixing | None]] = {
  "none": _none,
  "mixup": _mixup,
  "cutmix": _cutmix,
  "ricap": _ricap,
}
