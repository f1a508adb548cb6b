"""A run of a tiny network learns, repeats, resumes, shards, and stops at non-finite numbers."""

import concurrent.futures
import errno
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import errors, evaluate, metrics, optim, signals, train
from flax_cifar import state as state_lib
from flax_cifar.data import feeds, splits
from flax_cifar.data.augment import device
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import checkpoint
from flax_cifar.run import config as config_lib
from flax_cifar.run import weights as weights_lib
from tests import runs, tiny

pytestmark = pytest.mark.usefixtures("tiny_model")


def test_a_run_learns_and_writes_all_files(tmp_path, data):
  result = runs.run(tmp_path / "run", data, **{"total_epochs": 12, "log.pictures": True})
  assert result["test_accuracy"] > 0.9
  assert result["epochs"] == 12
  assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
  assert result["parameters"] == 9 * 3 * 6 + 2 * 6 + 6 * 3
  assert len(runs.lines(tmp_path / "run")) == 12
  names = {path.name for path in (tmp_path / "run").iterdir()}
  assert names >= {"config.json", "summary.txt", "checkpoints", "metrics.jsonl", "result.json"}
  assert names >= {"weights.safetensors", "lock"}
  assert names >= {"augmented.png", "curves.png", "learning_rate.png", "misclassified.png"}


def test_the_reported_scores_are_those_of_the_moving_average(tmp_path, data):
  """Recomputes the forward pass in float64 NumPy from the checkpoint; the weights are the same."""
  changes = {"model.norm": "none", "ema.decay": 0.9, "total_epochs": 4}
  result = runs.run(tmp_path / "run", data, **changes)
  params = runs.load_checkpoint(tmp_path / "run", 20)["ema"]["params"]
  saved = weights_lib.load_weights(tmp_path / "run" / "weights.safetensors").variables["params"]
  jax.tree.map(np.testing.assert_array_equal, saved, params)
  arrays = np.load(data.removeprefix("npz:"))
  pixels = arrays["train_images"].astype(np.float64) / 255

  def score(images, labels):
    x = (images / 255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["unit"]["conv"]["kernel"], np.float64)
    maps = sum(
      padded[:, i : i + tiny.IMAGE_SIZE, j : j + tiny.IMAGE_SIZE] @ kernel[i, j]
      for i in range(3)
      for j in range(3)
    )
    head = np.asarray(params["head"]["conv"]["kernel"], np.float64)[0, 0]
    logits = np.maximum(maps, 0).mean((1, 2)) @ head
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    accuracy = (logits.argmax(-1) == labels).mean()
    return accuracy, pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-5)

  tested = score(arrays["test_images"], arrays["test_labels"])
  assert (result["test_accuracy"], result["test_loss"]) == tested
  held_out = splits.load_splits(protocol="honest", **tiny.get_config(data).data).validation
  last = runs.lines(tmp_path / "run")[-1]
  validated = score(held_out.images, held_out.labels)
  assert (last["validation_accuracy"], last["validation_loss"]) == validated


def test_the_recorded_learning_rate_is_that_of_the_last_step(tmp_path, data):
  changes = {"schedule.name": "one_cycle", "schedule.one_cycle.final": 0.1}
  runs.run(tmp_path / "run", data, **changes)
  schedule = optim.create_schedule(
    steps_per_epoch=5, total_epochs=3, **tiny.get_config(data, **changes).schedule
  )
  rates = [line["learning_rate"] for line in runs.lines(tmp_path / "run")]
  assert rates == pytest.approx([0.1 * float(schedule(step)) for step in (4, 9, 14)], rel=1e-6)
  assert len(set(rates)) == 3


