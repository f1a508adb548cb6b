"""The whole run on a tiny network: it learns, repeats, resumes, shards, stops on bad numbers."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import train
from flax_cifar.checkpoint import Checkpoints
from flax_cifar.errors import UserError
from flax_cifar.interrupt import Interrupted
from flax_cifar.models import MODELS
from flax_cifar.schedules import create_plateau
from flax_cifar.state import create_train_state
from tests.tiny import IMAGE_SIZE, TinyNet, get_config, write_data

STEPS_PER_EPOCH = 5  # 96 - 16 train images in batches of 16


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(MODELS, "tiny", TinyNet)


@pytest.fixture
def data(tmp_path):
  return write_data(tmp_path / "tiny.npz")


def run(workdir, data, **changes):
  return train.train_and_evaluate(get_config(data, **changes), workdir)


def lines(workdir):
  """metrics.jsonl without its clocks."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [
    {k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records
  ]


def saved_params(workdir, step):
  """The checkpointed parameters, read by Orbax alone."""
  import orbax.checkpoint as ocp

  path = (workdir / "checkpoints" / str(step) / "default").absolute()
  tree = ocp.StandardCheckpointer().restore(path)
  return jax.tree.leaves(tree["state"]["params"])


def interrupt_at(monkeypatch, step):
  """Sends SIGINT while the batch of `step` is fetched."""
  original = train.iterate

  def iterate(batches, *, start_step, workers):
    for i, batch in enumerate(original(batches, start_step=start_step, workers=workers)):
      if start_step + i == step:
        os.kill(os.getpid(), signal.SIGINT)
      yield batch

  monkeypatch.setattr(train, "iterate", iterate)


def test_a_run_learns_and_leaves_everything(tmp_path, data):
  result = run(tmp_path / "run", data, **{"total_epochs": 12, "log.pictures": True})
  assert result["test_accuracy"] > 0.9
  assert result["epochs"] == 12
  assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
  assert result["parameters"] == 9 * 3 * 6 + 2 * 6 + 6 * 3
  assert len(lines(tmp_path / "run")) == 12
  names = {path.name for path in (tmp_path / "run").iterdir()}
  assert names >= {"config.json", "summary.txt", "checkpoints", "metrics.jsonl", "result.json"}
  assert names >= {"augmented.png", "curves.png", "learning_rate.png", "misclassified.png"}


