"""Grad-CAM and the effective receptive field against closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import explain
from flax_cifar.models import layer_table
from tests import reference


def draw_images(count, side=32):
  return jnp.asarray(np.random.default_rng(0).normal(size=(count, side, side, 3)), jnp.float32)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("pyramid", ("c3_3", (3, 3, 64))),
    ("tiny50k", ("norm", (8, 8, 64))),
    ("keras_base", ("dropout3", (2, 2, 192))),
  ],
)
def test_the_last_feature_map_is_that_before_the_global_pool_or_the_dense_layers(name, expected):
  model = reference.create_model(name, norm=reference.NORMS[name])
  found = explain.find_last_map(model, (32, 32, 3))
  assert (found.name, found.shape) == expected


def test_grad_cam_before_a_global_pool_is_the_class_activation_map():
  """There the gradient is the head's weight over the number of positions: Zhou et al. 2016."""
  model = reference.create_model("pyramid", norm="batch", dropout_rate=0.0)
  variables = jax.tree.map(jnp.asarray, reference.draw_variables(model))
  images = draw_images(3)
  classes = jnp.array([0, 7, 3])
  cam = jax.jit(explain.compute_grad_cam, static_argnums=0)(model, variables, images, classes)
  _, kept = model.apply(
    variables, images, train=False, capture_intermediates=lambda module, _: module.name == "c3_3"
  )
  (features,) = kept["intermediates"]["c3_3"]["__call__"]
  head = variables["params"]["head"]["conv"]["kernel"][0, 0]
  expected = np.maximum(np.einsum("nhwc,cn->nhw", np.float64(features), head[:, classes]), 0)
  peaks = expected.max((1, 2), keepdims=True)
  assert (peaks > 0).any()
  np.testing.assert_allclose(cam, expected / np.where(peaks, peaks, 1), atol=1e-4)


def test_the_effective_receptive_field_lies_within_the_theoretical_one():
  model = reference.create_model("pyramid", norm="batch", dropout_rate=0.0)
  variables = jax.tree.map(jnp.asarray, reference.draw_variables(model))
  images = draw_images(1, side=64)
  compute = jax.jit(explain.compute_effective_receptive_field, static_argnums=0)
  field = np.asarray(compute(model, variables, images))
  assert field.shape == (64, 64)
  assert field.max() == pytest.approx(1, rel=1e-6)  # XLA may multiply by the reciprocal
  rows, columns = np.nonzero(field)
  extent = layer_table.get_receptive_field(layer_table.get_layer_table(model, (64, 64, 3)))
  assert max(np.ptp(rows), np.ptp(columns)) + 1 <= extent[0] == extent[1]
  assert np.ptp(rows) + 1 > extent[0] / 2


def test_a_network_without_a_map_is_an_error():
  class Flat(nn.Module):
    @nn.compact
    def __call__(self, images, train):
      return nn.Dense(10)(images.mean((1, 2)))

  with pytest.raises(ValueError, match="several positions"):
    explain.find_last_map(Flat(), (8, 8, 3))
