"""The end of a unit in C++ against its definition, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import finish, library
from flax_cifar.models import dropout
from tests.kernels.native.definitions import SHAPES, apply, compare, draw, draw_affine, halve

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

KEY = jax.random.key(7)
DEFINITIONS = {
  "none": lambda y: y,
  "relu": lambda y: jnp.where(y > 0, y, 0),
  "silu": lambda y: y / (1 + jnp.exp(-y)),
  "gelu": lambda y: y * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
}


def get_mask(rate):
  """The numbers of a Dropout whose rng is KEY, and the elements of `shape` that it keeps."""
  layer = dropout.Dropout(rate)
  mask = layer.apply({}, True, rngs={"dropout": KEY}, method="get_mask")
  return mask, lambda x: layer.apply({}, jnp.ones_like(x), True, rngs={"dropout": KEY})


@pytest.mark.parametrize(
  ("shape", "with_shortcut", "activation", "rate", "dtype"),
  [
    *halve([*SHAPES, (2, 3, 5, 10)], [False, True], DEFINITIONS, [0.3], ["float32", "bfloat16"]),
    ((3, 4, 4, 24), True, "relu", 0.0, "float32"),
    ((32, 32, 32, 32), True, "silu", 0.1, "float32"),
  ],
)
def test_the_end_of_a_unit_equals_its_definition(shape, with_shortcut, activation, rate, dtype):
  mask, keep = get_mask(rate)

  def ours(x, affine, *shortcut):
    return finish.finish(x, affine, *(shortcut or [None]), mask, activation=activation)

  def theirs(x, affine, *shortcut):
    return sum(shortcut, DEFINITIONS[activation](apply(affine, x)) * kept)

  x = draw(*shape, dtype=dtype)
  kept = np.asarray(keep(x.astype(jnp.float32)))
  assert len(np.unique(kept)) == (2 if rate else 1)
  shortcut = [draw(*shape, seed=9, dtype=dtype)] if with_shortcut else []
  compare(ours, theirs, (x, draw_affine(x), *shortcut), dtype)


def test_an_affine_may_be_the_same_for_all_images():
  x = draw(5, 7, 9, 48)
  own = draw_affine(x[:1])

  def run(affine):
    return finish.finish(x, affine, None, None, activation="relu").sum()

  shared, spread = jax.grad(run)(own), jax.grad(run)(jax.tree.map(lambda a: a.repeat(5, 0), own))
  for one, all_images in zip(shared, spread, strict=True):
    np.testing.assert_allclose(one[0], all_images.sum(0), rtol=1e-5)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_of_large_values(name):
  values = [-1e4, -100.0, -87.5, -86.5, -20.0, 0.0, 1e-30, 20.0, 87.5, 100.0, 1e4]
  x = jnp.broadcast_to(jnp.array(values)[:, None], (1, 1, len(values), 16))

  def run(x):
    return finish.finish(x, moments_lib.get_identity(16), None, None, activation=name)

  y, pull = jax.vjp(run, x)
  expected = [0.0 if name != "none" and value < 0 else value for value in values]
  np.testing.assert_allclose(y[0, 0, :, 0], expected, rtol=1e-6, atol=1e-7)
  (slopes,) = pull(jnp.ones_like(y))
  np.testing.assert_allclose(slopes[0, 0, :5, 0], float(name == "none"), atol=1e-6)
  np.testing.assert_allclose(slopes[0, 0, 7:, 0], 1, rtol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_keep_nan(name):
  x = jnp.full((1, 1, 1, 16), jnp.nan)
  y = finish.finish(x, moments_lib.get_identity(16), None, None, activation=name)
  assert jnp.isnan(y).all()


@pytest.mark.parametrize(("rate", "train"), [(0.0, True), (0.5, False)])
def test_no_mask_where_nothing_is_dropped(rate, train):
  layer = dropout.Dropout(rate)
  assert layer.apply({}, train, rngs={"dropout": KEY}, method="get_mask") is None