def test_the_plateau_follows_the_validation_loss(tmp_path, data, monkeypatch):
  validate, calls = evaluate.validate, []

  def falling(*args, **kwargs):
    calls.append(validate(*args, **kwargs))
    loss = np.asarray(calls[-1]["loss"])
    return {"loss": np.full_like(loss, 1 / len(calls)), "accuracy": np.full_like(loss, 0.5)}

  monkeypatch.setattr(evaluate, "validate", falling)
  runs.run(tmp_path / "run", data, **{"schedule.name": "plateau", "schedule.plateau.patience": 0})
  rates = [line["learning_rate"] for line in runs.lines(tmp_path / "run")]
  assert rates == pytest.approx([0.1] * 3)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, data):
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    runs.run(tmp_path / name, data, seed=seed)
  assert runs.lines(tmp_path / "a") == runs.lines(tmp_path / "b")
  assert runs.lines(tmp_path / "a") != runs.lines(tmp_path / "c")


def saved_params(workdir):
  return jax.tree.leaves(runs.load_checkpoint(workdir, runs.LAST_STEP)["params"])


def assert_nearly_equal(one, other):
  """Compares records or results, floats up to rounding."""
  assert one.keys() == other.keys()
  for name, value in one.items():
    assert value == (pytest.approx(other[name], rel=1e-4) if name != "config" else other[name])


