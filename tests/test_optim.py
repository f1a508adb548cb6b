"""Optimizers against their formulas, schedules in closed form, the plateau against torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import errors, optim
from flax_cifar.configs import common
from flax_cifar.models import norms

RATE, DECAY = 0.1, 0.01


def run(steps=5, **changes):
  """Parameters after `steps` of gradients 1, 2, 3 ... on a kernel and a bias."""
  config = common.get_config().optimizer.to_dict() | {"learning_rate": RATE, "weight_decay": DECAY}
  optimizer = optim.create_optimizer(lambda step: 1.0, **(config | changes))
  params = {"kernel": np.full((2, 2), 3.0, np.float32), "bias": np.full(2, 3.0, np.float32)}
  state = optimizer.init(params)
  for step in range(steps):
    gradients = {name: np.full_like(p, step + 1.0) for name, p in params.items()}
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params


def torch_sgd(steps, *, decay, momentum, nesterov):
  """torch.optim.SGD: the decay is added to the gradient before the momentum buffer."""
  p, buffer = 3.0, 0.0
  for step in range(steps):
    g = step + 1.0 + decay * p
    buffer = momentum * buffer + g if step else g
    p -= RATE * (g + momentum * buffer if nesterov else buffer)
  return p


def adamw(steps, *, decay, b1=0.9, b2=0.999, epsilon=1e-8):
  """Loshchilov and Hutter 2019: the decay acts only on the parameter."""
  p, m, v = 3.0, 0.0, 0.0
  for step in range(1, steps + 1):
    g = float(step)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    adam = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + epsilon)
    p -= RATE * (adam + decay * p)
  return p


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_matches_torch(nesterov, momentum):
  params = run(sgd={"momentum": momentum, "nesterov": nesterov})
  expected = torch_sgd(5, decay=DECAY, momentum=momentum, nesterov=nesterov)
  np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)
  np.testing.assert_allclose(params["bias"], expected, rtol=1e-6)


@pytest.mark.parametrize(("b1", "b2", "epsilon"), [(0.9, 0.999, 1e-8), (0.5, 0.8, 0.1)])
def test_adamw_matches_the_paper(b1, b2, epsilon):
  arguments = {"b1": b1, "b2": b2, "epsilon": epsilon}
  params = run(name="adamw", adamw=arguments)
  np.testing.assert_allclose(params["kernel"], adamw(5, decay=DECAY, **arguments), rtol=1e-5)


def step_muon(params, gradients, **changes):
  """The first update of muon, by default with a learning rate of RATE and no decay."""
  config = common.get_config().optimizer.to_dict() | {"name": "muon", "learning_rate": RATE}
  optimizer = optim.create_optimizer(lambda step: 1.0, **(config | changes))
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  return updates


def draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 1, 16, 6), (12, 20)])
def test_muon_steps_by_similar_amounts_along_the_singular_vectors_of_the_gradient(shape):
  gradient = draw(*shape)
  update = np.asarray(step_muon({"kernel": draw(*shape)}, {"kernel": gradient})["kernel"])
  assert update.shape == shape
  matrix, step = gradient.reshape(-1, shape[-1]), update.reshape(-1, shape[-1])
  u, _, vt = np.linalg.svd(matrix, full_matrices=False)
  sizes = -u.T @ step @ vt.T / (RATE * 0.2 * np.sqrt(max(matrix.shape)))
  # Newton and Schulz's five steps leave singular values between 0.7 and 1.2.
  diagonal = np.diag(sizes)
  assert (diagonal > 0.65).all()
  assert (diagonal < 1.25).all()
  np.testing.assert_allclose(sizes, np.diag(diagonal), atol=2e-2)


def test_muon_takes_momentum_and_rms():
  """The update is linear in `rms`; momentum decides what the first gradient does to the second."""
  gradients = [{"kernel": draw(1, 1, 8, 8)}, {"kernel": draw(8, 8).T.reshape(1, 1, 8, 8).copy()}]

  def second_update(momentum, rms):
    config = common.get_config().optimizer.to_dict() | {"name": "muon", "weight_decay": 0.0}
    config["muon"] = {"momentum": momentum, "rms": rms}
    optimizer = optim.create_optimizer(lambda step: 1.0, **config)
    state = optimizer.init(gradients[0])
    for gradient in gradients:
      updates, state = optimizer.update(gradient, state, gradients[0])
    return updates["kernel"]

  plain = second_update(0.5, 0.2)
  np.testing.assert_allclose(second_update(0.5, 0.6), 3 * plain, rtol=1e-4, atol=1e-7)
  assert np.linalg.norm(second_update(0.95, 0.2) - plain) > 0.05 * np.linalg.norm(plain)


def test_muon_uses_nadam_for_depthwise_kernels_and_vectors():
  params = {"depthwise": draw(3, 3, 1, 5), "bias": draw(5)}
  updates = step_muon(params, params)
  # With Nesterov momentum (Dozat 2016), whose first step is longer than Adam's.
  first = 0.9 * (1 - 0.9) / (1 - 0.9**2) + 1
  for name, update in updates.items():
    np.testing.assert_allclose(update, -RATE * first * np.sign(params[name]), rtol=1e-4)


@pytest.mark.parametrize("decay_all", [True, False])
def test_muon_decouples_the_decay_and_exempts_vectors_if_configured(decay_all):
  params = {"kernel": draw(3, 3, 4, 8), "depthwise": draw(3, 3, 1, 8), "bias": draw(8)}
  plain = step_muon(params, params)
  decayed = step_muon(params, params, weight_decay=DECAY, decay_all=decay_all)
  for name, exempt in (("kernel", False), ("depthwise", False), ("bias", not decay_all)):
    expected = plain[name] - (0 if exempt else RATE * DECAY * params[name])
    np.testing.assert_allclose(decayed[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_mask_exempts_biases_and_norms_from_decay(name):
  masked, plain = run(name=name, decay_all=False), run(name=name, weight_decay=0.0)
  np.testing.assert_allclose(masked["bias"], plain["bias"], rtol=1e-6)
  assert (masked["kernel"] < plain["kernel"]).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_whitening_kernel_is_neither_decayed_nor_moved(name):
  params = {"whitening": {"fixed_kernel": draw(2, 2, 3, 24), "bias": draw(24)}}
  config = common.get_config().optimizer.to_dict() | {"name": name, "weight_decay": 0.5}
  optimizer = optim.create_optimizer(lambda step: 1.0, **config)
  gradients = {"whitening": {"fixed_kernel": jnp.zeros((2, 2, 3, 24)), "bias": jnp.ones(24)}}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  assert not updates["whitening"]["fixed_kernel"].any()
  assert updates["whitening"]["bias"].all()


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_fixed_scale_is_neither_decayed_nor_moved(name, decay_all):
  norm = norms.BatchNorm(momentum=0.9, epsilon=1e-5, train_scale=False)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 3)), jnp.float32)
  variables = norm.init(jax.random.key(0, impl="rbg"), x, False)
  params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
  config = common.get_config().optimizer.to_dict() | {"weight_decay": 0.5, "decay_all": decay_all}
  optimizer = optim.create_optimizer(lambda step: 1.0, **(config | {"name": name}))

  @jax.grad
  def differentiate(params):
    y, _ = norm.apply({"params": params, **stats}, x, True, mutable=["batch_stats"])
    return jnp.square(y + x).sum()

  state = optimizer.init(params)
  for _ in range(3):
    updates, state = optimizer.update(differentiate(params), state, params)
    params = optax.apply_updates(params, updates)
  assert params["fixed_scale"].tolist() == [1.0] * 3
  assert (params["bias"] != 0).all()


def test_schedule_multiplies_the_peak():
  config = common.get_config().optimizer.to_dict() | {"learning_rate": 2.0}
  config["sgd"] = {"momentum": 0.0, "nesterov": False}
  optimizer = optim.create_optimizer(lambda step: 0.5 ** (step + 1), **config)
  params = {"w": np.zeros(1, np.float32)}
  state = optimizer.init(params)
  for expected in (-1.0, -0.5):
    updates, state = optimizer.update({"w": np.ones(1, np.float32)}, state, params)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "sdg"}, "optimizer.name='sdg'.*Did you mean 'sgd'"),
    ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
    ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
    ({"sgd": {"momentum": 1.0, "nesterov": False}}, "optimizer.sgd.momentum=1.0"),
    ({"name": "muon", "muon": {"momentum": 1.0, "rms": 0.2}}, "optimizer.muon.momentum=1.0"),
    ({"name": "muon", "muon": {"momentum": 0.9, "rms": 0.0}}, "optimizer.muon.rms=0.0"),
  ],
)
def test_bad_values_are_named(changes, message):
  with pytest.raises(errors.UserError, match=message):
    run(**changes)


STEPS, EPOCHS = 10, 20  # steps per epoch, epochs


def compute_schedule(name, **arguments):
  config = common.get_config().schedule.to_dict()
  config[name] = config[name] | arguments
  config["name"] = name
  schedule = optim.create_schedule(steps_per_epoch=STEPS, total_epochs=EPOCHS, **config)
  return np.array([float(schedule(step)) for step in range(STEPS * EPOCHS + 1)])


def test_constant_is_one():
  np.testing.assert_array_equal(compute_schedule("constant"), 1.0)


def test_the_plateau_schedule_is_one_apart_from_its_scale():
  np.testing.assert_array_equal(compute_schedule("plateau"), 1.0)


def test_step_multiplies_after_every_period():
  expected = [0.5 ** (step // (3 * STEPS)) for step in range(STEPS * EPOCHS + 1)]
  np.testing.assert_allclose(compute_schedule("step", factor=0.5, every=3.0), expected, rtol=1e-6)


def test_cosine_with_warmup():
  warm, total = 2 * STEPS, STEPS * EPOCHS

  def expected(step):
    if step < warm:
      return step / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

  np.testing.assert_allclose(
    compute_schedule("cosine", warmup=2.0, final=0.1),
    [expected(s) for s in range(total + 1)],
    atol=1e-6,
  )


@pytest.mark.parametrize("final", [0.01, 1e6])
def test_exponential_changes_by_the_same_factor_at_each_step(final):
  total = STEPS * EPOCHS
  np.testing.assert_allclose(
    compute_schedule("exponential", final=final),
    [final ** (s / total) for s in range(total + 1)],
    rtol=1e-5,
  )


def test_cosine_without_warmup_starts_at_the_peak_and_ends_at_zero():
  curve = compute_schedule("cosine")
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
    compute_schedule("one_cycle", initial=0.2, peak_at=0.25, final=0.1),
    [expected(s) for s in range(total + 1)],
    atol=1e-6,
  )


def torch_scales(losses, *, factor, patience, threshold, cooldown, final):
  """The scales of torch.optim.lr_scheduler.ReduceLROnPlateau(mode="min") by its documentation."""
  best, bad, cooldown_left, scale, scales = math.inf, 0, 0, 1.0, []
  for loss in losses:
    if loss < best * (1 - threshold):
      best, bad = loss, 0
    else:
      bad += 1
    if cooldown_left:
      cooldown_left, bad = cooldown_left - 1, 0
    if bad > patience:
      scale, cooldown_left, bad = max(scale * factor, final), cooldown, 0
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
  plateau = optim.create_plateau(enabled=True, **arguments)
  update = jax.jit(plateau.observe)
  state = plateau.init({"w": np.zeros(3, np.float32)})
  scales = []
  for loss in losses:
    state = update(state, loss)
    scales.append(float(state.scale))
  np.testing.assert_allclose(scales, torch_scales(losses, **arguments), rtol=1e-5)
  assert scales[-1] < 1


def test_patience_zero_cuts_at_the_first_bad_epoch_only():
  plateau = optim.create_plateau(
    enabled=True, factor=0.8, patience=0, threshold=1e-4, cooldown=0, final=0.0
  )
  state = plateau.init({"w": np.zeros(1, np.float32)})
  scales = []
  for loss in (1.0, 0.9, 0.95, 0.8):
    state = plateau.observe(state, loss)
    scales.append(float(state.scale))
  np.testing.assert_allclose(scales, [1.0, 1.0, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "arguments", "quoted"),
  [
    ("step", {"factor": -1.0}, "-1.0"),
    ("step", {"every": 0.0}, "0.0"),
    ("exponential", {"final": 0.0}, "0.0"),
    ("cosine", {"warmup": 30.0}, "30.0"),
    ("cosine", {"final": 2.0}, "2.0"),
    ("one_cycle", {"peak_at": 1.5}, "1.5"),
  ],
)
def test_arguments_out_of_range_are_quoted(name, arguments, quoted):
  with pytest.raises(errors.UserError, match=quoted):
    compute_schedule(name, **arguments)


@pytest.mark.parametrize("argument", ["factor", "patience", "threshold", "cooldown", "final"])
def test_plateau_arguments_out_of_range_are_named(argument):
  arguments = common.get_config().schedule.plateau.to_dict() | {argument: -1}
  with pytest.raises(errors.UserError, match=f"{argument}=-1"):
    optim.create_plateau(enabled=True, **arguments)


def test_unknown_name_lists_the_choices():
  with pytest.raises(
    errors.UserError, match=r"'cosin' is unknown.*one_cycle.*Did you mean 'cosine'"
  ):
    optim.create_schedule(name="cosin", steps_per_epoch=1, total_epochs=1)
