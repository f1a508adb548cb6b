"""Schedules against closed forms; reduce-on-plateau against the rule torch documents."""

import math

import jax
import numpy as np
import pytest

from configs.common import get_config
from flax_cifar.errors import UserError
from flax_cifar.schedules import create_plateau, create_schedule

STEPS, EPOCHS = 10, 20  # steps per epoch, epochs


def values(name, **arguments):
  config = get_config().schedule.to_dict()
  config[name] = config[name] | arguments
  config["name"] = name
  schedule = create_schedule(steps_per_epoch=STEPS, total_epochs=EPOCHS, **config)
  return np.array([float(schedule(step)) for step in range(STEPS * EPOCHS + 1)])


def test_constant_is_one():
  np.testing.assert_array_equal(values("constant"), 1.0)


def test_plateau_leaves_the_schedule_to_its_scale():
  np.testing.assert_array_equal(values("plateau"), 1.0)


def test_step_multiplies_after_every_period():
  expected = [0.5 ** (step // (3 * STEPS)) for step in range(STEPS * EPOCHS + 1)]
  np.testing.assert_allclose(values("step", factor=0.5, every=3.0), expected, rtol=1e-6)


def test_cosine_with_warmup():
  warm, total = 2 * STEPS, STEPS * EPOCHS

  def expected(step):
    if step < warm:
      return step / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

  np.testing.assert_allclose(
    values("cosine", warmup=2.0, final=0.1), [expected(s) for s in range(total + 1)], atol=1e-6
  )


def test_cosine_without_warmup_starts_at_the_peak_and_ends_at_zero():
  curve = values("cosine")
  assert curve[0] == 1.0
  assert curve[-1] == pytest.approx(0, abs=1e-7)
  assert (np.diff(curve) < 0).all()


def test_one_cycle_is_a_triangle():
  total, peak = STEPS * EPOCHS, 0.25 * STEPS * EPOCHS

  def expected(step):
    if step < peak:
      return 0.2 + 0.8 * step / peak
    return 1 - 0.9 * (step - peak) / (total - peak)

  np.testing.assert_allclose(
    values("one_cycle", initial=0.2, peak_at=0.25, final=0.1),
    [expected(s) for s in range(total + 1)],
    atol=1e-6,
  )


def torch_scales(losses, *, factor, patience, threshold, cooldown, final):
  """What torch.optim.lr_scheduler.ReduceLROnPlateau(mode="min") is documented to do."""
  best, bad, resting, scale, scales = math.inf, 0, 0, 1.0, []
  for loss in losses:
    if loss < best * (1 - threshold):
      best, bad = loss, 0
    else:
      bad += 1
    if resting:
      resting, bad = resting - 1, 0
    if bad > patience:
      scale, resting, bad = max(scale * factor, final), cooldown, 0
    scales.append(scale)
  return scales


@pytest.mark.parametrize("patience", [0, 1, 5])
@pytest.mark.parametrize("cooldown", [0, 3])
@pytest.mark.parametrize("threshold", [1e-4, 0.1])
def test_plateau_follows_torch(patience, cooldown, threshold):
  rng = np.random.default_rng(patience + 10 * cooldown)
  losses = np.abs(np.concatenate([np.linspace(2.03, 1, 20), 1 + 0.1 * rng.standard_normal(60)]))
  arguments = {
    "factor": 0.3,
    "patience": patience,
    "threshold": threshold,
    "cooldown": cooldown,
    "final": 1e-3,
  }
  plateau = create_plateau(**arguments)
  update = jax.jit(lambda state, loss: plateau.update({}, state, value=loss)[1])
  state = plateau.init({"w": np.zeros(3, np.float32)})
  scales = []
  for loss in losses:
    state = update(state, loss)
    scales.append(float(state.scale))
  np.testing.assert_allclose(scales, torch_scales(losses, **arguments), rtol=1e-5)
  assert scales[-1] < 1


def test_patience_zero_cuts_at_the_first_bad_epoch_only():
  plateau = create_plateau(factor=0.8, patience=0, threshold=1e-4, cooldown=0, final=0.0)
  state = plateau.init({"w": np.zeros(1, np.float32)})
  scales = []
  for loss in (1.0, 0.9, 0.95, 0.8):
    state = plateau.update({}, state, value=loss)[1]
    scales.append(float(state.scale))
  np.testing.assert_allclose(scales, [1.0, 1.0, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "arguments", "quoted"),
  [
    ("step", {"factor": -1.0}, "-1.0"),
    ("step", {"every": 0.0}, "0.0"),
    ("cosine", {"warmup": 30.0}, "30.0"),
    ("cosine", {"final": 2.0}, "2.0"),
    ("one_cycle", {"peak_at": 1.5}, "1.5"),
  ],
)
def test_arguments_out_of_range_are_quoted(name, arguments, quoted):
  with pytest.raises(UserError, match=quoted):
    values(name, **arguments)


@pytest.mark.parametrize("argument", ["factor", "patience", "threshold", "cooldown", "final"])
def test_plateau_arguments_out_of_range_are_named(argument):
  arguments = get_config().schedule.plateau.to_dict() | {argument: -1}
  with pytest.raises(UserError, match=f"{argument}=-1"):
    create_plateau(**arguments)


def test_unknown_name_lists_the_choices():
  with pytest.raises(UserError, match=r"'cosin' is unknown.*one_cycle.*Did you mean 'cosine'"):
    create_schedule(name="cosin", steps_per_epoch=1, total_epochs=1)
