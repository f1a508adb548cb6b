"""ReLU and its gradient against Flax. The fused norms are tested in tests/models/test_norms.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels import backend, norm_relu

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("backend_name", ["xla", "definition"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_equals_flax_in_value_and_gradient(dtype, backend_name, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, backend_name)
  x = jnp.asarray([-jnp.inf, -2, -1e-30, -0.0, 0.0, 1e-30, 3, jnp.inf, jnp.nan], dtype)
  for ours, theirs in (
    (norm_relu.relu(x), nn.relu(x)),
    (jax.vmap(jax.grad(norm_relu.relu))(x[:-1]), x[:-1] > 0),
  ):
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