def test_reported_accuracy_is_that_of_the_saved_parameters(tmp_path, data):
  """Recomputes the forward pass in float64 NumPy from the checkpoint."""
  import orbax.checkpoint as ocp

  result = run(tmp_path / "run", data, **{"model.norm": "none", "total_epochs": 4})
  path = (tmp_path / "run" / "checkpoints" / "20" / "default").absolute()
  params = ocp.StandardCheckpointer().restore(path)["state"]["params"]
  arrays = np.load(data.removeprefix("npz:"))
  pixels = arrays["train_images"].astype(np.float64) / 255
  x = (arrays["test_images"] / 255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  kernel = np.asarray(params["unit"]["conv"]["kernel"], np.float64)
  maps = sum(
    padded[:, i : i + IMAGE_SIZE, j : j + IMAGE_SIZE] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  head = np.asarray(params["head"]["conv"]["kernel"], np.float64)[0, 0]
  logits = np.maximum(maps, 0).mean((1, 2)) @ head
  labels = arrays["test_labels"]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert result["test_accuracy"] == (logits.argmax(-1) == labels).mean()
  assert result["test_loss"] == pytest.approx(-log_p[np.arange(40), labels].mean(), rel=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, data):
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    run(tmp_path / name, data, seed=seed)
  assert lines(tmp_path / "a") == lines(tmp_path / "b")
  assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.mark.parametrize("step", [0, 3, 4, 7, 14])
def test_an_interrupted_run_ends_as_the_uninterrupted(tmp_path, data, monkeypatch, step):
  changes = {"ema.decay": 0.9, "schedule.name": "plateau", "schedule.plateau.patience": 0}
  run(tmp_path / "whole", data, **changes)
  with monkeypatch.context() as patch:
    interrupt_at(patch, step)
    with pytest.raises(Interrupted, match=f"saved at step {step + 1};"):
      run(tmp_path / "cut", data, **changes)
  assert not (tmp_path / "cut" / "result.json").exists()
  run(tmp_path / "cut", data, **changes)
  assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
  last = 3 * STEPS_PER_EPOCH
  for a, b in zip(
    saved_params(tmp_path / "whole", last), saved_params(tmp_path / "cut", last), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_four_devices_give_one_devices_curve(tmp_path, data):
  for devices in (1, 4):
    run(tmp_path / str(devices), data, num_devices=devices)
  for one, four in zip(lines(tmp_path / "1"), lines(tmp_path / "4"), strict=True):
    assert one["train_loss"] == pytest.approx(four["train_loss"], rel=1e-4)
    assert one["validation_loss"] == pytest.approx(four["validation_loss"], rel=1e-4)


def test_a_finished_run_is_left_alone(tmp_path, data, capsys):
  first = run(tmp_path / "run", data)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
  assert run(tmp_path / "run", data) == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
  assert "is finished" in capsys.readouterr().out


def test_more_epochs_go_on_where_a_finished_run_ended(tmp_path, data):
  run(tmp_path / "run", data)
  first = lines(tmp_path / "run")
  result = run(tmp_path / "run", data, total_epochs=5)
  assert result["epochs"] == 5
  assert lines(tmp_path / "run")[:3] == first
  assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, monkeypatch):
  """The checkpoint of the epoch before stays."""
  real_step = train.train_step

  def bad_step(state, batch, **kwargs):
    new, totals = real_step(state, batch, **kwargs)
    bad = jnp.where(state.step == 7, jnp.nan, 0.0)
    return new, totals | {"loss_sum": totals["loss_sum"] + bad}

  monkeypatch.setattr(train, "train_step", bad_step)
  with pytest.raises(UserError, match="loss became nan at step 8;"):
    run(tmp_path / "run", data)
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
  assert checkpoints.latest_step == STEPS_PER_EPOCH
  checkpoints.close()
  assert [line["epoch"] for line in lines(tmp_path / "run")] == [1]


def test_a_learning_rate_far_too_high_is_reported(tmp_path, data):
  changes = {"optimizer.learning_rate": 1e30, "model.norm": "none"}
  with pytest.raises(UserError, match=r"loss became (nan|inf) at step \d+.*learning_rate"):
    run(tmp_path / "run", data, **changes)


def test_published_protocol_says_so(tmp_path, data):
  result = run(tmp_path / "run", data, protocol="published")
  assert result["protocol"] == "published"
  assert result["test_accuracy"] == lines(tmp_path / "run")[-1]["validation_accuracy"]
  assert lines(tmp_path / "run")[0]["step"] == 6  # all 96 train images, not 80


def test_without_validation_the_run_ends_with_the_test(tmp_path, data):
  result = run(tmp_path / "run", data, **{"data.validation_size": 0})
  assert result["best_validation"] is None
  assert 0 <= result["test_accuracy"] <= 1


def test_plateau_cuts_the_learning_rate(tmp_path, data):
  """No epoch improves by 99 %: with patience 0 every one after the first is bad."""
  changes = {
    "schedule.name": "plateau",
    "schedule.plateau.factor": 0.5,
    "schedule.plateau.patience": 0,
    "schedule.plateau.threshold": 0.99,
    "total_epochs": 4,
  }
  run(tmp_path / "run", data, **changes)
  rates = [line["learning_rate"] for line in lines(tmp_path / "run")]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0.025], rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.name": "resnet"}, "model.name='resnet'"),
    ({"model.norm": "bach"}, "model.norm='bach'.*Did you mean 'batch'"),
    ({"schedule.name": "linear"}, "schedule.name='linear'"),
    ({"optimizer.name": "adam"}, "optimizer.name='adam'.*Did you mean 'adamw'"),
    ({"augment.backend": "gpu"}, "augment.backend='gpu'"),
    ({"data.name": "npz:/nowhere.npz"}, "/nowhere.npz"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 1000}, "batch_size=1000"),
    ({"eval_batch_size": 0}, "eval_batch_size=0"),
    ({"total_epochs": 0}, "total_epochs=0"),
    ({"checkpoint.every": 0}, "checkpoint.every=0"),
    ({"ema.decay": 1.0}, "ema.decay=1.0"),
    ({"num_devices": 9}, "num_devices=9"),
    ({"data.validation_size": 0, "schedule.name": "plateau"}, "data.validation_size=0"),
    ({"model.norm": "ghost", "norm.ghost.num_splits": 3}, "norm.ghost.num_splits=3"),
  ],
)
def test_bad_choices_are_named_before_anything_is_written(tmp_path, data, changes, message):
  with pytest.raises(UserError, match=message):
    run(tmp_path / "run", data, **changes)
  assert not (tmp_path / "run").exists()


def test_train_step_follows_the_gradient():
  """One step of plain SGD equals -rate * gradient of the mean loss, taken by differences."""
  model = TinyNet()
  optimizer = optax.sgd(0.5)
  plateau = create_plateau(factor=0.5, patience=1, threshold=0.1, cooldown=0, final=0.0)
  state = create_train_state(
    model=model,
    optimizer=optimizer,
    plateau=plateau,
    image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
    ema_decay=0.0,
    seed=0,
  )
  state = state.replace(plateau=state.plateau._replace(scale=jnp.float32(0.25)))
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
    "label": rng.integers(3, size=4),
  }
  settings = {"normalize": lambda x: x / 255, "label_smoothing": 0.0, "ema_decay": 0.0}
  new, totals = train.train_step(state, batch, model=model, optimizer=optimizer, **settings)
  assert int(new.step) == 1
  assert float(totals["count"]) == 4

  def loss(kernel):
    params = jax.tree.map(lambda x: x, state.params)
    params["head"]["conv"]["kernel"] = kernel
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, _ = model.apply(variables, batch["image"] / 255, train=True, mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(4), batch["label"]].mean()

  kernel = np.asarray(state.params["head"]["conv"]["kernel"])
  moved = np.asarray(new.params["head"]["conv"]["kernel"]) - kernel
  for index in ((0, 0, 0, 0), (0, 0, 3, 2)):
    step = np.zeros_like(kernel)
    step[index] = 1e-2
    slope = (loss(kernel + step) - loss(kernel - step)) / 2e-2
    assert moved[index] == pytest.approx(-0.5 * 0.25 * slope, rel=1e-3, abs=1e-6)
