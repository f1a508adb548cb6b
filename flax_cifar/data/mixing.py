"""Mixing of the examples of a batch, inside the train step, after normalisation."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from flax_cifar.errors import choose, require

Mixed = tuple[jax.Array, jax.Array]
Mixing = Callable[[jax.Array, jax.Array, jax.Array], Mixed]
Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # top, bottom, left, right; int32 scalars


def create_mixing(*, name: str, **arguments: Mapping[str, float]) -> Mixing | None:
  """The mixing called `name` with `arguments[name]`; "none" gives None.

  It is called as mixing(images, targets, key) -> (images, targets) with images float
  (N, H, W, C), targets float (N, classes), each a distribution, and a typed key for this step.

  Raises:
    UserError: unknown name or an argument out of range.
  """
  return choose("mixing.name", name, MIXINGS)(**arguments.get(name, {}))


def _none() -> None:
  return None


def _mixup(*, alpha: float) -> Mixing:
  _check_alpha("mixup", alpha)
  return partial(mixup, alpha=alpha)


def _cutmix(*, alpha: float) -> Mixing:
  _check_alpha("cutmix", alpha)
  return partial(cutmix, alpha=alpha)


def _check_alpha(name: str, alpha: float) -> None:
  # Beyond, the gamma variates of float32 are 0 or infinite.
  require(1e-6 <= alpha <= 1e6, f"mixing.{name}.alpha", alpha, "from 1e-6 to 1e6")


MIXINGS: dict[str, Callable[..., Mixing | None]] = {
  "none": _none,
  "mixup": _mixup,
  "cutmix": _cutmix,
}


def mixup(images: jax.Array, targets: jax.Array, key: jax.Array, *, alpha: float) -> Mixed:
  """Each example is averaged with another one, with one share for the whole batch.

  Source: Zhang et al. 2018, arXiv:1710.09412, and its reference code.

  Args:
    images: float (N, H, W, C).
    targets: float (N, classes).
    key: a typed key for this step.
    alpha: both parameters of the Beta distribution of an example's share.
  """
  share_key, partner_key = jax.random.split(key)
  share = draw_share(share_key, alpha)
  partner = jax.random.permutation(partner_key, len(images))
  return _average(images, images[partner], share), _average(targets, targets[partner], share)


def cutmix(images: jax.Array, targets: jax.Array, key: jax.Array, *, alpha: float) -> Mixed:
  """A box of each example is filled from another one, the same box for the whole batch.

  Source: Yun et al. 2019, arXiv:1905.04899, and its reference code.

  Args:
    images: float (N, H, W, C).
    targets: float (N, classes); mixed by the areas.
    key: a typed key for this step.
    alpha: both parameters of the Beta distribution of the share of its area that is kept, before
      the box is cut off at the border.
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


def draw_share(key: jax.Array, alpha: float) -> jax.Array:
  """float32 scalar with the distribution Beta(alpha, alpha)."""
  # As jax.random.beta, but its two gamma variates share one loop, which is slow to compile.
  first, second = jax.random.loggamma(key, alpha, (2,))
  return jax.nn.sigmoid(first - second)


def draw_box(key: jax.Array, share: jax.Array, size: tuple[int, int]) -> Box:
  """A box of about 1 - share of the area about a uniform centre, cut off at the border."""
  length = jnp.array(size)
  center = jax.random.randint(key, (2,), 0, length)
  half = (length * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
  top, left = jnp.maximum(center - half, 0)
  bottom, right = jnp.minimum(center + half, length)
  return top, bottom, left, right


def _average(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
  share = share.astype(first.dtype)
  return share * first + (1 - share) * second
