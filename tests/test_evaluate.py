"""Evaluation: every example once, whatever the batch size, and every seed by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.data.dataset import Split
from flax_cifar.evaluate import create_eval_step, evaluate, predict
from flax_cifar.partition import create_mesh
from flax_cifar.seeds import stack_seeds
from tests.tiny import CLASSES, IMAGE_SIZE, TinyNet

COUNT = 13
MODEL = TinyNet()
INIT = jax.jit(functools.partial(MODEL.init, train=False))


def make_split():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (COUNT, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  return Split(images, rng.integers(CLASSES, size=COUNT).astype(np.int32))


def make_variables(seed):
  return INIT(jax.random.key(seed), jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))


def normalize(images):
  return images / 255


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (16, 4)])
def test_every_seed_is_evaluated_exactly(batch_size, devices):
  split, single = make_split(), [make_variables(seed) for seed in range(2)]
  step = create_eval_step(model=MODEL, normalize=normalize, mesh=create_mesh(devices), num_seeds=2)
  means = evaluate(step, stack_seeds(single), split, batch_size)
  logits = predict(step, stack_seeds(single), split, batch_size)
  for seed, variables in enumerate(single):
    expected = np.float64(MODEL.apply(variables, normalize(split.images), train=False))
    np.testing.assert_allclose(logits[seed], expected, atol=1e-5)
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    loss = -log_p[np.arange(COUNT), split.labels].mean()
    assert means["loss"][seed] == pytest.approx(loss, rel=1e-5)
    assert means["accuracy"][seed] == (expected.argmax(-1) == split.labels).mean()


def test_one_seed_has_no_axis():
  split = make_split()
  step = create_eval_step(model=MODEL, normalize=normalize, mesh=create_mesh(1), num_seeds=1)
  assert predict(step, make_variables(0), split, 4).shape == (COUNT, CLASSES)
  assert evaluate(step, make_variables(0), split, 4)["loss"].shape == ()
