"""Muon for GPUs against the Muon of optax, which takes one kernel after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import muon, optim
from flax_cifar.configs import common

SHAPES = {  # tall, wide, square, of equal and of nearly equal size, large, and no matrix
  "stem": (3, 3, 3, 32),
  "wide": (1, 1, 32, 48),
  "same": (1, 1, 32, 48),
  "square": (1, 1, 64, 64),
  "nearly": (1, 1, 60, 50),
  "large": (3, 3, 40, 160),
  "depthwise": (3, 3, 1, 48),
  "bias": (48,),
}


def draw(seed):
  rng = np.random.default_rng(seed)
  return {name: {"kernel": rng.normal(size=shape)} for name, shape in SHAPES.items()}


def create(function):
  return function(
    lambda step: 0.03 / (1 + step),
    beta=0.95,
    weight_decay=0.02,
    adam_weight_decay=0.01,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=muon.get_matrices,
  )


def test_updates_and_states_equal_those_of_optax():
  ours, theirs, params = create(muon.create), create(optax.contrib.muon), draw(0)
  states = [ours.init(params), theirs.init(params)]
  paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(s)] for s in states]
  assert paths[0] == paths[1]  # the names of leaves in a checkpoint
  for step in range(1, 4):
    gradients = jax.tree.map(jnp.float32, draw(step))
    (actual, states[0]), (expected, states[1]) = (
      jax.jit(optimizer.update)(gradients, state, params)
      for optimizer, state in zip((ours, theirs), states, strict=True)
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      assert np.abs(a - e).max() < 2e-5 * np.abs(e).max()
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_singular_values_move_to_about_one_and_zeros_around_a_matrix_change_nothing():
  x = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
  coefficients = optax.contrib.scale_by_muon().init({}).ns_coeffs
  values = np.linalg.svd(muon.iterate(x, coefficients), compute_uv=False)
  assert values.min() > 0.65
  assert values.max() < 1.25
  padded = muon.iterate(np.pad(x, ((0, 0), (0, 12), (0, 2))), coefficients)
  np.testing.assert_allclose(padded[:, :20, :30], muon.iterate(x, coefficients), atol=1e-5)
  assert not padded[:, 20:].any()


@pytest.mark.parametrize("decay_all", [True, False])
def test_a_gpu_gets_it_with_the_states_of_a_cpu(decay_all, monkeypatch):
  """A run that began on one goes on with the checkpoints of the other."""
  arguments = common.get_config().optimizer.to_dict() | {"name": "muon", "decay_all": decay_all}
  structures = []
  for platform in ("cpu", "gpu"):
    monkeypatch.setattr(optim.jax, "default_backend", lambda platform=platform: platform)
    optimizer = optim.create_optimizer(lambda step: 1.0, **arguments)
    structures.append(jax.eval_shape(optimizer.init, draw(0)))
  names = [jax.tree_util.tree_leaves_with_path(structure) for structure in structures]
  assert names[0] == names[1]