def test_several_steps_per_call_give_the_same_run(tmp_path, data):
  """The five steps of an epoch in chunks of three and two."""
  for steps_per_call in (1, 3):
    changes = {"steps_per_call": steps_per_call, **runs.AVERAGE_AND_PLATEAU}
    runs.run(tmp_path / str(steps_per_call), data, **changes)
  for one, three in zip(runs.lines(tmp_path / "1"), runs.lines(tmp_path / "3"), strict=True):
    assert_nearly_equal(one, three)
  params = [saved_params(tmp_path / name) for name in ("1", "3")]
  for a, b in zip(*params, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_time_of_fetching_metrics_changes_nothing(tmp_path, data, monkeypatch):
  """They are fetched once an epoch, or as soon as another step has begun."""
  fetched = []
  original = metrics.iterate_steps

  def iterate_steps(calls):
    fetched.append(len(calls))
    return original(calls)

  monkeypatch.setattr(metrics, "iterate_steps", iterate_steps)
  monkeypatch.setattr(train, "FETCH_SECONDS", 60)
  runs.run(tmp_path / "seldom", data)
  assert fetched == [runs.STEPS_PER_EPOCH] * 3
  fetched.clear()
  monkeypatch.setattr(train, "FETCH_SECONDS", 0)
  runs.run(tmp_path / "often", data)
  assert fetched == [0, 1, 1, 1, 1, 1] * 3
  assert runs.lines(tmp_path / "seldom") == runs.lines(tmp_path / "often")


def never_ends():
  """A guard and a policy that let chunks go on."""
  policy = checkpoint.SavePolicy(every=1, every_steps=0, every_minutes=0)
  return signals.InterruptGuard(), policy


def test_an_epoch_waits_for_all_steps_but_the_last(monkeypatch):
  """A signal must not wait until a long queue is done."""
  waited, made = [], []
  names, ones = ("loss_sum", "count", "correct", "finite"), {n: jnp.ones(n) for n in (1, 3)}
  monkeypatch.setattr(jax, "block_until_ready", lambda calls: waited.extend(calls))

  def steps_fn(state, inputs, length):
    made.append(dict.fromkeys(names, ones[length]))
    assert len(waited) == max(0, len(made) - 2)
    return state, made[-1]

  reports = []
  progress = state_lib.Progress(20, None, metrics.create_totals(1), [])
  chunks = [(3, None), (3, None), (3, None), (1, None)]
  train.train_chunks(
    progress, chunks, steps_fn, *never_ends(), lambda totals, steps: reports.append(steps)
  )
  assert list(map(id, waited)) == list(map(id, made[:-1]))
  assert progress.step == 30
  assert progress.totals["count"] == sum(reports) == 10


def test_the_data_is_not_a_constant_of_the_compiled_steps(data):
  """An array captured by the step would be copied into every program and into the cache."""
  config = tiny.get_config(
    tiny.write_data(data.removeprefix("npz:"), train=2000, size=tiny.IMAGE_SIZE)
  )
  split = splits.load_splits(protocol="honest", **config.data).train
  mesh = mesh_lib.create_mesh(1)
  feed = feeds.create_feed(
    split, mean=(0.5,) * 3, mesh=mesh, **config_lib.get_feed_arguments(config)
  )
  state, step = create_step()
  steps_fn = seeds_lib.compile_steps(
    step, feed.get_batch, input_axes=feed.seed_axes, num_seeds=1, mesh=mesh
  )
  program = steps_fn.lower(state, feed.example_inputs(), 2).as_text()
  assert "dense" in program
  assert len(program) < split.images.nbytes / 2


def test_the_step_is_traced_once(tmp_path, data, monkeypatch):
  traced = []
  real_step = train.train_step

  def step(state, batch, **kwargs):
    traced.append(batch["image"].shape)
    return real_step(state, batch, **kwargs)

  monkeypatch.setattr(train, "train_step", step)
  runs.run(tmp_path / "run", data)
  assert traced == [(16, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)]


def test_seeds_trained_together_equal_the_runs_of_each_seed(tmp_path, data, capsys):
  changes = {"seed": 3, **runs.AVERAGE_AND_PLATEAU}
  both = runs.run(tmp_path / "both", data, **changes, num_seeds=2, **{"log.pictures": True})
  shown = capsys.readouterr().out
  singles = [runs.run(tmp_path / str(s), data, **(changes | {"seed": s})) for s in (3, 4)]
  for number, seed in enumerate((3, 4)):
    for one, record in zip(
      runs.lines(tmp_path / str(seed)), runs.lines(tmp_path / "both"), strict=True
    ):
      own = {name: record.get(f"{name}_per_seed", [record[name]] * 2)[number] for name in one}
      assert_nearly_equal(one, own)
  for name in ("test_accuracy", "test_loss"):
    scores = [single[name] for single in singles]
    assert both[f"{name}_per_seed"] == pytest.approx(scores, rel=1e-4)
    assert both[name] == pytest.approx(np.mean(scores), rel=1e-4)
    assert both[f"{name}_sd"] == pytest.approx(np.std(scores, ddof=1), rel=1e-2)
  assert both["num_seeds"] == 2
  assert both["parameters"] == singles[0]["parameters"]
  assert "tiny, seeds 3 to 4" in shown
  mean, sd = both["test_accuracy"], both["test_accuracy_sd"]
  assert f"test accuracy {mean:.2%} ± {sd:.2%} (n = 2)" in shown
  assert (tmp_path / "both" / "misclassified.png").exists()


def test_two_seeds_on_four_devices_share_them_and_each_batch(tmp_path, data):
  changes = {"num_seeds": 2, "total_epochs": 1, **runs.AVERAGE_AND_PLATEAU}
  for devices in (1, 4):
    runs.run(tmp_path / str(devices), data, **changes, num_devices=devices)
  for one, four in zip(runs.lines(tmp_path / "1"), runs.lines(tmp_path / "4"), strict=True):
    assert one["train_loss_per_seed"] == pytest.approx(four["train_loss_per_seed"], rel=1e-4)


def test_a_finished_run_is_left_alone(tmp_path, data, capsys):
  first = runs.run(tmp_path / "run", data)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
  assert runs.run(tmp_path / "run", data) == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
  assert "is finished" in capsys.readouterr().out


def test_fewer_epochs_than_a_finished_run_has_are_refused(tmp_path, data):
  runs.run(tmp_path / "run", data, total_epochs=2)
  with pytest.raises(errors.UserError, match=r"total_epochs=1 .*must be 2 or more.*has finished"):
    runs.run(tmp_path / "run", data, total_epochs=1)


def test_more_epochs_continue_a_finished_run(tmp_path, data, monkeypatch):
  """The result tells how long the run was before, and which code has trained it."""
  commits = iter(["first", "second"])
  monkeypatch.setattr("flax_cifar.environment.get_commit", lambda: next(commits))
  result = runs.run(tmp_path / "run", data)
  assert (result["commit"], result["earlier_commits"]) == ("first", [])
  assert result["earlier_total_epochs"] == []
  first = runs.lines(tmp_path / "run")
  result = runs.run(tmp_path / "run", data, total_epochs=5)
  assert result["epochs"] == 5
  assert (result["commit"], result["earlier_commits"]) == ("second", ["first"])
  assert result["earlier_total_epochs"] == [3]
  assert runs.lines(tmp_path / "run")[:3] == first
  assert [line["epoch"] for line in runs.lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


def change_data(path):
  """Replaces a training image of the archive at `path`."""
  arrays = dict(np.load(path))
  arrays["train_images"][0] = 255
  np.savez(path, **arrays)


def test_a_finished_run_on_changed_data_is_refused(tmp_path, data):
  runs.run(tmp_path / "run", data, total_epochs=1)
  change_data(data.removeprefix("npz:"))
  for epochs in (1, 2):
    with pytest.raises(errors.UserError, match=r"a run on other data: .*_sha256 is "):
      runs.run(tmp_path / "run", data, total_epochs=epochs)
  (tmp_path / "run" / "data.json").unlink()  # as the message says
  assert runs.run(tmp_path / "run", data, total_epochs=2)["epochs"] == 2


def test_a_finished_run_whose_data_are_gone_still_prints_its_result(tmp_path, data, capsys):
  result = runs.run(tmp_path / "run", data, total_epochs=1)
  pathlib.Path(data.removeprefix("npz:")).unlink()
  capsys.readouterr()
  assert runs.run(tmp_path / "run", data, total_epochs=1) == result
  shown = capsys.readouterr()
  assert "is finished: test accuracy" in shown.out
  assert shown.err.startswith("warning: the data of the run cannot be compared")


def test_a_finished_run_in_a_folder_without_write_permission_prints_its_result(
  tmp_path, data, monkeypatch
):
  result = runs.run(tmp_path / "run", data, total_epochs=1)
  monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
  assert runs.run(tmp_path / "run", data, total_epochs=1) == result
  with pytest.raises(errors.UserError, match="not writable"):
    runs.run(tmp_path / "run", data, total_epochs=2)


def test_an_older_run_whose_epochs_have_become_shorter_is_refused(tmp_path, data):
  runs.run(tmp_path / "run", data, total_epochs=1)
  (tmp_path / "run" / "data.json").unlink()  # older runs have none
  tiny.write_data(data.removeprefix("npz:"), train=48)
  with pytest.raises(errors.UserError, match=r"step 5 after 1 epochs, .* 2 steps an epoch"):
    runs.run(tmp_path / "run", data, total_epochs=2)


def test_a_run_in_another_thread_is_the_same(tmp_path, data):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    result = pool.submit(runs.run, tmp_path / "a", data, total_epochs=1).result()
  assert result["test_loss"] == runs.run(tmp_path / "b", data, total_epochs=1)["test_loss"]


def test_fewer_epochs_than_the_run_has_begun_are_refused(tmp_path, data, monkeypatch):
  with monkeypatch.context() as patch:
    runs.interrupt_at(patch, runs.STEPS_PER_EPOCH + 2)
    with pytest.raises(signals.Interrupted, match="saved at step 8;"):
      runs.run(tmp_path / "run", data)
  config = (tmp_path / "run" / "config.json").read_bytes()
  with pytest.raises(errors.UserError, match=r"total_epochs=1 is not valid.* 2 or more.* step 8"):
    runs.run(tmp_path / "run", data, total_epochs=1)
  assert (tmp_path / "run" / "config.json").read_bytes() == config
  assert not (tmp_path / "run" / "result.json").exists()
  assert runs.run(tmp_path / "run", data, total_epochs=2)["epochs"] == 2
  assert json.loads((tmp_path / "run" / "config.json").read_text())["total_epochs"] == 2


BAD_STEP = 7


def spoil_step(monkeypatch, quantity):
  """Makes the loss or the gradient of BAD_STEP non-finite, for every seed."""
  real = metrics.cross_entropy

  @jax.custom_vjp
  def spoil_gradient(logits, bad):
    return logits

  spoil_gradient.defvjp(
    lambda logits, bad: (logits, bad), lambda bad, g: (jnp.where(bad, jnp.inf, g), None)
  )
  real_step = train.train_step

  def step(state, batch, **kwargs):
    bad = state.step == BAD_STEP

    def cross_entropy(logits, targets):
      if quantity == "gradient":
        return real(spoil_gradient(logits, bad), targets)
      return jnp.where(bad, jnp.nan, real(logits, targets))

    with pytest.MonkeyPatch.context() as patch:  # evaluation uses `cross_entropy` too
      patch.setattr(metrics, "cross_entropy", cross_entropy)
      return real_step(state, batch, **kwargs)

  monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize(
  ("quantity", "changes"),
  [
    ("loss", {"steps_per_call": 5}),
    ("gradient", {"augment.backend": "albumentations"}),
    ("gradient", {"num_seeds": 2}),
  ],
)
def test_a_step_that_is_not_finite_stops_the_run_and_can_be_looked_at(
  tmp_path, data, monkeypatch, quantity, changes
):
  """The dump has the state before that step, which equals that of a run stopped there."""
  changes = {"ema.decay": 0.9, "checkpoint.every": 1, **changes}
  with monkeypatch.context() as patch:
    runs.interrupt_at(patch, BAD_STEP - 1)
    with pytest.raises(signals.Interrupted):
      runs.run(tmp_path / "good", data, **(changes | {"steps_per_call": 1}))
  with monkeypatch.context() as patch:
    spoil_step(patch, quantity)
    with pytest.raises(errors.UserError, match=r"not finite at step 8\..*nonfinite-step-8.npz"):
      runs.run(tmp_path / "run", data, **changes)
  assert runs.checkpoint_steps(tmp_path / "run") == [runs.STEPS_PER_EPOCH]
  assert [line["epoch"] for line in runs.lines(tmp_path / "run")] == [1]

  dump = dict(np.load(tmp_path / "run" / "nonfinite-step-8.npz"))
  good = runs.flat_checkpoint(tmp_path / "good", BAD_STEP)
  assert int(dump["state/step"]) == BAD_STEP
  assert not dump["state/finite"]
  for name in good.keys() - {"finite"}:
    expected = good[name][0] if "num_seeds" in changes else good[name]
    # Not bit for bit, because the spoiled step is another program.
    np.testing.assert_allclose(dump[f"state/{name}"], expected, rtol=1e-5, atol=1e-7, err_msg=name)
  split = splits.load_splits(protocol="honest", **tiny.get_config(data).data).train
  np.testing.assert_array_equal(dump["label"], split.labels[dump["example"]])
  flipped = np.stack([dump["image"], dump["image"][:, :, ::-1]])
  assert (flipped == split.images[dump["example"]]).all((2, 3, 4)).any(0).all()


def test_a_full_disk_does_not_hide_that_a_run_has_diverged(tmp_path, data, monkeypatch):
  def fill(file, **arrays):
    raise OSError(errno.ENOSPC, "No space left on device")

  spoil_step(monkeypatch, "loss")
  monkeypatch.setattr(np, "savez", fill)
  message = r"not finite at step 8\. .*nonfinite-step-8.npz' could not be written \(No space left"
  with pytest.raises(errors.UserError, match=message):
    runs.run(tmp_path / "run", data)
  assert not list((tmp_path / "run").glob("*nonfinite*"))


def test_a_learning_rate_far_too_high_is_reported(tmp_path, data):
  changes = {"optimizer.learning_rate": 1e30, "model.norm": "none"}
  with pytest.raises(errors.UserError, match=r"not finite at step \d+\..*learning_rate"):
    runs.run(tmp_path / "run", data, **changes)


def test_the_result_has_the_published_protocol(tmp_path, data):
  result = runs.run(tmp_path / "run", data, protocol="published")
  assert result["protocol"] == "published"
  assert result["test_accuracy"] == runs.lines(tmp_path / "run")[-1]["validation_accuracy"]
  assert runs.lines(tmp_path / "run")[0]["step"] == 6  # all 96 training images, not 80


def test_a_trial_does_not_depend_on_the_test_split(tmp_path, data):
  with np.load(data.removeprefix("npz:")) as arrays:
    other = dict(arrays) | {"test_images": 255 - arrays["test_images"]}
  np.savez(tmp_path / "other.npz", **other)
  names = {"one": data, "other": f"npz:{tmp_path / 'other.npz'}"}
  trials = [runs.run(tmp_path / n, d, protocol="trial") for n, d in names.items()]
  last = runs.lines(tmp_path / "one")[-1]
  for trial in trials:
    assert trial["validation_accuracy"] == last["validation_accuracy"]
    assert trial["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert not {"test_accuracy", "test_loss"} & set(trial)
  assert trials[0]["best_validation"] == trials[1]["best_validation"]
  honest = [runs.run(tmp_path / f"{n}-honest", d)["test_loss"] for n, d in names.items()]
  assert honest[0] != honest[1]  # an honest run does depend on it


def test_without_validation_the_run_ends_with_the_test(tmp_path, data):
  result = runs.run(tmp_path / "run", data, **{"data.validation_size": 0})
  assert result["best_validation"] is None
  assert 0 <= result["test_accuracy"] <= 1


def test_plateau_cuts_the_learning_rate(tmp_path, data):
  """No epoch improves by 99 %, so with patience 0 each epoch after the first is bad."""
  changes = {
    "schedule.name": "plateau",
    "schedule.plateau.factor": 0.5,
    "schedule.plateau.patience": 0,
    "schedule.plateau.threshold": 0.99,
    "total_epochs": 4,
  }
  runs.run(tmp_path / "run", data, **changes)
  rates = [line["learning_rate"] for line in runs.lines(tmp_path / "run")]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0.025], rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.name": "resnet"}, "model.name='resnet'"),
    ({"model.norm": "bach"}, "model.norm='bach'.*Did you mean 'batch'"),
    ({"schedule.name": "linear"}, "schedule.name='linear'"),
    ({"optimizer.name": "adam"}, "optimizer.name='adam'.*Did you mean 'adamw'"),
    ({"augment.backend": "gpu"}, "augment.backend='gpu'.*device"),
    ({"augment.backend": "albumentations", "num_seeds": 2}, "num_seeds=2.*albumentations"),
    ({"augment.backend": "albumentations", "steps_per_call": 2}, "steps_per_call=2.*albumen"),
    ({"augment.backend": "albumentations", "augment.workers": -1}, "augment.workers=-1"),
    ({"num_seeds": 0}, "num_seeds=0"),
    ({"steps_per_call": -1}, "steps_per_call=-1"),
    ({"mixing.name": "cutmx"}, "mixing.name='cutmx'"),
    ({"loss.label_smoothing": 1.0}, "loss.label_smoothing=1.0"),
    ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
    ({"data.name": "npz:/nowhere.npz"}, "/nowhere.npz"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 1000}, "batch_size=1000"),
    ({"eval_batch_size": 0}, "eval_batch_size=0"),
    ({"total_epochs": 0}, "total_epochs=0"),
    ({"checkpoint.every": 0}, "checkpoint.every=0"),
    ({"checkpoint.every_steps": -1}, "checkpoint.every_steps=-1"),
    ({"checkpoint.every_minutes": -0.5}, "checkpoint.every_minutes=-0.5"),
    ({"checkpoint.keep": 0}, "checkpoint.keep=0"),
    ({"ema.decay": 1.0}, "ema.decay=1.0"),
    ({"num_devices": 9}, "num_devices=9"),
    ({"data.validation_size": 0, "schedule.name": "plateau"}, "data.validation_size=0"),
    ({"model.norm": "ghost", "norm.ghost.num_splits": 3}, "norm.ghost.num_splits=3"),
  ],
)
def test_bad_choices_are_named_before_anything_is_written(tmp_path, data, changes, message):
  with pytest.raises(errors.UserError, match=message):
    runs.run(tmp_path / "run", data, **changes)
  assert not (tmp_path / "run").exists()


