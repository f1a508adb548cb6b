"""The training state and its moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import optim
from flax_cifar import state as state_lib
from tests import tiny

PLATEAU = {"factor": 0.5, "patience": 1, "threshold": 0.1, "cooldown": 0, "final": 0.0}


def create(seed=0, ema_decay=0.0):
  return state_lib.create_train_states(
    model=tiny.TinyNet(),
    optimizer=optax.sgd(0.1),
    plateau=optim.create_plateau(enabled=True, **PLATEAU),
    images=jnp.zeros((1, 8, 8, 3)),
    ema_decay=ema_decay,
    seeds=[seed],
  )[0]


def test_state_is_a_function_of_the_seed():
  same = jax.tree.map(lambda a, b: bool((a == b).all()), create(0).params, create(0).params)
  assert all(jax.tree.leaves(same))
  kernels = create(0).params["unit"]["conv"]["kernel"], create(1).params["unit"]["conv"]["kernel"]
  assert not np.allclose(*kernels)


def test_the_moving_average_is_evaluated():
  assert create().ema == {}
  assert create().eval_variables["params"] is not None
  state = create(ema_decay=0.9)
  state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
  for averaged, current in zip(
    jax.tree.leaves(state.eval_variables["params"]), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_array_equal(averaged, current + 1)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_ema_ramps_up_to_its_decay(decay):
  rng = np.random.default_rng(0)
  ema = expected = 5.0
  for step, new in enumerate(rng.normal(size=30)):
    keep = min(decay, (1 + step) / (10 + step))
    expected = keep * expected + (1 - keep) * new
    ema = state_lib.update_ema({"w": jnp.float32(ema)}, {"w": new}, jnp.int32(step), decay)["w"]
  assert float(ema) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (1024, 1024), (1500, 1024), (2999, 1024)])
def test_the_first_values_come_from_images_of_all_classes(count, expected):
  chosen = state_lib.choose_init_images(np.arange(count))
  assert len(chosen) == expected
  assert (chosen[0], chosen[-1]) == (0, count - 1)
  gaps = np.diff(chosen)  # they lie evenly
  assert 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1
