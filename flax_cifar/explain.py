"""Where a network looks: Grad-CAM, and the effective receptive field.

Both are gradients at the last feature map: the output of the last module of the network itself, not
of a part of it, that still has several positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from flax_cifar.kernels import backend

Change = Callable[[Array], Array]


class FeatureMap(NamedTuple):
  """The last feature map of a network: the module's name and the shape (H, W, C)."""

  name: str
  shape: tuple[int, int, int]


def find_last_map(model: nn.Module, image_shape: tuple[int, ...]) -> FeatureMap:
  """Finds the last feature map of `model` for images (H, W, C); computes nothing.

  Raises:
    ValueError: no module's output has several positions.
  """
  found: list[FeatureMap] = []

  def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    y = next_fun(*args, **kwargs)
    if _is_own_module(context) and jnp.ndim(y) == 4 and max(y.shape[1:3]) > 1:
      found.append(FeatureMap(context.module.name or "", y.shape[1:]))
    return y

  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  with backend.use("definition"), nn.intercept_methods(record):
    jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)
  if not found:
    raise ValueError("no module of the network has an output with several positions")
  return found[-1]


def compute_grad_cam(
  model: nn.Module,
  variables: Any,
  images: Float[Array, "n h w 3"],
  classes: Int[Array, " n"],
) -> Float32[Array, "n h2 w2"]:
  """Computes how much each position of the last feature map speaks for a class, in [0, 1].

  Source: Selvaraju et al. 2017, arXiv:1610.02391.

  Args:
    model: the network.
    variables: of the network.
    images: normalized, as the network takes them.
    classes: for each image the class that is asked about.

  Returns:
    For each image the map divided by its largest value; zeros where nothing speaks for the class.
  """
  last = find_last_map(model, images.shape[1:])

  def get_score(offset: Array) -> tuple[Array, Array]:
    logits, features = _run(model, variables, images, last, lambda y: y + offset.astype(y.dtype))
    return jnp.take_along_axis(logits, classes[:, None], 1).sum(), features

  zeros = jnp.zeros((len(images), *last.shape))
  with backend.use("definition"):  # kernels that join layers have no map between them
    gradient, features = jax.grad(get_score, has_aux=True)(zeros)
  weights = gradient.mean((1, 2), keepdims=True)
  cam = nn.relu((weights * features.astype(jnp.float32)).sum(-1))
  return cam / jnp.maximum(cam.max((1, 2), keepdims=True), jnp.finfo(jnp.float32).tiny)


def compute_effective_receptive_field(
  model: nn.Module, variables: Any, images: Float[Array, "n h w 3"]
) -> Float32[Array, "h w"]:
  """Computes how much each pixel moves the middle of the last feature map, on average over images.

  It is the mean absolute gradient of the sum over channels, divided by its largest value. Source:
  Luo et al. 2016, arXiv:1701.04128.
  """
  last = find_last_map(model, images.shape[1:])
  row, column = last.shape[0] // 2, last.shape[1] // 2

  def get_middle(images: Array) -> Array:
    _, features = _run(model, variables, images, last, lambda y: y)
    return features[:, row, column].astype(jnp.float32).sum()

  with backend.use("definition"):  # see above
    gradient = jnp.abs(jax.grad(get_middle)(images)).mean((0, 3))
  return gradient / jnp.maximum(gradient.max(), jnp.finfo(jnp.float32).tiny)


def _run(
  model: nn.Module, variables: Any, images: Array, last: FeatureMap, change: Change
) -> tuple[Array, Array]:
  """Returns the logits and the last feature map, which `change` may change on its way."""
  seen: list[Array] = []

  def intercept(
    next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
  ) -> Any:
    y = next_fun(*args, **kwargs)
    if _is_own_module(context) and context.module.name == last.name:
      seen.append(change(y))
      return seen[-1]
    return y

  with nn.intercept_methods(intercept):
    logits: Any = model.apply(variables, images, train=False)
  return logits, seen[-1]


def _is_own_module(context: nn.module.InterceptorContext) -> bool:
  return context.method_name == "__call__" and len(context.module.path) == 1