def create_step(mixing=None, distillation=None, dropout_rate=0.0, **changes):
  """A state and a training step with plain SGD."""
  model, optimizer = tiny.TinyNet(dropout_rate=dropout_rate), optax.sgd(0.5)
  plateau = optim.create_plateau(
    enabled=True, factor=0.5, patience=1, threshold=0.1, cooldown=0, final=0.0
  )
  state = state_lib.create_train_states(
    model=model,
    optimizer=optimizer,
    plateau=plateau,
    images=jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)),
    ema_decay=0.0,
    seeds=[0],
  )[0]
  settings = {"normalize": lambda x: x / 255, "label_smoothing": 0.0, "ema_decay": 0.0} | changes
  step = functools.partial(
    train.train_step,
    model=model,
    optimizer=optimizer,
    mixing=mixing,
    distillation=distillation,
    **settings,
  )
  return state, step


def draw_batch():
  rng = np.random.default_rng(0)
  return {
    "image": jnp.asarray(rng.integers(0, 256, (4, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8)),
    "label": jnp.asarray(rng.integers(3, size=4)),
  }


def log_probabilities(variables, images):
  """Float64 log-probabilities (N, classes) of the tiny network in training."""
  logits, _ = tiny.TinyNet().apply(
    jax.tree.map(jnp.asarray, variables), jnp.asarray(images), train=True, mutable=["batch_stats"]
  )
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_each_step_drops_other_elements():
  state, step = create_step(dropout_rate=0.5)
  batch = draw_batch()
  (_, one), (_, other) = (step(state.replace(step=jnp.int32(n)), batch) for n in (0, 1))
  assert float(one["loss_sum"]) != float(other["loss_sum"])


def test_train_step_follows_the_gradient():
  """One step of plain SGD equals -rate * gradient of the mean loss, taken by differences."""
  state, step = create_step()
  state = state.replace(plateau=state.plateau._replace(scale=jnp.float32(0.25)))
  batch = draw_batch()
  new, totals = step(state, batch)
  assert int(new.step) == 1
  assert float(totals["count"]) == 4

  def loss(kernel):
    params = jax.tree.map(lambda x: x, state.params)
    params["head"]["conv"]["kernel"] = kernel
    variables = {"params": params, "batch_stats": state.batch_stats}
    return -log_probabilities(variables, batch["image"] / 255)[
      np.arange(4), np.asarray(batch["label"])
    ].mean()

  kernel = np.asarray(state.params["head"]["conv"]["kernel"])
  update = np.asarray(new.params["head"]["conv"]["kernel"]) - kernel
  index = (0, 0, 3, 2)
  change = np.zeros_like(kernel)
  change[index] = 1e-2
  slope = (loss(kernel + change) - loss(kernel - change)) / 2e-2
  assert update[index] == pytest.approx(-0.5 * 0.25 * slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_under_mixing_is_that_of_the_mixed_targets(smoothing):
  """Each example is averaged with the next one; accuracy counts against its own label."""
  keys = []

  def mix(images, targets, key):
    keys.append(key)
    images, targets = (0.7 * x + 0.3 * jnp.roll(x, 1, axis=0) for x in (images, targets))
    return images, targets

  state, step = create_step(mix, label_smoothing=smoothing)
  batch = draw_batch()
  _, totals = step(state, batch)
  images = batch["image"] / 255
  mixed = 0.7 * images + 0.3 * np.roll(images, 1, axis=0)
  log_p = log_probabilities({"params": state.params, "batch_stats": state.batch_stats}, mixed)
  one_hot = (1 - smoothing) * np.eye(3)[np.asarray(batch["label"])] + smoothing / 3
  targets = 0.7 * one_hot + 0.3 * np.roll(one_hot, 1, axis=0)
  assert float(totals["loss_sum"]) == pytest.approx(-(targets * log_p).sum(), rel=1e-5)
  assert float(totals["correct"]) == (log_p.argmax(-1) == batch["label"]).sum()
  step(state.replace(step=state.step + 1), batch)
  data = {jax.random.key_data(key).tobytes() for key in (*keys, state.key)}
  step_key = jax.random.fold_in(state.key, state.step)  # the key of dropout
  assert len(data | {jax.random.key_data(step_key).tobytes()}) == 4


def test_bfloat16_stays_near_float32(tmp_path, data):
  for dtype in ("float32", "bfloat16"):
    runs.run(tmp_path / dtype, data, compute_dtype=dtype)
  exact, rounded = runs.lines(tmp_path / "float32"), runs.lines(tmp_path / "bfloat16")
  assert exact != rounded
  for one, other in zip(exact, rounded, strict=True):
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.1)
  last = saved_params(tmp_path / "bfloat16")
  assert {leaf.dtype for leaf in last} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model.norm": "ghost", "norm.ghost.num_splits": 3},
      r"num_splits=3 is not a divisor of the batch size 16; "
      r"change one of batch_size=16, norm\.ghost\.num_splits=3\.$",
    ),
    (
      {"model.norm": "group", "norm.group.num_groups": 4},
      r"num_groups=4 .* 6 channels of a layer; change norm\.group\.num_groups=4\.$",
    ),
    (
      {"model.name": "ghost"},
      r"too small .*; change one of data\.image_size=8, model\.name='ghost'\.$",
    ),
    (
      {"model.name": "keras_base", "model.dropout_rate": 0.6},
      r"dropout_rate=0\.6 is not below 0\.5, .*; change model\.dropout_rate=0\.6\.$",
    ),
  ],
)
def test_a_network_that_does_not_fit_is_one_line_with_the_keys(tmp_path, data, changes, message):
  with pytest.raises(errors.UserError, match=message):
    runs.run(tmp_path / "run", data, **changes)
  assert not (tmp_path / "run").exists()


