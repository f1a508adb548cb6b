"""Ten training steps of a network on fixed data, against recorded figures.

The figures cover what a step does with every network: loss, gradients, norms, optimizer, schedule,
moving average. tests/test_numerics.py has a step of each network. If a change is meant to alter a
figure, run `python -m tests.test_golden`, check the differences, and replace GOLDEN with the
output, in a separate commit that explains why.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import optim, train
from flax_cifar import state as state_lib
from flax_cifar.data.augment import normalize
from flax_cifar.kernels import backend
from flax_cifar.kernels.native import library
from flax_cifar.run import config as config_lib

BATCH_SIZE, STEPS = 16, 10
GOLDEN = {
  "skip": {
    1: {
      "loss": 2.5848536,
      "correct": 2.0,
      "update norm": 0.0075845672,
      "parameter norm": 27.267897,
      "batch statistics norm": 14.667615,
      "average norm": 27.267904,
      "average of batch statistics norm": 14.742173,
    },
    10: {
      "loss": 2.4208024,
      "correct": 2.0,
      "update norm": 0.0015910942,
      "parameter norm": 27.267008,
      "batch statistics norm": 13.96297,
      "average norm": 27.267035,
      "average of batch statistics norm": 13.765674,
    },
  },
}
# Muon amplifies the rounding errors of small singular values.
TOLERANCES = {"update norm": 1e-3}


def draw_batch():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (BATCH_SIZE, 32, 32, 3)).astype(np.uint8)
  return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(10, size=BATCH_SIZE))}


def draw_params(shapes):
  """Random parameters from NumPy, because random numbers of JAX may change with its version."""
  rng = np.random.default_rng(1)

  def draw(leaf):
    if leaf.ndim == 1:
      return np.float32(1 + 0.1 * rng.normal(size=leaf.shape))
    fan_in = np.prod(leaf.shape[:-1])
    return np.float32(rng.normal(size=leaf.shape) / np.sqrt(fan_in))

  return jax.tree.map(draw, shapes)


def create_state_and_step(name):
  """A state with random parameters, and a jitted step, of the config `name`."""
  config = importlib.import_module(f"flax_cifar.configs.{name}").get_config()
  config.schedule.one_cycle.initial = 0.5  # so that the first step moves the parameters
  # Small steps: at the full rate a ReLU flipped by rounding would change the tenth step.
  config.optimizer.learning_rate /= 100
  model = config_lib.create_model(config, num_classes=10)
  schedule = optim.create_schedule(steps_per_epoch=5, total_epochs=2, **config.schedule)
  optimizer = optim.create_optimizer(schedule, **config.optimizer)
  state = state_lib.create_train_states(
    model=model,
    optimizer=optimizer,
    plateau=optim.create_plateau(enabled=False, **config.schedule.plateau),
    images=jnp.zeros((1, 32, 32, 3)),
    ema_decay=config.ema.decay,
    seeds=[0],
  )[0]
  params = draw_params(state.params)
  state = state.replace(
    params=params,
    opt_state=optimizer.init(params),
    ema={"params": params, "batch_stats": state.batch_stats},
  )

  @jax.jit
  def step(state, batch):
    return train.train_step(
      state,
      batch,
      model=model,
      optimizer=optimizer,
      normalize=normalize.create_normalize((0.5,) * 3, (0.25,) * 3, dtype="float32"),
      mixing=None,
      distillation=None,
      label_smoothing=config.loss.label_smoothing,
      ema_decay=config.ema.decay,
    )

  return state, step


def get_norm(tree):
  return float(np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree))))


def measure(name):
  """The figures after one step and after STEPS."""
  state, step = create_state_and_step(name)
  batch, figures = draw_batch(), {}
  for number in range(1, STEPS + 1):
    before = state.params
    state, sums = step(state, batch)
    if number in (1, STEPS):
      moved = jax.tree.map(np.subtract, *jax.device_get((state.params, before)))
      figures[number] = {
        "loss": float(sums["loss_sum"]) / BATCH_SIZE,
        "correct": float(sums["correct"]),
        "update norm": get_norm(moved),
        "parameter norm": get_norm(state.params),
        "batch statistics norm": get_norm(state.batch_stats),
        "average norm": get_norm(state.ema["params"]),
        "average of batch statistics norm": get_norm(state.ema["batch_stats"]),
      }
  return figures


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.skipif(not library.is_available(), reason="there is no C++ compiler")
def test_steps_give_the_recorded_figures(name, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "native")  # "auto" on one device
  figures = measure(name)
  for number, expected in GOLDEN[name].items():
    for figure, value in expected.items():
      np.testing.assert_allclose(
        figures[number][figure],
        value,
        rtol=TOLERANCES.get(figure, 1e-5),
        err_msg=f"{figure} after {number} steps; if intended: python -m tests.test_golden",
      )


if __name__ == "__main__":
  print({name: measure(name) for name in ("skip",)})
