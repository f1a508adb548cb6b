"""The end of a unit in C++ against its definition, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels.native import finish, library
from flax_cifar.models import dropout
from tests.kernels.native.definitions import SHAPES, apply, compare, draw, draw_affine, halve

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

KEY = jax.random.key(7)


def get_mask(rate):
  """The numbers of a Dropout whose rng is KEY, and the elements of `shape` that it keeps."""
  layer = dropout.Dropout(rate)
  mask = layer.apply({}, True, rngs={"dropout": KEY}, method="get_mask")
  return mask, lambda x: layer.apply({}, jnp.ones_like(x), True, rngs={"dropout": KEY})


@pytest.mark.parametrize(
  ("shape", "with_shortcut", "relu", "rate", "dtype"),
  [
    *halve([*SHAPES, (2, 3, 5, 10)], [False, True], [False, True], [0.3], ["float32", "bfloat16"]),
    ((3, 4, 4, 24), True, True, 0.0, "float32"),
    ((32, 32, 32, 32), True, True, 0.1, "float32"),
  ],
)
def test_the_end_of_a_unit_equals_its_definition(shape, with_shortcut, relu, rate, dtype):
  mask, keep = get_mask(rate)

  def ours(x, affine, *shortcut):
    return finish.finish(x, affine, *(shortcut or [None]), mask, relu=relu)

  def theirs(x, affine, *shortcut):
    return sum(shortcut, apply(affine, x, relu) * kept)

  x = draw(*shape, dtype=dtype)
  kept = np.asarray(keep(x.astype(jnp.float32)))
  assert len(np.unique(kept)) == (2 if rate else 1)
  shortcut = [draw(*shape, seed=9, dtype=dtype)] if with_shortcut else []
  compare(ours, theirs, (x, draw_affine(x), *shortcut), dtype)


def test_an_affine_may_be_the_same_for_all_images():
  x = draw(5, 7, 9, 48)
  own = draw_affine(x[:1])

  def run(affine):
    return finish.finish(x, affine, None, None, relu=True).sum()

  shared, spread = jax.grad(run)(own), jax.grad(run)(jax.tree.map(lambda a: a.repeat(5, 0), own))
  for one, all_images in zip(shared, spread, strict=True):
    np.testing.assert_allclose(one[0], all_images.sum(0), rtol=1e-5)


@pytest.mark.parametrize(("rate", "train"), [(0.0, True), (0.5, False)])
def test_no_mask_where_nothing_is_dropped(rate, train):
  layer = dropout.Dropout(rate)
  assert layer.apply({}, train, rngs={"dropout": KEY}, method="get_mask") is None
