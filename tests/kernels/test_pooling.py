"""Max pooling against Flax, in value and gradient."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels import pooling
from tests import reference


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 5, 3), (1, 3, 8, 1)])
def test_max_pool_and_its_gradient_equal_flax(shape, window):
  rng, sides = np.random.default_rng(0), (window, window)
  pool = partial(nn.max_pool, window_shape=sides, strides=sides)
  for x in (rng.normal(size=shape), rng.integers(0, 2, shape)):  # the second has ties
    x = x.astype(np.float32)
    y, backward = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, window)), x)
    expected, expected_backward = jax.vjp(pool, x)
    np.testing.assert_array_equal(y, expected)
    direction = rng.normal(size=y.shape).astype(np.float32)
    np.testing.assert_array_equal(backward(direction)[0], expected_backward(direction)[0])


def test_max_pool_counts_the_pixels_of_a_large_window():
  x = np.zeros((1, 17, 17, 1), np.float32)
  x[0, 16, 15] = 1  # pixel 287 of 289
  np.testing.assert_array_equal(jax.grad(lambda x: pooling.max_pool(x, 17).sum())(x), x)


def test_max_pool_loses_no_gradient_where_its_input_is_recomputed():
  """XLA:CPU fuses the layers before a pool into both passes, where it may round differently."""
  model = reference.create_model("ghost", norm="ghost", dropout_rate=0.1)
  variables = reference.draw_variables(model)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(10, 32, 32, 3)), jnp.float32)

  def loss_fn(params, pool):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr("flax_cifar.kernels.pooling.max_pool", pool)
      logits, _ = model.apply(
        variables | {"params": params},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
      )
    return jnp.square(logits).mean()

  def flax_pool(x, window):
    return nn.max_pool(x, (window, window), strides=(window, window))

  ours, theirs = (
    jax.jit(jax.grad(partial(loss_fn, pool=pool)))(variables["params"])
    for pool in (pooling.max_pool, flax_pool)
  )
  for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.linalg.norm(a - e) <= 1e-4 * np.linalg.norm(e)