def test_an_implicit_copy_to_the_device_is_an_error():
  progress = state_lib.Progress(0, np.ones(3, np.float32), metrics.create_totals(1), [])
  steps_fn = jax.jit(lambda state, inputs, length: (state, {}), static_argnums=2)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    train.train_chunks(progress, [(1, None)], steps_fn, *never_ends(), None)


@pytest.mark.parametrize(
  "changes",
  [
    {"schedule.name": "one_cycle", "optimizer.name": "muon", "mixing.name": "cutmix"},
    {"schedule.name": "cosine", "optimizer.name": "adamw", "mixing.name": "mixup"},
    {
      "schedule.name": "step",
      "augment.ops": tuple(device.DEVICE_OPS),
      "augment.coarse_dropout.height": 4,
      "augment.coarse_dropout.width": 4,
      "ema.decay": 0.9,
    },
    {"schedule.name": "plateau", "model.norm": "ghost", "mixing.name": "ricap"},
  ],
)
def test_a_step_holds_no_array_that_a_device_would_send_back(tmp_path, data, monkeypatch, changes):
  """A GPU's arrays must not be constants of a program: they would be copied to the host."""
  compile_steps = seeds_lib.compile_steps

  class Traced(Exception):
    """Ends the run before its program is compiled."""

  class Spy:
    def __init__(self, *args, **kwargs):
      self.steps_fn = compile_steps(*args, **kwargs)

    def trace(self, *inputs):
      raise Traced(self.steps_fn.trace(*inputs))

  monkeypatch.setattr(seeds_lib, "compile_steps", Spy)
  with pytest.raises(Traced) as raised:
    runs.run(tmp_path / "run", data, **changes)
  (call,) = raised.value.args
  assert not [value for value in call.jaxpr.consts if isinstance(value, jax.Array)]
