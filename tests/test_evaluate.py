"""Evaluation counts every example once, for any batch size, and each seed by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import evaluate
from flax_cifar.data import dataset
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from tests import tiny

COUNT = 13
MODEL = tiny.TinyNet()
INIT = jax.jit(functools.partial(MODEL.init, train=False))


def make_split():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (COUNT, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8)
  return dataset.Split(images, rng.integers(tiny.CLASSES, size=COUNT).astype(np.int32))


def make_variables(seed):
  return INIT(jax.random.key(seed), jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)))


def normalize(images):
  return jnp.asarray(images) / 255


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (16, 4)])
def test_every_seed_is_evaluated_exactly(batch_size, devices):
  split, single = make_split(), [make_variables(seed) for seed in range(2)]
  step = evaluate.create_eval_step(
    model=MODEL, normalize=normalize, mesh=mesh_lib.create_mesh(devices), num_seeds=2
  )
  sharding = mesh_lib.replicated(mesh_lib.create_mesh(devices))
  stacked = jax.device_put(seeds_lib.stack(single), sharding)
  logits, means = evaluate.predict_and_score(step, stacked, split, batch_size)
  for seed, variables in enumerate(single):
    expected = np.float64(MODEL.apply(variables, normalize(split.images), train=False))
    np.testing.assert_allclose(logits[seed], expected, atol=1e-5)
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    loss = -log_p[np.arange(COUNT), split.labels].mean()
    assert means["loss"][seed] == pytest.approx(loss, rel=1e-5)
    assert means["accuracy"][seed] == (expected.argmax(-1) == split.labels).mean()


def test_one_seed_has_no_axis():
  split = make_split()
  step = evaluate.create_eval_step(
    model=MODEL, normalize=normalize, mesh=mesh_lib.create_mesh(1), num_seeds=1
  )
  logits, means = evaluate.predict_and_score(step, make_variables(0), split, 4)
  assert (logits.shape, means["loss"].shape) == ((COUNT, tiny.CLASSES), ())
